"""A state that a stranger donates: what the monitor refuses, and that it then asks the next donor."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from calm_ray.errors import StateUnavailable
from calm_ray.peers.monitor import check_state
from calm_ray.swarm.state import TrainingState, download_state

SHAPES = [(3, 2), (2,)]
HONEST = TrainingState(
    donor="honest", epoch=7, optimizer_metadata=[{"type": "tensor"}] * 2 + [{"lr": 0.1}],
    tensors=[torch.zeros(3, 2), torch.zeros(2), torch.zeros(3, 2), torch.tensor(7.0)],
)  # fmt: skip


def _check(state: TrainingState) -> None:
    check_state(state, shapes=SHAPES, swarm_epoch=6)


def test_state_of_the_run_is_accepted() -> None:
    _check(HONEST)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"epoch": 10**8}, "claims epoch 100000000 while the swarm is at 6"),
        ({"tensors": HONEST.tensors[:1]}, "broke off: 1 of 4 tensors"),
        ({"tensors": [torch.zeros(1), *HONEST.tensors[1:]]}, "shapes"),
        ({"tensors": [torch.zeros(3, 2, dtype=torch.int64), *HONEST.tensors[1:]]}, "floating-point"),
        ({"tensors": [torch.full((3, 2), torch.nan), *HONEST.tensors[1:]]}, "NaN"),
        ({"tensors": [*HONEST.tensors[:3], torch.tensor(torch.inf)]}, "NaN or infinite"),
        ({"optimizer_metadata": [*HONEST.optimizer_metadata, {"x": b"\xff"}]}, "JSON"),
    ],
)  # fmt: skip
def test_absurd_state_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        _check(replace(HONEST, **change))


class _FakeSwarm:
    """Donors in the order in which they claim the newest epoch."""

    run_id = "tiny"

    def __init__(self, *states: TrainingState) -> None:
        self._states = {state.donor: state for state in states}

    def donors(self, prefix: str) -> list[str]:
        return list(self._states)

    def call(self, action: Callable[..., Any], *, timeout_seconds: float) -> TrainingState:
        return self._states[action.keywords["donor"]]  # type: ignore[attr-defined]  # a partial


def _download(*states: TrainingState) -> TrainingState:
    swarm: Any = _FakeSwarm(*states)
    return download_state(swarm, min_epoch=6, max_bytes=1 << 20, timeout_seconds=1, check=_check)


def test_donor_that_claims_the_newest_epoch_and_sends_rubbish_is_passed_over() -> None:
    assert _download(replace(HONEST, donor="liar", epoch=10**8), HONEST) is HONEST


def test_liars_alone_are_named_with_what_they_did() -> None:
    with pytest.raises(StateUnavailable, match=r"liar: claims epoch 100000000"):
        _download(replace(HONEST, donor="liar", epoch=10**8))
