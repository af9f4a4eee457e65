"""Eight bits on the wire: what stock hivemind does with numpy 2.4, what we do, and what a NaN can and cannot reach.

Rounds are real ones, two averagers on two DHT nodes, in a process of their own: hivemind forks.
"""

import json
import math
import struct
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
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
from calm_ray.swarm.rounds import RoundTally, StepRules, SwarmOptimizer
from calm_ray.tables import OptimizerTable
from calm_ray.training.optim import clip_gradient_, make_optimizer, make_schedule
from tests.eventually import Children

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


# --- whole rounds ----------------------------------------------------------------------------------------------------

ROUNDS = """
import json, sys
import hivemind, torch
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import NoCompression
from hivemind.compression.quantization import Uniform8BitQuantization
from calm_ray.swarm.averagers import _TruthfulRounds
from calm_ray.swarm.codecs import Uniform8Bit, mend_codecs
from calm_ray.swarm.hygiene import bind_children_to_parent

class Truthful(_TruthfulRounds, DecentralizedAverager):
    pass

def average(name, averager_class, codec, first, second):
    averagers = [
        averager_class(
            [tensor.clone()], dht, prefix=name, start=True, compression=codec, target_group_size=2,
            min_matchmaking_time=2.0, request_timeout=1.0, allreduce_timeout=15.0, next_chunk_timeout=5.0,
        )
        for tensor, dht in zip((first, second), dhts)
    ]
    controls = [averager.step(wait=False, timeout=60) for averager in averagers]
    results = [control.result(60) for control in controls]
    found = []
    for averager, result in zip(averagers, results):
        with averager.get_tensors() as (tensor,):
            verdict = getattr(result, "verdict", None)
            found.append({
                "group_size": len(result), "first": float(tensor[0]), "is_finite": bool(torch.isfinite(tensor).all()),
                "verdict": verdict and {"received": verdict.received_fraction, "is_finite": verdict.is_finite,
                                        "is_whole": verdict.is_whole},
            })
    for averager in averagers:
        averager.shutdown()
    return found

bind_children_to_parent()
torch.set_num_threads(1)
boot = hivemind.DHT(start=True)
dhts = [boot, hivemind.DHT(initial_peers=boot.get_visible_maddrs(), start=True)]
ones, threes = torch.ones(20_000), torch.full((20_000,), 3.0)
poison = torch.full((20_000,), float("nan"))
found = {"stock": average("stock", DecentralizedAverager, Uniform8BitQuantization(), ones, threes)}
mend_codecs()
found["ours"] = average("ours", Truthful, Uniform8Bit(), ones, threes)
found["poisoned"] = average("poisoned", Truthful, NoCompression(), ones, poison)
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
for dht in reversed(dhts):
    dht.shutdown()
"""


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[dict[str, Any]]]]:
    folder = tmp_path_factory.mktemp("rounds")
    (folder / "rounds.py").write_text(ROUNDS)
    with Children(folder) as children:
        child = children.start([sys.executable, "-W", "ignore", folder / "rounds.py", folder / "found.json"])
        assert child.wait(100) == 0, child.tail()
        yield json.loads((folder / "found.json").read_text())


@needs_strict_numpy
def test_stock_round_averages_nothing_and_returns_a_full_group(rounds: dict[str, list[dict[str, Any]]]) -> None:
    assert [(r["group_size"], r["first"]) for r in rounds["stock"]] == [(2, 1.0), (2, 3.0)]


def test_our_round_averages_in_8_bits_and_says_so(rounds: dict[str, list[dict[str, Any]]]) -> None:
    for result in rounds["ours"]:
        assert result["group_size"] == 2
        assert result["first"] == pytest.approx(2.0, abs=1e-3)
        assert result["verdict"] == {"received": 1.0, "is_finite": True, "is_whole": True}


def test_nan_of_one_peer_stays_with_that_peer(rounds: dict[str, list[dict[str, Any]]]) -> None:
    """In stock hivemind, one NaN makes the whole group's tensors NaN (facts/hivemind.md 3)."""
    honest, poisoner = rounds["poisoned"]
    assert honest["is_finite"]
    assert honest["first"] == 1.0
    assert not poisoner["is_finite"]
    assert honest["verdict"]["is_finite"] is False
    assert honest["verdict"]["is_whole"] is False


# --- the last guard --------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded() -> tuple[SwarmOptimizer, torch.optim.Optimizer, torch.nn.Parameter]:
    """A real optimizer behind the guard of a SwarmOptimizer that has no swarm."""
    table = OptimizerTable(name="adamw", learning_rate=0.1, decay_epochs=10, max_grad_norm=1.0)
    swarm_optimizer = SwarmOptimizer.__new__(SwarmOptimizer)
    swarm_optimizer._parent_pid = 0  # its destructor is to think that it belongs to another process
    swarm_optimizer.rounds = RoundTally()
    swarm_optimizer._should_skip_step = False
    swarm_optimizer._rules = StepRules(
        make_optimizer=partial(make_optimizer, table=table),
        make_schedule=make_schedule(table),
        before_step=partial(clip_gradient_, max_norm=table.max_grad_norm),
    )
    parameter = torch.nn.Parameter(torch.ones(4))
    return swarm_optimizer, swarm_optimizer._make_guarded_optimizer([{"params": [parameter]}]), parameter


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values()]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gradient_that_is_not_finite_moves_nothing_and_is_counted(guarded: Any, bad: float) -> None:
    swarm_optimizer, optimizer, parameter = guarded
    before = state_of(optimizer)
    parameter.grad = torch.tensor([1.0, bad, 1.0, 1.0])
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4))
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(optimizer), strict=True))
    assert swarm_optimizer.rounds.by_outcome == {"nonfinite": 1}


def test_step_goes_on_after_a_bad_gradient_as_if_it_had_not_been(guarded: Any) -> None:
    _, optimizer, parameter = guarded
    parameter.grad = torch.full((4,), math.nan)
    optimizer.step()
    parameter.grad = torch.full((4,), 5.0)
    optimizer.step()
    assert torch.isfinite(parameter).all()
    assert bool((parameter < 1.0).all())
    assert float(parameter.grad.norm()) == pytest.approx(1.0), "the averaged gradient is clipped, once"


def test_round_that_failed_moves_nobody(guarded: Any) -> None:
    """Stock takes the step all the same, with whatever gradient there is."""
    swarm_optimizer, optimizer, parameter = guarded
    swarm_optimizer._should_skip_step = True
    parameter.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(4))


def test_schedule_may_wrap_the_guarded_step(guarded: Any, tmp_path: Path) -> None:
    """torch's schedulers replace `optimizer.step` by a method of their own; the guard has to stay inside."""
    swarm_optimizer, optimizer, parameter = guarded
    scheduler = swarm_optimizer._rules.make_schedule(optimizer)
    parameter.grad = torch.full((4,), math.nan)
    optimizer.step()
    scheduler.step()
    assert torch.equal(parameter, torch.ones(4))
