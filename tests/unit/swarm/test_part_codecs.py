"""Parts on the wire: exact lengths, bounded errors, equal bits for all, and nothing from a stranger gets through."""

import numpy as np
import pytest

from calm_ray.swarm.part_codecs import BLOCK_ELEMENTS, CODECS, MAX_VALUE, BadPart, PartCodec, Vector, is_sane

SIZES = [0, 1, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1, 70_000]


def values_of(size: int, *, scale: float = 1.0) -> Vector:
    return (np.random.default_rng(size).standard_normal(size) * scale).astype(np.float32)


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> PartCodec:
    return CODECS[request.param]


@pytest.mark.parametrize("size", SIZES)
def test_codec_returns_about_what_it_was_given_in_the_announced_bytes(codec: PartCodec, size: int) -> None:
    values = values_of(size)
    payload = codec.encode(values)
    assert len(payload) == codec.encoded_bytes(size)
    decoded = codec.decode(payload, size)
    assert decoded.dtype == np.float32 and decoded.shape == (size,)
    tolerance = {"none": 0.0, "fp16": 2.0**-11 * 5, "8bit": 5 / 254}[codec.name]
    assert np.abs(decoded - values).max(initial=0) <= tolerance
    assert codec.decode(codec.encode(decoded), size).tobytes() == decoded.tobytes() or codec.name == "8bit"


@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-30, 1e-8, 1.0, 1e4])
def test_codec_of_any_scale_gives_finite_values_within_its_error(codec: PartCodec, scale: float) -> None:
    values = values_of(5000, scale=scale)
    decoded = codec.decode(codec.encode(values), values.size)
    assert is_sane(decoded)
    largest = float(np.abs(values).max())
    bound = {"none": 0.0, "fp16": max(largest * 2.0**-11, 2.0**-25), "8bit": largest / 250 + 1e-43}[codec.name]
    assert np.abs(decoded - values).max() <= bound


def test_codec_of_8_bits_confines_an_outlier_to_its_own_block() -> None:
    values = values_of(3 * BLOCK_ELEMENTS)
    values[BLOCK_ELEMENTS] = 1000.0
    error = (
        np.abs(CODECS["8bit"].decode(CODECS["8bit"].encode(values), values.size) - values).reshape(3, -1).max(axis=1)
    )
    assert error[0] < 0.02 and error[1] > 1 and error[2] < 0.02


@pytest.mark.parametrize("change", [b"", b"x", b"x" * 4, b"x" * 4096])
def test_codec_refuses_a_part_of_another_length(codec: PartCodec, change: bytes) -> None:
    payload = codec.encode(values_of(100))
    for wrong in (payload + change, payload[: len(payload) - len(change)], change):
        if len(wrong) != len(payload):
            with pytest.raises(BadPart, match="bytes in a part of"):
                codec.decode(wrong, 100)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e5, -7e4])
def test_codec_refuses_values_that_no_training_has(codec: PartCodec, value: float) -> None:
    values = values_of(2000)
    values[1500] = value
    assert not is_sane(values)
    with np.errstate(all="ignore"), pytest.raises(BadPart):
        codec.decode(codec.encode(values), values.size)


def test_codec_takes_the_largest_value_that_fp16_can_write(codec: PartCodec) -> None:
    values = np.array([MAX_VALUE, -MAX_VALUE, 0.0], dtype=np.float32)
    assert np.abs(codec.decode(codec.encode(values), 3)).max() == MAX_VALUE


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0, 1e30])
def test_codec_of_8_bits_refuses_an_insane_scale(scale: float) -> None:
    payload = np.array([scale], dtype="<f4").tobytes() + bytes(10)
    with pytest.raises(BadPart, match="scale"):
        CODECS["8bit"].decode(payload, 10)


def test_codec_of_8_bits_refuses_a_level_that_no_encoder_writes() -> None:
    with pytest.raises(BadPart, match="level"):
        CODECS["8bit"].decode(np.array([1.0], dtype="<f4").tobytes() + b"\x80", 1)
