"""How a job begins, decided from what it finds in its output folder. Pure.

The same command again must go on, whatever died: peers that live are adopted, else the newest checkpoint counts. What
was trained is never left behind without a word: another config is refused, and the difference named.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from calm_ray.config import RunTable
from calm_ray.errors import ConfigError
from calm_ray.peers.status import PeerStatus

Start = Literal["go-on", "resume", "fresh"]
"""What a person asked for. `go-on` says nothing: adopt, resume or begin."""
Way = Literal["adopt", "resume", "again", "new"]
"""`again`: nothing was reached, but key, bundle and invite are there and stay; `new`: an empty folder."""

MAY_GROW = frozenset({"num_epochs"})
"""Of `[run]`: what may change between two lives of a run without being asked about."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is in the output folder."""

    live: Mapping[str, PeerStatus] = field(default_factory=dict)
    """Peers that run there, by name; trainers that are on their way out are not among them."""
    newest_epoch: int = 0
    """Of the checkpoints."""
    run: RunTable | None = None
    """Of the bundle, if there is one that can be read."""


def choose(found: Found, *, run: RunTable, code_hash: str, start: Start) -> Way:
    """ConfigError in one line if what is there and what is asked for do not go together."""
    if start == "fresh":
        return "new"
    differing = differences(found.run, run) if found.run is not None else {}
    if found.live:
        _require_adoptable(found, run=run, code_hash=code_hash)
        return "adopt"
    if found.newest_epoch:
        if start == "go-on" and differing.keys() - MAY_GROW:
            raise ConfigError(
                f"[run] has changed since epoch {found.newest_epoch}: {in_words(differing)}; change it back, "
                "go on with it by --resume, or begin anew with --fresh"
            )
        return "resume"
    if start == "resume":
        raise ConfigError("nothing to resume: no checkpoint, and no peer of an earlier job lives; leave --resume out")
    return "again" if found.run is not None and not differing else "new"


def _require_adoptable(found: Found, *, run: RunTable, code_hash: str) -> None:
    for name, status in found.live.items():
        who = f"{name} (process {status.pid}) lives"
        if found.run is None:
            raise ConfigError(f"{who}, but its run bundle is gone; end it and begin anew with --fresh")
        if status.config_hash not in ("", run.config_hash()):
            told = in_words(differences(found.run, run)) or "another config"
            raise ConfigError(f"{who}, and [run] has changed: {told}; change it back, or end it first with --down")
        if status.code_hash != code_hash:
            raise ConfigError(
                f"{who}, with other code: {status.code_hash}, yours is {code_hash}; run that code, or end it first "
                "with --down"
            )


def differences(before: RunTable, now: RunTable) -> dict[str, tuple[Any, Any]]:
    """Key of `[run]`, with dots -> (before, now), where they differ."""
    old, new = (_flat(table.model_dump(mode="json")) for table in (before, now))
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def in_words(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """The first of them, and how many more."""
    if not differing:
        return ""
    key, (before, now) = next(iter(differing.items()))
    more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
    return f"{key} was {before}, is {now}{more}"


def _flat(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, prefix=f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
