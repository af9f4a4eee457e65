"""Tensors on their way into a file: finite, on the CPU, and with memory of their own."""

from collections.abc import Mapping

import torch
from torch import Tensor

from calm_ray.errors import CheckpointRejected


def require_finite(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """One NaN in a gradient makes a whole swarm's parameters NaN: such a state is never kept."""
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        is_finite = torch.isfinite(tensor.detach())
        if not bool(is_finite.all()):
            num_bad = int((~is_finite).sum())
            raise CheckpointRejected(
                f"{where}: {num_bad} of the {tensor.numel()} values of `{name}` are NaN or infinite; "
                "keep the checkpoint before"
            )


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies where needed: safetensors refuses tensors that share memory, and would write all of a view's storage."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        storage = own.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != own.nbytes:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        stored[name] = own
    return stored
