"""Eight bits on hivemind's wire: what its codecs do with numpy 2.4, and what ours do.

Whole rounds with them are in `test_pitfalls_rounds.py` and `test_stock_wire.py`.
"""

import struct
from typing import Any

import numpy as np
import pytest
import torch
from hivemind.compression import CompressionBase, CompressionInfo, deserialize_torch_tensor
from hivemind.compression.quantization import Quantile8BitQuantization, Uniform8BitQuantization
from hivemind.proto import runtime_pb2

from calm_ray.swarm.codecs import (
    SMALL_TENSOR_ELEMENTS,
    Quantile8Bit,
    Uniform8Bit,
    gradient_codec,
    mend_codecs,
)

# torch announces the end of quantize_per_tensor, which hivemind's uniform codec is made of.
pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")

is_numpy_strict = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
needs_strict_numpy = pytest.mark.skipif(
    not is_numpy_strict, reason=f"numpy {np.__version__} still turns a one-element array into a number"
)
OURS = [Uniform8Bit(), Quantile8Bit()]
STOCK = [Uniform8BitQuantization(), Quantile8BitQuantization()]
NUM_LEVELS = 256


def by_name(codec: CompressionBase) -> str:
    return type(codec).__name__


def compress(codec: CompressionBase, tensor: torch.Tensor) -> runtime_pb2.Tensor:
    message: runtime_pb2.Tensor = codec.compress(tensor, CompressionInfo.from_tensor(tensor))
    return message


def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*size, generator=torch.Generator().manual_seed(0))


# --- one tensor ------------------------------------------------------------------------------------------------------


@needs_strict_numpy
@pytest.mark.parametrize("codec", STOCK, ids=by_name)
def test_stock_codec_cannot_decode_its_own_tensor(codec: CompressionBase) -> None:
    """Fails the day hivemind mends it: then `swarm/codecs.py` can go."""
    with pytest.raises(TypeError, match="only 0-dimensional arrays can be converted"):
        codec.extract(compress(codec, normal(1000)))


@pytest.mark.parametrize(("stock", "ours"), list(zip(STOCK, OURS, strict=True)), ids=["uniform", "quantile"])
def test_our_codec_reads_what_stock_peers_write(stock: CompressionBase, ours: CompressionBase) -> None:
    tensor = normal(50, 20)
    assert compress(ours, tensor) == compress(stock, tensor), "the wire format is hivemind's"
    torch.testing.assert_close(ours.extract(compress(stock, tensor)), tensor, rtol=0, atol=1.0)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_uniform_levels_bound_the_error(scale: float) -> None:
    tensor = normal(100_000, scale=scale)
    decoded = Uniform8Bit().extract(compress(Uniform8Bit(), tensor))
    deviation = float(tensor.std())
    level = Uniform8Bit.RANGE_IN_SIGMAS * deviation / NUM_LEVELS
    is_inside = (tensor - tensor.mean()).abs() < (Uniform8Bit.RANGE_IN_SIGMAS / 2 - 0.1) * deviation
    assert float((decoded - tensor)[is_inside].abs().max()) <= 1.01 * level
    assert float((decoded - tensor).abs().max()) <= float(tensor.abs().max())
    assert float(decoded.mean()) == pytest.approx(float(tensor.mean()), abs=0.01 * level), "levels are means"


def test_quantile_levels_bound_the_error() -> None:
    tensor = normal(100_000)
    decoded = Quantile8Bit().extract(compress(Quantile8Bit(), tensor))
    is_inside = tensor.abs() < tensor.abs().quantile(0.98)
    assert float((decoded - tensor)[is_inside].abs().max()) < 0.1
    assert float(decoded.mean()) == pytest.approx(float(tensor.mean()), abs=1e-3)


@pytest.mark.parametrize("codec", OURS, ids=by_name)
@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(100), torch.full((100,), 3.0), torch.tensor([1.0, 2.0]), torch.ones(1)],
    ids=["zeros", "equal", "two", "one"],
)
def test_tensor_without_spread_comes_back_exactly(codec: CompressionBase, tensor: torch.Tensor) -> None:
    """A peer that joined a round late sends zeros: a scale of zero must not make them NaN."""
    assert torch.equal(codec.extract(compress(codec, tensor)), tensor)


@pytest.mark.parametrize("codec", OURS, ids=by_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_type_shape_and_gradient_flag_come_back(codec: CompressionBase, dtype: torch.dtype) -> None:
    tensor = normal(3, 4, 5).to(dtype).requires_grad_()
    decoded = codec.extract(compress(codec, tensor))
    assert (decoded.dtype, decoded.shape, decoded.requires_grad) == (dtype, (3, 4, 5), True)


def pack(codebook: list[float], indices: bytes, *, count: int | None = None) -> bytes:
    floats = np.asarray(codebook, dtype=np.float32).tobytes()
    return struct.pack("<q", len(codebook) if count is None else count) + floats + indices


@pytest.mark.parametrize("codec", OURS, ids=by_name)
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"buffer": b""}, "nothing"),
        ({"buffer": b"\1\0\0"}, "not even a size"),
        ({"buffer": pack([], b"")}, "no codebook"),
        ({"buffer": pack([1.0], bytes(4), count=-1)}, "negative"),
        ({"buffer": pack([1.0], bytes(4), count=2**62)}, "huge"),
        ({"buffer": pack([0.0] * 257, bytes(4))}, "too many levels"),
        ({"buffer": pack([1.0], b"", count=200)}, "codebook cut short"),
        ({"buffer": pack([1.0, 2.0], bytes(3))}, "too few indices"),
        ({"buffer": pack([1.0, 2.0], bytes(5))}, "too many indices"),
        ({"buffer": pack([1.0, 2.0], bytes([0, 1, 2, 0]))}, "an index beyond the codebook"),
        ({"size": [2, 3]}, "another size"),
        ({"size": [-1, 4]}, "a size to be guessed"),
        ({"size": [-2, -2]}, "negative sizes"),
        ({"size": [2**40, 2**40]}, "a size beyond memory"),
        ({"dtype": ""}, "no type"),
        ({"dtype": "int64"}, "an integer type"),
        ({"dtype": "save"}, "something else that torch has"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_malformed_tensor_is_a_value_error(codec: CompressionBase, changes: dict[str, Any], what: str) -> None:
    good = {
        "buffer": pack([1.0, 2.0], bytes([0, 1, 1, 0])), "size": [4], "dtype": "float32",
        "compression": codec.compression_type,
    }  # fmt: skip
    assert codec.extract(runtime_pb2.Tensor(**good)).tolist() == [1.0, 2.0, 2.0, 1.0]
    with pytest.raises(ValueError):  # noqa: PT011  numpy's own words are fine, as long as the sender can be blamed
        codec.extract(runtime_pb2.Tensor(**{**good, **changes}))


def test_mended_registry_decodes_what_arrives() -> None:
    mend_codecs()
    mend_codecs()
    for codec in STOCK:
        deserialize_torch_tensor(compress(codec, normal(1000)))


@pytest.mark.parametrize(("name", "bytes_per_value"), [("none", 4.0), ("fp16", 2.0), ("8bit", 1.0)])
def test_codec_costs_what_the_config_says(name: str, bytes_per_value: float) -> None:
    tensor = normal(4 * SMALL_TENSOR_ELEMENTS)
    assert len(compress(gradient_codec(name), tensor).buffer) / tensor.numel() == pytest.approx(
        bytes_per_value, rel=0.01
    )


def test_small_tensors_stay_in_16_bits() -> None:
    tensor = normal(SMALL_TENSOR_ELEMENTS - 1)
    assert compress(gradient_codec("8bit"), tensor).compression == runtime_pb2.FLOAT16
