"""Choose device, precision and micro-batch for one machine. The choice is a pure function of what the device is.

The table is the one of CALM's notebook, for sequences of 512 tokens, with bf16 where fp16 stood if the GPU has it: bf16
needs no loss scaling. Shorter sequences get more samples, for the memory is in the tokens.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

from calm_ray.config import PeerTable
from calm_ray.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]

GIB = 2**30

_TABLE_SEQUENCE_LENGTH = 512
_MAX_MICRO_BATCH = 64
_CPU_MICRO_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class DeviceDescription:
    """What the choice depends upon."""

    kind: Literal["cpu", "cuda", "mps"]
    name: str
    """As torch wants it: "cuda:0"."""

    capability: tuple[int, int] | None = None
    """CUDA compute capability."""

    memory_bytes: int | None = None
    """Of the GPU, all of it."""


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How this machine computes gradients."""

    device: str
    precision: Precision
    micro_batch_size: int
    gradient_checkpointing: bool

    def autocast(self) -> AbstractContextManager:
        """Context of the forward pass. Parameters and gradients stay in 32 bits."""
        if self.precision == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(torch.device(self.device).type, dtype=dtype)


def describe_device(device: str) -> DeviceDescription:
    """Look at the device that `[peer] device` names; `auto` is the first GPU, else the CPU.

    Raise ConfigError if it is not there.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        device = "cuda:0" if has_cuda else "mps" if has_mps else "cpu"
    if device == "cpu":
        return DeviceDescription(kind="cpu", name="cpu")
    if device == "mps":
        if not has_mps:
            raise ConfigError('peer.device: torch finds no Apple GPU ("mps") here; set device = "auto"')
        return DeviceDescription(kind="mps", name="mps")
    index = int(device.partition(":")[2] or 0)
    if not has_cuda or index >= torch.cuda.device_count():
        count = torch.cuda.device_count() if has_cuda else 0
        raise ConfigError(
            f"peer.device: {device!r} is not there, torch {torch.__version__} finds {count} CUDA GPUs; set "
            'device = "auto", or check the driver and that torch was installed with CUDA'
        )
    properties = torch.cuda.get_device_properties(index)
    return DeviceDescription(
        kind="cuda",
        name=f"cuda:{index}",
        capability=(properties.major, properties.minor),
        memory_bytes=properties.total_memory,
    )


def choose_compute(device: DeviceDescription, *, peer: PeerTable, sequence_length: int) -> Compute:
    """Return what `[peer]` asks for, and the table's choice where it says `auto` or 0. Pure.

    Raise ConfigError for a precision that the device cannot compute in.
    """
    precision, micro_batch_size, must_checkpoint = _table(device)
    if peer.precision != "auto":
        _reject_impossible(peer.precision, device)
        precision = peer.precision
    scaled = micro_batch_size * max(1, _TABLE_SEQUENCE_LENGTH // sequence_length)
    return Compute(
        device=device.name,
        precision=precision,
        micro_batch_size=peer.micro_batch_size or min(scaled, _MAX_MICRO_BATCH),
        gradient_checkpointing=peer.gradient_checkpointing or must_checkpoint,
    )


def _table(device: DeviceDescription) -> tuple[Precision, int, bool]:
    """Precision, micro-batch at 512 tokens, gradient checkpointing."""
    if device.kind != "cuda" or device.capability is None:
        return "fp32", _CPU_MICRO_BATCH, False
    memory = device.memory_bytes or 0
    precision: Precision
    if device.capability >= (8, 0):
        precision, micro_batch_size = "bf16", 8
    elif device.capability >= (6, 0):
        precision, micro_batch_size = "fp16", 4
    else:
        precision, micro_batch_size = "fp32", 1
    if memory < 7 * GIB:
        return ("fp16" if precision == "fp32" else precision), 1, True
    if memory < 9 * GIB:
        micro_batch_size = min(2, micro_batch_size)
    return precision, micro_batch_size, False


def _reject_impossible(precision: str, device: DeviceDescription) -> None:
    if precision == "fp16" and device.kind == "cpu":
        raise ConfigError('peer.precision: a CPU trains in "fp32" or "bf16", not in "fp16"; set precision = "auto"')
    if precision == "bf16" and device.kind == "cuda" and (device.capability or (0, 0)) < (8, 0):
        raise ConfigError('peer.precision: this GPU is too old for "bf16"; set precision = "auto"')
