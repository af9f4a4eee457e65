"""Which slow tests run together, and which of these parts CI runs for a change.

Every slow test says its shard itself, `@pytest.mark.slow(shard=1)`, so that moving one is a visible change; a shard by
hash of the name was rejected, for it cannot be balanced and cannot follow the code. The number of shards is in the
Makefile and nowhere else. CI has time for one: one of those that the change touches, in turn, else each in its turn.
"""

import argparse
import ast
import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PACKAGES: Mapping[int, tuple[str, ...]] = {
    1: ("calm_ray/swarm", "calm_ray/training", "calm_ray/checkpoint"),
    2: ("calm_ray/actors", "calm_ray/observe", "calm_ray/cli", "launchers"),
    3: ("calm_ray/peers",),
}
"""Shard -> the packages whose slow tests are in it. A change there makes CI run that shard."""

SESSION_SECONDS = 4 * 3600
"""Without a named base, a change is what was committed within this time before HEAD."""


def num_shards(makefile: str) -> int:
    """The line `SHARDS := n` of the Makefile's text."""
    found = re.search(r"^SHARDS := (\d+)$", makefile, re.MULTILINE)
    assert found, "the Makefile has no line `SHARDS := n`"
    return int(found[1])


def parse_shard(text: str, *, of: int) -> int:
    """`"k/n"` -> k. Raises ValueError unless n is `of` and 1 <= k <= n."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[2]) != of or not 1 <= int(found[1]) <= of:
        raise ValueError(f"{text!r} is not a shard; there are {', '.join(f'{k}/{of}' for k in range(1, of + 1))}")
    return int(found[1])


def check_marker(args: tuple[object, ...], kwargs: Mapping[str, object], *, of: int) -> int:
    """The shard that a `slow` marker names. Raises ValueError unless it is `slow(shard=k)` with 1 <= k <= `of`."""
    shard = kwargs.get("shard")
    if args or set(kwargs) != {"shard"} or type(shard) is not int or not 1 <= shard <= of:
        raise ValueError(f"write @pytest.mark.slow(shard=k) with k from 1 to {of}")
    return shard


def shards_in(source: str) -> set[int]:
    """The shards that a test file's markers name."""
    return {
        keyword.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "slow"
        for keyword in node.keywords
        if keyword.arg == "shard" and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, int)
    }


def touched_by(path: str) -> set[int]:
    """The shards of the package that a changed file belongs to."""
    return {shard for shard, packages in PACKAGES.items() if path.startswith(tuple(f"{p}/" for p in packages))}


def choose(touched: Collection[int], *, filled: Collection[int], num_commits: int) -> int | None:
    """A touched shard that holds tests, else any that does; in turn, by the number of commits, so that none starves."""
    candidates = sorted(set(touched) & set(filled)) or sorted(filled)
    return candidates[num_commits % len(candidates)] if candidates else None


def _git(*args: str) -> str:
    return subprocess.run(["git", "-C", ROOT, *args], check=True, capture_output=True, text=True).stdout.strip()


def _changed_files(base: str | None) -> list[str]:
    if base is None:
        since = int(_git("log", "-1", "--format=%ct")) - SESSION_SECONDS
        base = _git("rev-list", "-1", f"--before={since}", "HEAD")
    if not base:
        return []
    return _git("diff", "--name-only", base, "HEAD").splitlines()


def main() -> None:
    """Print the shard to run as `k/n`, or nothing while there is no slow test."""
    parser = argparse.ArgumentParser(prog="python -m tests.shards", description=main.__doc__)
    parser.add_argument("command", choices=["choose"])
    parser.add_argument("--base", help="the commit that the change starts from")
    base = parser.parse_args().base
    named = {
        path.relative_to(ROOT).as_posix(): shards_in(path.read_text(encoding="utf-8"))
        for path in (ROOT / "tests").rglob("*.py")
    }
    touched = set().union(*(named.get(path) or touched_by(path) for path in _changed_files(base)))
    shard = choose(touched, filled=set().union(*named.values()), num_commits=int(_git("rev-list", "--count", "HEAD")))
    if shard is not None:
        print(f"{shard}/{num_shards((ROOT / 'Makefile').read_text(encoding='utf-8'))}")


if __name__ == "__main__":
    main()
