"""What `calm-ray doctor` says: one check is a name, a verdict, what was found, and what to do about it now.

A remedy is one sentence for a volunteer who knows neither libp2p nor hivemind. "warn" never keeps anyone from joining:
whatever does is "fail". There is no "skipped": what cannot be looked at yet, because of another failure, is not listed.
"""

from collections.abc import Sequence
from typing import Literal

from calm_ray.tables import Table

Verdict = Literal["ok", "warn", "fail"]

GB = 2**30
"""As makers of memory and GPUs count."""
REINSTALL = "run the pip line that the organiser gave you again, in this environment"
MAX_WORDS = 300
"""Of an error's text: some libraries print pages."""


class Check(Table):
    """One line of the doctor's."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""
    """What to do now; empty if nothing needs to be done."""


def overall(checks: Sequence[Check]) -> Verdict:
    """The worst of all verdicts."""
    verdicts = {check.verdict for check in checks}
    return "fail" if "fail" in verdicts else "warn" if "warn" in verdicts else "ok"


def summary(checks: Sequence[Check], *, has_invite: bool) -> str:
    """The last line."""
    num_failed = sum(check.verdict == "fail" for check in checks)
    if num_failed:
        return f"{num_failed} {'thing' if num_failed == 1 else 'things'} to mend first"
    num_warnings = sum(check.verdict == "warn" for check in checks)
    more = f", with {num_warnings} {'warning' if num_warnings == 1 else 'warnings'}" if num_warnings else ""
    if has_invite:
        return f"ready to join{more}"
    return f"this machine is ready{more}; next: calm-ray doctor INVITE"


def from_error(name: str, error: BaseException, *, remedy: str = "") -> Check:
    """A failed check out of one of our errors: they say what happened, a semicolon, and what to do."""
    found, _, told = str(error).partition("; ")
    return Check(name=name, verdict="fail", found=found, remedy=told or remedy)


def crashed(name: str, words: str) -> Check:
    """A check that did not come to an end: what it would have found is not known, so it counts as failed."""
    return Check(
        name=name, verdict="fail", found=f"could not be checked: {words}",
        remedy="run `calm-ray doctor` again; if it stays, send the organiser this line",
    )  # fmt: skip


def words_of(error: BaseException) -> str:
    """An exception in one bounded line. Some have no text of their own."""
    text = " ".join(str(error).split())[:MAX_WORDS]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def size(num_bytes: float) -> str:
    """ "7.8 GB", "640 MB" """
    return f"{num_bytes / GB:.1f} GB" if num_bytes >= GB else f"{num_bytes / 2**20:.0f} MB"


def worst(checks: Sequence[Check]) -> Check:
    """The first of those that are worst: several looks that make one line."""
    return next(check for check in checks if check.verdict == overall(checks))


def printable(text: str) -> str:
    """Without what could move a terminal's cursor: some words come from strangers."""
    return "".join(c if c.isprintable() else "?" for c in text)
