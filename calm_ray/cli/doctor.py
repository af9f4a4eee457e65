"""`calm-ray doctor`: one line per check, the remedy beneath it, and a last line that says whether to join now."""

import contextlib
import io
import json
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from calm_ray.config import load_peer_table, state_home
from calm_ray.invite import decode_invite
from calm_ray.peers.doctor import Examination, Subject
from calm_ray.peers.doctor_checks import Check, overall, printable, summary

MARKS = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}
NAME_WIDTH, LEFT_WIDTH = 12, 20
LEAST_WIDTH, MOST_WIDTH = 60, 110
COMMAND = "run: "
"""What follows it in a remedy is to be copied, so it gets a line of its own that we do not break."""


def examine(invite_text: str | None, *, config: Path | None, folder: Path | None, as_json: bool) -> int:
    """Print all checks; 0 if none has failed, else 1. ConfigError for an invite or a file that cannot be meant."""
    invite = decode_invite(invite_text) if invite_text is not None else None
    if config is not None and not config.is_file():
        load_peer_table(config)  # says which files there are
    peers = state_home() / "peers"
    folder = (folder or (peers / invite.run_id if invite else peers)).absolute()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            errors="backslashreplace"
        )  # a path or a GPU's name need not be in the terminal's alphabet
    console = Console(stderr=as_json, highlight=False, emoji=False)

    def show(check: Check) -> None:
        if not as_json:
            console.print(render(check, width=console.width), soft_wrap=True)

    with _progress(console) as on_doing:
        subject = Subject(folder=folder, config=config, invite=invite)
        checks = Examination(subject, on_check=show, on_doing=on_doing).run()
    last = summary(checks, has_invite=invite is not None)
    if as_json:
        found = [check.model_dump(mode="json") for check in checks]
        print(json.dumps({"overall": overall(checks), "summary": last, "checks": found}, indent=2))
    else:
        console.print(Text(f"\n{last}", style="bold"), soft_wrap=True)
    return 1 if overall(checks) == "fail" else 0


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """What is being done now, on a line that comes and goes; nothing where nobody looks on."""
    if not console.is_terminal:
        yield lambda text: None
        return
    with console.status("", spinner="line") as status:
        yield lambda text: status.update(Text(f"{text} ..."))


def render(check: Check, *, width: int) -> Text:
    """The lines of one check, for a terminal so wide."""
    width = min(MOST_WIDTH, max(LEAST_WIDTH, width)) - LEFT_WIDTH
    mark, style = MARKS[check.verdict]
    found = _wrap(printable(check.found), width)
    text = Text.assemble((f"{mark:<6}", style), f"{check.name:<{NAME_WIDTH}}  ", found[0])
    told, _, command = printable(check.remedy).partition(COMMAND)
    remedy = _wrap(f"-> {told}{COMMAND.strip() if command else ''}", width - 3) if check.remedy else []
    for number, line in enumerate([*found[1:], *remedy]):
        is_later_line_of_remedy = number > len(found) - 1
        text.append(f"\n{'':{LEFT_WIDTH}}{'   ' if is_later_line_of_remedy else ''}{line}")
    if command:
        text.append(f"\n{command}", style="bold")
    return text


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
