"""One micro-batch of examples, as tensors: the noun that data, model and loop share."""

from dataclasses import dataclass, fields
from typing import Self

import torch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B sequences padded to a common length L. Field names are those of `AlbertForPreTraining.forward`."""

    input_ids: torch.Tensor
    """(B, L) int64, masked."""

    attention_mask: torch.Tensor
    """(B, L) int64: 1 for tokens, 0 for padding."""

    token_type_ids: torch.Tensor
    """(B, L) int64: 0 for the first segment, 1 for the second."""

    labels: torch.Tensor
    """(B, L) int64: the token to predict, -100 where there is none."""

    sentence_order_label: torch.Tensor
    """(B,) int64: 0 if the segments stand in their original order, 1 if they are swapped."""

    @property
    def num_samples(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return type(self)(**moved)
