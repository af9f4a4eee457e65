"""How a part of a vector is written on our own wire: fp32, fp16, or 8 bits with a scale per block.

A part is checked before it is used: its length is exact, all values are finite and none is absurd. Decoding is one
exactly rounded operation per element, so that every machine gets the same bits out of the same bytes; the digest of a
round rests on that. hivemind's 8-bit codecs are not used: they fit 256 levels to six standard deviations of a whole
part and clip what lies outside, and an error-feedback loop would have to carry what was clipped for many rounds.

NumPy, or torch in small pieces: torch gives larger arrays to its own pool of threads, which would spin beside training.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Vector = NDArray[np.float32]

MAX_VALUE = 65504.0
"""The largest number that fp16 can write. No gradient or parameter of a model that trains comes near, in any codec."""
PART_BYTES = 32 * 1024
"""About the size of an encoded part. Small, so that the last ones do not take long to come back over a slow link."""
BLOCK_ELEMENTS = 1024
"""Elements that share a scale in 8 bits: 0.4 % more bytes, and one outlier spoils only its own block."""
SINGLE_THREAD_ELEMENTS = 2**15 - 1
"""Arrays up to this size are done by torch in the calling thread (at::internal::GRAIN_SIZE)."""


class BadPart(Exception):
    """What arrived is no part: its sender broke the protocol, or its training has blown up."""


class PartCodec(Protocol):
    """One way to write parts. `part_elements` is how many go into a full part."""

    name: str
    part_elements: int
    is_biased: bool
    """Whether what it rounds away is worth feeding back: more than fp32 training would notice."""

    def encode(self, values: Vector) -> bytes: ...
    def encoded_bytes(self, num_elements: int) -> int: ...
    def decode(self, payload: bytes, num_elements: int) -> Vector:
        """Values of shape (num_elements,); BadPart if the length is wrong or a value is not finite or absurd."""


def is_sane(values: Vector) -> bool:
    """Whether all values are finite and at most MAX_VALUE. min and max hand on a NaN, which no comparison holds for."""
    return not values.size or bool(values.min() >= -MAX_VALUE and values.max() <= MAX_VALUE)


class Float32:
    """As it is."""

    name, is_biased = "none", False
    part_elements = PART_BYTES // 4

    def encode(self, values: Vector) -> bytes:
        return values.astype("<f4", copy=False).tobytes()

    def encoded_bytes(self, num_elements: int) -> int:
        return 4 * num_elements

    def decode(self, payload: bytes, num_elements: int) -> Vector:
        _check_length(payload, self.encoded_bytes(num_elements))
        return _checked(np.frombuffer(payload, dtype="<f4").astype(np.float32, copy=False))


class Float16:
    """Half precision. Torch converts, as NumPy takes twenty times longer."""

    name, is_biased = "fp16", False
    part_elements = PART_BYTES // 2

    def encode(self, values: Vector) -> bytes:
        halves = np.empty(values.size, dtype=np.float16)
        _convert(values, halves)
        return halves.astype("<f2", copy=False).tobytes()

    def encoded_bytes(self, num_elements: int) -> int:
        return 2 * num_elements

    def decode(self, payload: bytes, num_elements: int) -> Vector:
        _check_length(payload, self.encoded_bytes(num_elements))
        values = np.empty(num_elements, dtype=np.float32)
        # A copy that can be written to, or torch warns about the bytes being immutable.
        _convert(np.frombuffer(payload, dtype="<f2").astype(np.float16), values)
        return _checked(values)


class Int8:
    """Blocks of 1024 values as whole numbers from -127 to 127 times a scale per block: all scales, then all numbers.

    The largest value of a block is exact but for rounding, the error of the others at most 1/254 of it. It is biased
    for one part of one round (small values beside a large one become 0), hence the error feedback.
    """

    name, is_biased = "8bit", True
    part_elements = PART_BYTES // BLOCK_ELEMENTS * BLOCK_ELEMENTS

    def encode(self, values: Vector) -> bytes:
        blocks = _blocks(values)
        scales = (np.abs(blocks).max(axis=1) / np.float32(127)).astype(np.float32)
        levels = blocks / np.where(scales > 0, scales, np.float32(1))[:, None]
        np.clip(np.rint(levels, out=levels), -127, 127, out=levels)
        return scales.astype("<f4", copy=False).tobytes() + levels.astype(np.int8).reshape(-1)[: values.size].tobytes()

    def encoded_bytes(self, num_elements: int) -> int:
        return 4 * -(-num_elements // BLOCK_ELEMENTS) + num_elements

    def decode(self, payload: bytes, num_elements: int) -> Vector:
        _check_length(payload, self.encoded_bytes(num_elements))
        num_blocks = -(-num_elements // BLOCK_ELEMENTS)
        scales = np.frombuffer(payload, dtype="<f4", count=num_blocks).astype(np.float32, copy=False)
        if num_blocks and not (scales.min() >= 0 and scales.max() <= np.float32(MAX_VALUE / 127)):
            raise BadPart("a scale is not finite, negative or absurd")
        levels = np.frombuffer(payload, dtype=np.int8, offset=4 * num_blocks)
        if levels.size and levels.min() < -127:
            raise BadPart("a level of -128, which no encoder writes")
        return (_blocks(levels.astype(np.float32)) * scales[:, None]).reshape(-1)[:num_elements]


CODECS: dict[str, PartCodec] = {codec.name: codec for codec in (Float32(), Float16(), Int8())}
"""By the name that `[run.averaging] compression` gives them."""


def _check_length(payload: bytes, expected: int) -> None:
    if len(payload) != expected:
        raise BadPart(f"{len(payload)} bytes in a part of {expected}")


def _checked(values: Vector) -> Vector:
    if not is_sane(values):
        raise BadPart(f"a value is not finite, or larger than {MAX_VALUE:.0f}")
    return values


def _blocks(values: Vector) -> Vector:
    """As (blocks, BLOCK_ELEMENTS), filled up with zeros."""
    short = -values.size % BLOCK_ELEMENTS
    return (np.pad(values, (0, short)) if short else values).reshape(-1, BLOCK_ELEMENTS)


def _convert(source: NDArray[np.floating], target: NDArray[np.floating]) -> None:
    source_pieces = torch.from_numpy(source).split(SINGLE_THREAD_ELEMENTS)
    for piece, into in zip(source_pieces, torch.from_numpy(target).split(SINGLE_THREAD_ELEMENTS), strict=True):
        into.copy_(piece)
