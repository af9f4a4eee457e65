"""Asking the peer in a folder: one of ours, one of another version, one that is none, and nobody."""

import contextlib
import json
import selectors
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from calm_ray.code import code_hash
from calm_ray.errors import CalmRayError
from calm_ray.peers.control import ask
from calm_ray.peers.control_server import ControlServer
from calm_ray.peers.handle import PeerHandle
from calm_ray.peers.spec import PeerSpec
from calm_ray.peers.status import PeerStatus, read_status

OURS = PeerStatus(role="auxiliary", state="assisting", pid=4711, code_hash=code_hash())
OTHER = {
    **OURS.model_dump(mode="json"), "code_hash": "0123456789ab", "mood": "sunny", "warnings": {"disk": "full"},
    "restarts": {"no-such-cause": 1},
}  # fmt: skip


class Watchdog:
    """Answers in a thread as a watchdog does in its loop, with `said`."""

    def __init__(self, said: bytes) -> None:
        self.said, self.num_stops, self.was_held = said, 0, False

    def on_stop(self) -> None:
        self.num_stops += 1


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], Watchdog]]:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with contextlib.ExitStack() as stack:

        def start(said: bytes) -> Watchdog:
            watchdog = Watchdog(said)
            selector = stack.enter_context(selectors.DefaultSelector())
            server = ControlServer(selector, answer=lambda: watchdog.said, on_stop=watchdog.on_stop)
            stack.enter_context(server.listening(tmp_path))
            stop = threading.Event()

            def turn() -> None:
                while not stop.is_set():
                    for key, _ in selector.select(timeout=0.01):
                        key.data()
                    watchdog.was_held |= server.is_held

            thread = threading.Thread(target=turn)
            thread.start()
            stack.callback(thread.join)
            stack.callback(stop.set)
            return watchdog

        yield start


def test_nobody_in_the_folder_answers_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert ask(tmp_path) is None


def test_peer_of_our_version_answers_with_all_that_it_says(
    tmp_path: Path, listening: Callable[[bytes], Watchdog]
) -> None:
    listening(OURS.model_dump_json().encode())
    assert ask(tmp_path) == OURS


def test_peer_of_another_version_is_understood_as_far_as_it_goes_and_can_be_told_to_stop(
    tmp_path: Path, listening: Callable[[bytes], Watchdog]
) -> None:
    watchdog = listening(json.dumps(OTHER).encode())
    status = ask(tmp_path, "stop")
    assert status is not None
    assert status.is_other_version
    assert (status.role, status.state, status.pid, status.code_hash) == ("auxiliary", "assisting", 4711, "0123456789ab")
    assert (status.warnings, status.restarts) == ((), {})
    assert watchdog.num_stops == 1


@pytest.mark.parametrize("said", [b"{", b"[1]", b"7", b'{"role": "king"}', b'{"state": "training"}', b"\xff"])
def test_whoever_is_no_peer_answers_nothing(
    tmp_path: Path, listening: Callable[[bytes], Watchdog], said: bytes
) -> None:
    listening(said)
    assert ask(tmp_path) is None
    with pytest.raises(ValueError, match=r"."):
        read_status(said)


@pytest.mark.parametrize(
    ("said", "role", "difference"),
    [
        (OTHER, "auxiliary", f"code: 0123456789ab, wanted {code_hash()}"),
        (OURS.model_dump(mode="json"), "monitor", "role: auxiliary, wanted monitor"),
    ],
)
def test_peer_that_is_not_ours_is_refused_in_one_line_and_not_held(
    tmp_path: Path, listening: Callable[[bytes], Watchdog], said: dict[str, Any], role: Any, difference: str
) -> None:
    """Held and let go, an orphan would begin its hour anew."""
    watchdog = listening(json.dumps(said).encode())
    with pytest.raises(CalmRayError, match=rf"another peer runs there \(pid 4711\): {difference}$"):
        PeerHandle(PeerSpec(role=role, folder=tmp_path, invite="calm1-x")).start()
    assert not watchdog.was_held
