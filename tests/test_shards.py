"""Every slow test is in exactly one shard, and CI's choice among the shards is fair."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shards import PACKAGES, ROOT, check_marker, choose, num_shards, parse_shard, shards_in, touched_by

SHARDS = num_shards((ROOT / "Makefile").read_text(encoding="utf-8"))

COLLECT = """
import json, sys, pytest

class Spy:
    def pytest_collection_finish(self, session):
        self.ids = [item.nodeid for item in session.items]

def collect(*args):
    spy = Spy()
    code = pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", "-m", "slow", *args], plugins=[spy])
    assert code in (0, 5), code
    return spy.ids

found = {"all": collect(), **{k: collect("--shard", f"{k}/SHARDS") for k in range(1, SHARDS + 1)}}
print("\\n" + json.dumps(found))
"""


def test_shards_together_hold_every_slow_test_exactly_once() -> None:
    script = COLLECT.replace("SHARDS", str(SHARDS))
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    found: dict[str, list[str]] = json.loads(ran.stdout.splitlines()[-1])
    everything = found.pop("all")
    assert sorted(test for shard in found.values() for test in shard) == sorted(everything)


def test_a_slow_test_without_a_proper_shard_stops_the_collection(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\n@pytest.mark.slow\ndef test_it(): pass\n")
    ran = _pytest(test)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"write @pytest.mark.slow(shard=k) with k from 1 to {SHARDS}" in ran.stderr


def test_a_slow_test_in_two_shards_stops_the_collection(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(
        "import pytest\npytestmark = pytest.mark.slow(shard=1)\n@pytest.mark.slow(shard=2)\ndef test_it(): pass\n"
    )
    ran = _pytest(test)
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    assert "in 2 shards" in ran.stderr


def test_an_empty_shard_is_not_a_failure_and_still_prints_a_closing_line(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\n@pytest.mark.slow(shard=1)\ndef test_it(): pass\n")
    empty = _pytest(test, "-m", "slow", "--shard", f"2/{SHARDS}")
    assert empty.returncode == 0
    assert "1 deselected in" in empty.stdout.splitlines()[-1]
    full = _pytest(test, "-m", "slow", "--shard", f"1/{SHARDS}")
    assert full.returncode == 0
    assert "1 passed" in full.stdout


def test_a_suite_without_any_test_is_a_failure(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text("")
    assert _pytest(test).returncode == pytest.ExitCode.NO_TESTS_COLLECTED


def test_the_table_of_packages_has_every_shard_and_every_package_once() -> None:
    assert sorted(PACKAGES) == list(range(1, SHARDS + 1))
    listed = sorted(package for packages in PACKAGES.values() for package in packages)
    there = [f"calm_ray/{p.parent.name}" for p in ROOT.glob("calm_ray/*/__init__.py")] + ["launchers"]
    assert listed == sorted(there)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/3", "a/b", "1/2/3"])
def test_parse_shard_refuses_what_is_not_there(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a shard; there are 1/2, 2/2"):
        parse_shard(text, of=2)
    assert parse_shard("2/2", of=2) == 2


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((1,), {}), ((), {"shard": 0}), ((), {"shard": 3}), ((), {"shard": "1"}), ((), {"shard": True})],
)
def test_check_marker_refuses_what_names_no_shard(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"write @pytest\.mark\.slow\(shard=k\) with k from 1 to 2"):
        check_marker(args, kwargs, of=2)
    assert check_marker((), {"shard": 2}, of=2) == 2


def test_changed_files_point_at_their_shards() -> None:
    assert touched_by("calm_ray/swarm/rounds.py") == {1}
    assert touched_by("launchers/job.py") == {2}
    assert touched_by("calm_ray/swarmish.py") == set()


def test_shards_in_reads_markers_and_not_strings() -> None:
    source = "pytestmark = [pytest.mark.slow(shard=2)]\n@pytest.mark.slow(shard=1)\ndef f():\n  'mark.slow(shard=3)'"
    assert shards_in(source) == {1, 2}


def test_choice_takes_touched_shards_in_turn_and_without_them_every_filled_one_in_turn() -> None:
    assert [choose({2}, filled={1, 2, 3}, num_commits=n) for n in range(3)] == [2, 2, 2]
    assert [choose({1, 3}, filled={1, 2, 3}, num_commits=n) for n in range(4)] == [1, 3, 1, 3]
    assert [choose(set(), filled={1, 3}, num_commits=n) for n in range(4)] == [1, 3, 1, 3]
    assert choose({2}, filled={1}, num_commits=7) == 1
    assert choose({2}, filled=set(), num_commits=7) is None


def test_command_line_names_a_shard_that_has_tests() -> None:
    command = [sys.executable, "-m", "tests.shards", "choose", "--base", "HEAD"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "" or parse_shard(ran.stdout.strip(), of=SHARDS)


def _pytest(test: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with this project's configuration and conftest on one file outside of it."""
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-c", "pyproject.toml"]
    return subprocess.run([*command, str(test), *args], cwd=ROOT, capture_output=True, text=True)
