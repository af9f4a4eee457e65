"""Every run that we ship loads, down to the organiser's tables."""

from pathlib import Path

import pytest

from calm_ray.config import load_config
from tests.shards import ROOT

RUNS = sorted((ROOT / "runs").glob("*.toml"))


def test_there_are_runs_to_load() -> None:
    assert "demo.toml" in [path.name for path in RUNS]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_run_loads_under_its_own_name(path: Path) -> None:
    config = load_config(path)
    assert config.run.run_id == path.stem


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_shipped_run_loads_its_organiser_tables(path: Path) -> None:
    from launchers.organiser import load_organiser

    load_organiser(path)


def test_shipped_runs_do_not_share_a_swarm() -> None:
    runs = [load_config(path).run for path in RUNS]
    assert len({run.run_id for run in runs}) == len(runs)
    assert len({run.config_hash() for run in runs}) == len(runs)
