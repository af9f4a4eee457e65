"""The run's output folder: what is where, one job at a time, and the run before this one is kept, once."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from calm_ray.errors import ConfigError

KEY, BUNDLE, CHECKPOINTS = "organiser.key", "bundle", "checkpoints"


@contextlib.contextmanager
def claim_output(out: Path) -> Iterator[None]:
    """Give a fresh, locked `out`; what was there becomes `out.previous`, and what was *that* is deleted."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(out.name + ".lock").open("a+")
    except OSError as exc:
        raise ConfigError(f"{out}: {exc.strerror or exc} ({exc.filename}); choose another --out") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{out}: another job is writing there; wait for it, or choose another --out") from None
        if out.exists():
            previous = out.with_name(out.name + ".previous")
            shutil.rmtree(previous, ignore_errors=True)
            out.rename(previous)
        out.mkdir()
        yield
