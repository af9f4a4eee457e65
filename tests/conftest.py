"""What every test gets: a home of its own, no network, processes that end with it; and the choice of slow tests."""

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.eventually import Children
from tests.shards import ROOT, check_marker, num_shards, parse_shard

# Before anything imports the libraries that read them: tests need no network, and forked tokenizers must not warn.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Started in the background of a script, we ignore SIGINT, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARDS = num_shards((ROOT / "Makefile").read_text(encoding="utf-8"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", metavar="K/N", help=f"of the slow tests, only shard K of N ({SHARDS} in all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Check every slow test's marker, whatever runs now; with `--shard`, leave out the other shards' slow tests."""
    shard_of: dict[pytest.Item, int] = {}
    for item in items:
        markers = list(item.iter_markers("slow"))
        if not markers:
            continue
        try:
            shards = {check_marker(m.args, m.kwargs, of=SHARDS) for m in markers}
        except ValueError as exc:
            raise pytest.UsageError(f"{item.nodeid}: {exc}") from exc
        if len(shards) > 1:
            raise pytest.UsageError(f"{item.nodeid}: in {len(shards)} shards, by its class or module too; keep one")
        shard_of[item] = shards.pop()
    if (text := config.getoption("--shard")) is None:
        return
    try:
        wanted = parse_shard(text, of=SHARDS)
    except ValueError as exc:
        raise pytest.UsageError(f"--shard: {exc}") from exc
    dropped = [item for item, shard in shard_of.items() if shard != wanted]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if shard_of.get(item, wanted) == wanted]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A shard may be empty; a whole suite may not."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and session.config.getoption("--shard") is not None:
        session.exitstatus = pytest.ExitCode.OK


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.needs(root=True, programs=("ip", "tc"))`: skip and say why; a missing program fails in CI."""
    for marker in item.iter_markers("needs"):
        unknown = set(marker.kwargs) - {"root", "programs"}
        if marker.args or unknown:
            raise pytest.UsageError(f"{item.nodeid}: write @pytest.mark.needs(root=True, programs=(...))")
        if marker.kwargs.get("root") and os.geteuid() != 0:
            pytest.skip("needs root (network namespaces)")
        path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        missing = [p for p in marker.kwargs.get("programs", ()) if shutil.which(p, path=path) is None]
        if missing and os.environ.get("CI") == "true":
            pytest.fail(f"missing programs: {', '.join(missing)}; make system-deps", pytrace=False)
        if missing:
            pytest.skip(f"missing programs: {', '.join(missing)}; make system-deps")


@pytest.fixture(autouse=True)
def calm_ray_home(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty $CALM_RAY_HOME. Not under tmp_path: a Unix socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="calm-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("CALM_RAY_HOME", folder)
        yield Path(folder)


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    """Starts processes that are ended, with their process groups, after the test."""
    with Children(tmp_path) as started:
        yield started
