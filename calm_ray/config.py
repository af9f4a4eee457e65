"""The run's configuration: TOML written by hand, checked here once, frozen afterwards.

Three tables. `[run]` is shared: every peer of a run has the same one, its hash is compared on joining. `[peer]` belongs
to one machine and is never hashed. `[organiser.*]` never leaves the organiser: its types live with the code that uses
them, and are handed in by the composition root (`launchers/job.py`), so this module does not know them.
"""

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from calm_ray.errors import ConfigError
from calm_ray.tables import AveragingTable, DataTable, ModelTable, OptimizerTable, Table, TokenizerTable


class RunTable(Table):
    """`[run]`: all that the peers of one run must agree on, and all that a volunteer gets."""

    run_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Names the swarm. Lower-case letters, digits and dashes."""

    num_epochs: int = Field(ge=1)
    """The run ends when this epoch is reached."""

    target_batch_size: int = Field(ge=1)
    """Samples that all peers together accumulate for one epoch, which is one global optimizer step."""

    report_seconds: float = Field(default=30.0, ge=0.5, le=300.0)
    """Each peer publishes a report this often, and looks after its line, clock and address as often."""

    wire: Literal["calm-1", "hivemind-1.1"] = "calm-1"
    """How gradients travel. `hivemind-1.1` lets bare `hivemind.Optimizer` peers average with ours in an open run, at
    the price of what `calm-1` adds: equal averages on all peers, digests, repair, groups that do
    not fall apart. Set `compression` to what those peers use; theirs is `none` unless they say."""

    model: ModelTable
    tokenizer: TokenizerTable
    data: DataTable
    optimizer: OptimizerTable
    averaging: AveragingTable = AveragingTable()

    @model_validator(mode="after")
    def _sequence_fits_model(self) -> Self:
        if self.data.sequence_length > self.model.max_position_embeddings:
            raise ValueError(
                f"data.sequence_length {self.data.sequence_length} is longer than "
                f"model.max_position_embeddings {self.model.max_position_embeddings}"
            )
        warmup = self.data.sequence_warmup
        if warmup is not None and warmup.start_length > self.data.sequence_length:
            raise ValueError("data.sequence_warmup.start_length is longer than data.sequence_length")
        return self

    @property
    def report_lifetime_seconds(self) -> float:
        """How long a report counts: four reporting periods, so that a lost one does not make its peer disappear."""
        return max(10.0, 4 * self.report_seconds)

    def canonical_json(self) -> bytes:
        """The table as JSON with sorted keys: what is hashed, signed and put into the bundle."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    def config_hash(self) -> str:
        """Hex SHA-256 of `canonical_json`, the same on every machine."""
        return hashlib.sha256(self.canonical_json()).hexdigest()


class PeerTable(Table):
    """`[peer]`: this machine only. Never hashed, never published."""

    name: str = Field(default="", max_length=32, pattern=r"^[\w .@-]*$")
    """How the run's page thanks you. Empty: anonymous."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    """`auto` takes the first GPU, else the CPU."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the forward and backward pass. `auto`: bf16 where the GPU has it, fp16 on older GPUs, fp32 on a CPU."""

    micro_batch_size: int = Field(default=0, ge=0)
    """Samples per forward pass; 0 chooses by device memory. Lower it when memory runs out."""

    num_threads: int = Field(default=0, ge=0)
    """CPU threads for training; 0 leaves torch's choice."""

    duty_cycle: float = Field(default=1.0, ge=0.05, le=1.0)
    """Share of the time to compute: 0.5 rests after each micro-batch for as long as it has computed (on a CPU, by the
    processor's own count). For heat or noise."""

    gradient_checkpointing: bool = False
    """Less memory for about a third more compute."""

    listen: str = "/ip4/0.0.0.0/tcp/0"
    """Where libp2p listens. Give a fixed port if you open one in a router or firewall."""

    announce: tuple[str, ...] = ()
    """Addresses to tell others, when they differ from what this machine can see of itself."""

    bandwidth_mbps: float | None = Field(default=None, gt=0)
    """Upload of this machine's line in Mbit/s, if you know it; otherwise it is measured while averaging."""

    memory_limit_gb: float | None = Field(default=None, gt=0)
    """Restart the peer when its processes use more than this together. Unset: 90 % of the machine or its container."""

    data_root: str = "."
    """Folder under which the run's `files` sources are found on this machine."""


class Config(Table):
    """A whole config file, as far as a peer may know it."""

    run: RunTable
    peer: PeerTable = PeerTable()


TableT = TypeVar("TableT", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raise ConfigError with file and position if it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except FileNotFoundError:
        near = [str(p) for p in sorted(path.parent.glob("*.toml"))] if path.parent.is_dir() else []
        hint = f"; there is {', '.join(near[:4])}" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; name the TOML file in it") from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot be read: {exc}") from exc
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{path}: not valid TOML: {exc}") from exc


def parse_table(model: type[TableT], values: Mapping[str, Any], *, where: str) -> TableT:
    """Validate `values` as `model`. `where` names file and table in the error, such as "runs/x.toml [run]"."""
    try:
        return model.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(f"{where}: {_describe(exc, model)}") from exc


def load_config(path: Path) -> Config:
    """Read `[run]` and `[peer]`. `[organiser.*]` may be there and is left alone: it is not a peer's business."""
    document = read_toml(path)
    _reject_unknown_tables(document, path)
    if "run" not in document:
        raise ConfigError(f"{path}: the table [run] is missing")
    return Config(
        run=parse_table(RunTable, document["run"], where=f"{path} [run]"),
        peer=parse_table(PeerTable, document.get("peer", {}), where=f"{path} [peer]"),
    )


def load_peer_table(path: Path | None) -> PeerTable:
    """Read only `[peer]`, as a volunteer needs it; without a file, the defaults."""
    if path is None:
        return PeerTable()
    document = read_toml(path)
    _reject_unknown_tables(document, path)
    return parse_table(PeerTable, document.get("peer", {}), where=f"{path} [peer]")


def state_home() -> Path:
    """Where peers keep identities, logs and sockets: $CALM_RAY_HOME, else the user's state folder."""
    if home := os.environ.get("CALM_RAY_HOME"):
        return Path(home)
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return Path(base) / "calm-ray"


def _reject_unknown_tables(document: Mapping[str, Any], path: Path) -> None:
    for name in document:
        if name not in ("run", "peer", "organiser"):
            raise ConfigError(f"{path}: unknown table [{name}]{_suggest(name, ['run', 'peer', 'organiser'])}")


def _describe(exc: ValidationError, model: type[BaseModel]) -> str:
    """One line for the first mistake, with the key's path and what is allowed; the rest only counted."""
    errors = exc.errors(include_url=False)
    # One slip can show up twice. A list whose only item is wrong is also too short. A mistyped key is unknown, and is
    # missing under its right name: the user sees the unknown one in the file.
    errors = [e for e in errors if e["type"] != "too_short" or not any(_lies_below(o, e) for o in errors)]
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys(model, first["loc"][:-1]), n=1)
        meant = (*first["loc"][:-1], *near)
        errors = [e for e in errors if e["type"] != "missing" or e["loc"] != meant]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        text = f"unknown key `{key}`{_suggest(str(first['loc'][-1]), _known_keys(model, first['loc'][:-1]))}"
    elif first["type"] == "missing":
        text = f"`{key}` is missing"
    else:
        message = first["msg"].removeprefix("Value error, ")
        got = first.get("input")
        shown = f", got {got!r}" if isinstance(got, str | int | float | bool) else ""
        text = f"`{key}`: {message}{shown}" if key else message
    return text + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _lies_below(error: ErrorDetails, other: ErrorDetails) -> bool:
    return len(error["loc"]) > len(other["loc"]) and error["loc"][: len(other["loc"])] == other["loc"]


def _known_keys(model: Any, loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the table at `loc`, to suggest the one that was meant."""
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _suggest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean `{near[0]}`?" if near else f"; allowed: {', '.join(known)}"
