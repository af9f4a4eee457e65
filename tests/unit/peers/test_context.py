"""What every peer tells of itself: what counts as progress, and what a slow or dead DHT may not end."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from calm_ray.config import load_config
from calm_ray.errors import SwarmUnreachable
from calm_ray.peers import context as module
from calm_ray.peers.context import PeerContext, reports_allowance
from calm_ray.peers.spec import PeerSpec
from calm_ray.swarm.node import Swarm
from tests.shards import ROOT


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PeerContext]:
    read_end, write_end = os.pipe()
    swarm = Mock(spec=Swarm, peer_id="Qma")
    swarm.addresses.return_value = []
    entry = SimpleNamespace(
        swarm=swarm, run=load_config(ROOT / "runs" / "demo.toml").run, bundle=tmp_path, is_first=False,
        is_client_mode=True,
    )  # fmt: skip
    monkeypatch.setattr(module, "enter", lambda *_, **__: entry)
    monkeypatch.setattr(module, "Vigil", Mock())
    found = PeerContext(PeerSpec(role="trainer", folder=tmp_path, bundle=tmp_path), status_fd=write_end)
    found.join()
    found._facts = lambda: {"epoch": 3}
    yield found
    found._status_file.close()
    os.close(read_end)


def vigil_of(context: PeerContext) -> Any:
    return context._vigil


def swarm_of(context: PeerContext) -> Any:
    return context.swarm


@pytest.mark.parametrize("trouble", [TimeoutError(), OSError("p2pd"), EOFError(), SwarmUnreachable("stuck")])
def test_clock_that_nobody_tells_in_time_does_not_keep_a_peer_out(context: PeerContext, trouble: Exception) -> None:
    module.Vigil.return_value.check_clock.side_effect = trouble  # type: ignore[attr-defined]
    context.join()


def test_report_that_the_dht_took_is_progress_and_a_lost_one_is_none(context: PeerContext) -> None:
    """A DHT process that hangs looks alive to the operating system, and to everybody else."""
    context.publish()
    assert context._num_reports == 1
    swarm_of(context).publish.side_effect = SwarmUnreachable("the DHT did not answer within 15 s")
    context.publish()
    assert context._num_reports == 1


@pytest.mark.parametrize(
    ("report_seconds", "allowance"), [(0.5, 300.0), (100.0, 300.0), (300.0, 900.0), (3600.0, 10800.0)]
)
def test_peer_that_reports_seldom_is_given_the_time_for_it(report_seconds: float, allowance: float) -> None:
    assert reports_allowance(report_seconds) == allowance


def test_peer_that_leaves_while_it_looks_publishes_nothing_after_its_goodbye(context: PeerContext) -> None:
    vigil_of(context).look.side_effect = context.stop.set
    context._report_for_ever()
    swarm_of(context).publish.assert_not_called()


@pytest.mark.parametrize("trouble", [TimeoutError(), OSError("p2pd"), EOFError()])
def test_look_that_fails_does_not_end_the_reports(context: PeerContext, trouble: Exception) -> None:
    vigil_of(context).look.side_effect = trouble
    swarm_of(context).publish.side_effect = lambda *_, **__: context.stop.set()
    context._report_for_ever()
    swarm_of(context).publish.assert_called_once()
