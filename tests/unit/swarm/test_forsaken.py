"""Who has fallen silent, and who has left: the one is waited for, the other is not."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from calm_ray.swarm import averaging
from calm_ray.swarm.averaging import OwnAveraging


@pytest.fixture
def wire() -> Any:
    """What `has_company` looks at, without a swarm."""
    found: Any = object.__new__(OwnAveraging)
    found._swarm = SimpleNamespace(peer_id="me")
    found._tracker = SimpleNamespace(records={"me": None, "a": None, "b": None})
    found._roster = SimpleNamespace(holders={})
    found._silent_since = {}
    return found


def test_nobody_is_silent_while_all_are_there(wire: Any) -> None:
    wire._note_silent({"a", "b", "me"})
    assert not wire.is_forsaken


def test_who_leaves_takes_its_record_along_and_is_not_waited_for(wire: Any) -> None:
    wire._note_silent({"a", "b"})
    wire._tracker.records = {"me": None}
    wire._note_silent(set())
    assert not wire.is_forsaken


def test_who_falls_silent_is_waited_for_even_when_its_record_expires(wire: Any) -> None:
    wire._note_silent({"b"})
    assert wire.is_forsaken
    wire._tracker.records = {"me": None}
    wire._note_silent(set())
    assert wire.is_forsaken


def test_who_is_back_is_silent_no_more(wire: Any) -> None:
    wire._note_silent(set())
    wire._note_silent({"a", "b"})
    assert not wire.is_forsaken


def test_nobody_is_waited_for_for_ever(wire: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    wire._note_silent(set())
    wire._tracker.records = {"me": None}
    now += averaging.SOLO_SECONDS - 1
    wire._note_silent(set())
    assert wire.is_forsaken
    now += 2
    wire._note_silent(set())
    assert not wire.is_forsaken
