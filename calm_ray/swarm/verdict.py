"""How a round ended, as one peer saw it. Pure."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

Outcome = Literal[
    "averaged", "alone", "only_clients", "timeout", "non_finite", "partial", "zero_weight", "failed"
]  # fmt: skip

SLOW = "slow: "
"""How the reason begins with which somebody was left out who may be sound, and only late."""


@dataclass(frozen=True, kw_only=True)
class RoundResult:
    """What one peer got out of one round. `average` is there if, and only if, the round is true."""

    outcome: Outcome
    detail: str = ""
    """A few words on why, for the log and the status line."""
    average: torch.Tensor | None = None
    """Flat fp32, the same bits on every member."""
    digest: str = ""
    """SHA-256 (hex) of `average` as little-endian fp32."""
    group_size: int = 0
    num_senders: int = 0
    weights: Mapping[str, float] = field(default_factory=dict)
    """Peer id -> weight that this peer itself received as a reducer, or was told of by its reducers."""
    total_weight: float = 0.0
    banned: Mapping[str, str] = field(default_factory=dict)
    """Peer id -> why its contribution was not, or not wholly, counted."""
    missing_fraction: float = 0.0
    """Share of the vector whose average never came."""
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    residual: torch.Tensor | None = None
    """What lossy compression left out of our own contribution, times its weight: to be added to the next one."""

    @property
    def is_true(self) -> bool:
        return self.outcome == "averaged" and self.average is not None


def digest_of(vector: torch.Tensor) -> str:
    """SHA-256 (hex) of a flat fp32 vector, little-endian as all machines we run on."""
    return hashlib.sha256(vector.contiguous().numpy().tobytes()).hexdigest()
