"""What each machine computes with: CALM's table, and the user's word above it."""

import pytest
import torch

from calm_ray.config import PeerTable
from calm_ray.errors import ConfigError
from calm_ray.training.compute import GIB, DeviceDescription, choose_compute, describe_device


def gpu(capability: tuple[int, int], gib: float) -> DeviceDescription:
    return DeviceDescription(kind="cuda", name="cuda:0", capability=capability, memory_bytes=int(gib * GIB))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (gpu((9, 0), 80), ("bf16", 8, False)),
        (gpu((8, 6), 8), ("bf16", 2, False)),
        (gpu((7, 5), 15), ("fp16", 4, False)),
        (gpu((6, 1), 8), ("fp16", 2, False)),
        (gpu((6, 1), 6), ("fp16", 1, True)),
        (gpu((5, 2), 12), ("fp32", 1, False)),
        (gpu((5, 2), 4), ("fp16", 1, True)),
        (DeviceDescription(kind="cpu", name="cpu"), ("fp32", 2, False)),
    ],
)
def test_compute_follows_the_table_at_512_tokens(device: DeviceDescription, expected: tuple[str, int, bool]) -> None:
    compute = choose_compute(device, peer=PeerTable(), sequence_length=512)
    assert (compute.precision, compute.micro_batch_size, compute.gradient_checkpointing) == expected


def test_compute_takes_more_samples_when_sequences_are_short() -> None:
    assert choose_compute(gpu((7, 5), 15), peer=PeerTable(), sequence_length=128).micro_batch_size == 16
    assert choose_compute(gpu((9, 0), 80), peer=PeerTable(), sequence_length=16).micro_batch_size == 64


def test_compute_obeys_the_user() -> None:
    peer = PeerTable(precision="fp32", micro_batch_size=3, gradient_checkpointing=True)
    compute = choose_compute(gpu((9, 0), 80), peer=peer, sequence_length=128)
    assert (compute.precision, compute.micro_batch_size, compute.gradient_checkpointing) == ("fp32", 3, True)


def test_compute_when_precision_is_impossible_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match='not in "fp16"; set precision = "auto"'):
        choose_compute(DeviceDescription(kind="cpu", name="cpu"), peer=PeerTable(precision="fp16"), sequence_length=64)
    with pytest.raises(ConfigError, match='too old for "bf16"'):
        choose_compute(gpu((7, 5), 15), peer=PeerTable(precision="bf16"), sequence_length=64)


def test_describe_device_cpu_is_always_there() -> None:
    assert describe_device("cpu") == DeviceDescription(kind="cpu", name="cpu")


def test_describe_device_when_gpu_is_missing_names_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"'cuda:99' is not there.*device = \"auto\""):
        describe_device("cuda:99")


def test_autocast_bf16_computes_in_bf16_and_fp32_does_not() -> None:
    cpu = DeviceDescription(kind="cpu", name="cpu")
    matrix = torch.ones(4, 4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        peer = PeerTable.model_validate({"precision": precision})
        with choose_compute(cpu, peer=peer, sequence_length=64).autocast():
            assert (matrix @ matrix).dtype == dtype
