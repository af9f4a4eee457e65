"""How a job begins: the same command goes on with what is there, and what is there is never lost without a word."""

from pathlib import Path

import pytest

from calm_ray.config import RunTable, load_config
from calm_ray.errors import ConfigError
from calm_ray.peers.status import PeerStatus
from launchers.begin import Found, Start, Way, choose, differences, in_words
from tests.integration.runs import write_config

CODE = "c0de"


@pytest.fixture
def run(tmp_path: Path) -> RunTable:
    return load_config(write_config(tmp_path / "run.toml", num_epochs=40)).run


def other(run: RunTable, **values: object) -> RunTable:
    return run.model_copy(update=values)


def alive(run: RunTable, *, code_hash: str = CODE) -> dict[str, PeerStatus]:
    status = PeerStatus(role="auxiliary", pid=7, config_hash=run.config_hash(), code_hash=code_hash)
    return {"auxiliary-0": status}


def go(found: Found, *, run: RunTable, start: Start = "go-on") -> Way:
    return choose(found, run=run, code_hash=CODE, start=start)


def test_empty_folder_begins_a_run(run: RunTable) -> None:
    assert go(Found(), run=run) == "new"


def test_run_that_has_reached_nothing_keeps_key_bundle_and_invite(run: RunTable) -> None:
    assert go(Found(run=run), run=run) == "again"
    assert go(Found(run=other(run, num_epochs=3)), run=run) == "new"


def test_peers_that_live_are_adopted_whatever_checkpoint_there_is(run: RunTable) -> None:
    assert go(Found(live=alive(run), run=run), run=run) == "adopt"
    assert go(Found(live=alive(run), run=run, newest_epoch=40), run=run, start="resume") == "adopt"


def test_without_peers_the_newest_checkpoint_counts(run: RunTable) -> None:
    assert go(Found(run=run, newest_epoch=4), run=run) == "resume"
    assert go(Found(newest_epoch=4), run=run) == "resume"  # prepare looks whether it fits


def test_fresh_start_asks_for_nothing(run: RunTable) -> None:
    found = Found(live=alive(run, code_hash="other"), run=run, newest_epoch=4)
    assert go(found, run=other(run, num_epochs=3), start="fresh") == "new"


def test_resume_with_nothing_to_go_on_from_is_refused(run: RunTable) -> None:
    with pytest.raises(ConfigError, match="nothing to resume"):
        go(Found(run=run), run=run, start="resume")


def test_longer_run_goes_on_and_another_run_only_when_told(run: RunTable) -> None:
    assert go(Found(run=run, newest_epoch=4), run=other(run, num_epochs=60)) == "resume"
    changed = other(run, target_batch_size=7)
    told = r"has changed since epoch 4: target_batch_size was 512, is 7; .*--resume, or begin anew with --fresh"
    with pytest.raises(ConfigError, match=told):
        go(Found(run=run, newest_epoch=4), run=changed)
    assert go(Found(run=run, newest_epoch=4), run=changed, start="resume") == "resume"


@pytest.mark.parametrize("start", ["go-on", "resume"])
def test_peers_of_another_config_or_code_are_not_adopted(run: RunTable, start: Start) -> None:
    found = Found(live=alive(run), run=run)
    told = r"auxiliary-0 \(process 7\) lives, and \[run\] has changed: num_epochs was 40, is 60; .* --down"
    with pytest.raises(ConfigError, match=told):
        go(found, run=other(run, num_epochs=60), start=start)
    with pytest.raises(ConfigError, match="with other code: old, yours is c0de"):
        go(Found(live=alive(run, code_hash="old"), run=run), run=run, start=start)
    with pytest.raises(ConfigError, match="its run bundle is gone"):
        go(Found(live=alive(run)), run=run, start=start)


def test_peer_that_has_not_read_the_run_yet_is_adopted(run: RunTable) -> None:
    starting = PeerStatus(role="auxiliary", pid=7, code_hash=CODE)
    assert go(Found(live={"auxiliary-0": starting}, run=run), run=run) == "adopt"


def test_differences_name_keys_with_dots_and_how_many_more(run: RunTable) -> None:
    changed = other(run, optimizer=run.optimizer.model_copy(update={"learning_rate": 0.5}), num_epochs=3)
    found = differences(run, changed)
    assert found == {"num_epochs": (40, 3), "optimizer.learning_rate": (0.01, 0.5)}
    assert in_words(found) == "num_epochs was 40, is 3, and 1 more"
