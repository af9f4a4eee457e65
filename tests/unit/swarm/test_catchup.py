"""Whose claim of a later epoch is believed."""

import threading
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from calm_ray.errors import StateUnavailable
from calm_ray.swarm import catchup
from calm_ray.swarm.catchup import Catcher
from calm_ray.swarm.doing import Doing

OWN = 7
AVERAGE = torch.ones(3)
STATE = SimpleNamespace(epoch=10**6, donor="someone")


class Swarm:
    """What a peer at epoch OWN sees: epochs in the roster and in the trainers' records."""

    peer_id = "me"

    def __init__(self, *, holders: Mapping[str, int], trainers: Mapping[str, int]) -> None:
        self.holders = {peer: SimpleNamespace(epoch=epoch) for peer, epoch in holders.items()}
        self.records = {peer: SimpleNamespace(epoch=epoch) for peer, epoch in {**trainers, "me": OWN}.items()}
        self.epoch, self.num_elements, self.state_bytes, self.check = OWN, 3, 36, None
        self.disbelieved: list[int] = []
        self.distrusted: list[str] = []
        self.read: list[str] = []
        self.out_of_step: tuple[str, ...] = ()

    def refresh(self, *, timeout_seconds: float) -> Mapping[str, Any]:
        return self.holders

    def disbelieve(self, epoch: int, *, seconds: float) -> None:
        self.disbelieved.append(epoch)

    def distrust(self, peer_id: str) -> None:
        self.distrusted.append(peer_id)

    def fetch_last(self, donor: str, *, epoch: int) -> torch.Tensor:
        self.read.append(donor)
        if donor == "silent":
            raise StateUnavailable("no")
        return AVERAGE if donor != "other" else 2 * AVERAGE


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catchup, "ROSTER_LAG_SECONDS", 0.05)
    monkeypatch.setattr(catchup, "ROSTER_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(catchup, "download_state", lambda *_, **__: STATE)


def find(swarm: Swarm, claimed: int, *, hint: str | None = None) -> Any:
    there: Any = swarm
    catcher = Catcher(there, holder=there, wire=there, tracker=there, roster=there, doing=Doing())
    return catcher.find(claimed, hint=hint, stop=threading.Event())


def test_average_is_read_from_those_who_have_stepped() -> None:
    swarm = Swarm(holders={"a": OWN + 1, "b": OWN + 1}, trainers={"a": OWN + 1, "b": OWN + 1, "c": OWN})
    assert find(swarm, OWN + 1) is AVERAGE


def test_who_told_us_is_asked_first() -> None:
    swarm = Swarm(holders={"a": OWN + 1, "b": OWN + 1, "c": OWN + 1}, trainers={})
    assert find(swarm, OWN + 1, hint="c") is AVERAGE
    assert swarm.read == ["c"]


def test_state_is_loaded_when_most_are_further_or_nobody_has_the_average() -> None:
    assert find(Swarm(holders={"a": OWN + 3, "b": OWN + 3}, trainers={"c": OWN}), OWN + 3) is STATE
    assert find(Swarm(holders={"silent": OWN + 1}, trainers={}), OWN + 1) is STATE


def test_few_who_show_the_same_average_are_believed() -> None:
    """At the start of a run some may take themselves for the whole swarm, and step first."""
    with_us = dict.fromkeys("abcde", OWN)
    swarm = Swarm(holders={"x": OWN + 1, "y": OWN + 1}, trainers=with_us)
    assert find(swarm, OWN + 1) is AVERAGE
    assert sorted(swarm.read) == ["x", "y"]
    disagreeing = Swarm(holders={"x": OWN + 1, "other": OWN + 1}, trainers=with_us)
    assert find(disagreeing, OWN + 1) is None
    assert sorted(disagreeing.read) == ["other", "x"]


@pytest.mark.parametrize("claimed", [OWN + 1, 10**6])
def test_what_one_claims_is_not_believed(claimed: int) -> None:
    """It would be an average, or a state, that it made up."""
    swarm = Swarm(holders={"liar": claimed, "aux": OWN}, trainers={"liar": claimed, "a": OWN, "b": OWN - 1})
    assert find(swarm, claimed, hint="liar") is None
    assert (set(swarm.read) - {"liar"}, swarm.disbelieved, swarm.distrusted) == (set(), [claimed], ["liar"])


def test_claim_far_ahead_takes_more_than_half() -> None:
    holders, trainers = {"liar": OWN + 9, "a": OWN}, {"liar": OWN + 9, "a": OWN}
    assert find(Swarm(holders=holders, trainers=trainers), OWN + 9) is None
    one_ahead = {"b": OWN + 1, "a": OWN}
    assert find(Swarm(holders=one_ahead, trainers=one_ahead), OWN + 1) is AVERAGE


def test_epoch_that_nobody_offers_is_not_waited_for() -> None:
    """Clients may be ahead, and cannot hand over anything."""
    swarm = Swarm(holders={}, trainers={"client": OWN + 1})
    assert find(swarm, OWN + 1) is None
    assert swarm.disbelieved == [OWN + 1]
