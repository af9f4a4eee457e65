"""A state that a stranger donates: who is asked first, what the monitor refuses, and that it then asks the next."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.p2p import PeerID

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


def _peer(number: int) -> str:
    return str(PeerID(bytes([0x12, 0x20, number]) + bytes(31)).to_base58())


class _FakeSwarm:
    """Peers by the priority that they publish: their epoch, and one half more for an auxiliary peer."""

    run_id = "tiny"
    peer_id = "us"

    def __init__(self, *offers: tuple[float, TrainingState]) -> None:
        self._offers = offers
        self.asked: list[str] = []

    def get(self, key: str) -> dict[bytes, SimpleNamespace]:
        assert key == "tiny_state_averager.all_averagers"
        return {PeerID.from_base58(s.donor).to_bytes(): SimpleNamespace(value=value) for value, s in self._offers}

    def call(self, action: Callable[..., Any], *, timeout_seconds: float) -> TrainingState:
        donor = str(action.keywords["donor"])  # type: ignore[attr-defined]  # a partial
        self.asked.append(donor)
        return next(state for _, state in self._offers if state.donor == donor)


HONEST_PEER, LIAR = _peer(1), _peer(2)
OFFER = (7.0, replace(HONEST, donor=HONEST_PEER))
LIE = (1e8, replace(HONEST, donor=LIAR, epoch=10**8))


def _download(swarm: Any) -> TrainingState:
    return download_state(swarm, min_epoch=6, max_bytes=1 << 20, timeout_seconds=1, check=_check)


def test_auxiliary_peer_is_asked_before_trainers_of_its_epoch() -> None:
    trainers = [(7.0, replace(HONEST, donor=_peer(number))) for number in range(3, 9)]
    swarm = _FakeSwarm(*trainers[:3], (7.5, replace(HONEST, donor=_peer(9))), *trainers[3:])
    assert _download(swarm).donor == _peer(9)
    assert swarm.asked == [_peer(9)]


def test_trainer_with_a_newer_epoch_is_asked_before_an_auxiliary_peer() -> None:
    swarm = _FakeSwarm((6.5, replace(HONEST, donor=_peer(9), epoch=6)), OFFER)
    assert _download(swarm).donor == HONEST_PEER


def test_donor_that_claims_the_newest_epoch_and_sends_rubbish_is_passed_over() -> None:
    swarm = _FakeSwarm(LIE, OFFER)
    assert _download(swarm).donor == HONEST_PEER
    assert swarm.asked == [LIAR, HONEST_PEER]


def test_liars_alone_are_named_with_what_they_did() -> None:
    with pytest.raises(StateUnavailable, match=f"{LIAR}: claims epoch 100000000"):
        _download(_FakeSwarm(LIE))
