"""The run on a terminal: a live view of a summary, and one plain line for logs and pipes.

Peers chose their names, so everything goes through `Text`, never through rich's markup.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from calm_ray.report import PeerReport, Role, RoundCounts
from calm_ray.summary import RoundSummary, SwarmSummary

MAX_PEERS = 10
"""Rows of the peers' table: all of the view fits into 24 lines."""
_WIDE_COLUMNS = 100
"""From this width on, a row has room to say that a peer is in client mode."""
_WIDEST_COLUMNS = 115
"""And from this on, how its last round ended."""
_OUTCOME_WORDS: Mapping[str, tuple[str, str]] = {
    "averaged": ("averaged", ""),
    "partial": ("partial", "yellow"),
    "alone": ("alone", "yellow"),
    "only_clients": ("only clients", "yellow"),
    "timeout": ("timed out", "yellow"),
    "non_finite": ("not finite", "red"),
    "zero_weight": ("without samples", "yellow"),
    "failed": ("failed", "red"),
}
"""Outcome of a round -> words and style."""
_ROLE_NAMES: Mapping[Role, tuple[str, str]] = {
    "trainer": ("trainer", "trainers"),
    "auxiliary": ("auxiliary peer", "auxiliary peers"),
    "monitor": ("monitor", "monitors"),
}


def render(
    summary: SwarmSummary, *, run_id: str, own_peer_ids: Collection[str] = frozenset(), max_peers: int = MAX_PEERS
) -> RenderableType:
    """A view that fits itself to the console's width, from 70 columns up. `own_peer_ids`: the organiser's peers."""
    return _View(summary, run_id, frozenset(own_peer_ids), max_peers)


def plain_line(summary: SwarmSummary) -> str:
    """One `key=value` line; meant to be printed once for each epoch. A value that is not known is left out."""
    loss, rounds, roles = summary.loss, summary.rounds, summary.peers_by_role
    pairs: list[tuple[str, object]] = [
        ("epoch", f"{summary.epoch}/{summary.num_epochs}"),
        ("samples", f"{summary.samples_accumulated}/{summary.target_batch_size}"),
    ]
    if loss is not None:
        pairs += [("mlm_mean_loss", f"{loss.mlm_mean_loss:.4f}"), ("sop_mean_loss", f"{loss.sop_mean_loss:.4f}")]
        pairs += [("loss_epoch", loss.epoch)]
    pairs += [
        ("samples_per_second", f"{summary.samples_per_second:.1f}"),
        ("trainers", roles["trainer"]),
        ("auxiliary", roles["auxiliary"]),
        ("monitors", roles["monitor"]),
        ("client_mode", summary.num_client_mode),
    ]
    pairs += [(f"rounds_{o}", count) for o, count in rounds.model_dump().items() if count or o == "averaged"]
    if summary.num_resyncs:
        pairs += [("resyncs", summary.num_resyncs)]
    if (last := summary.last_round) is not None:
        pairs += [("round_epoch", last.epoch), ("round_group_size", last.group_size)]
        pairs += [("round_seconds", f"{last.seconds:.1f}"), ("round_bytes_sent", last.bytes_sent)]
        if last.num_other_digests:
            pairs += [("round_other_digests", last.num_other_digests)]
    if summary.seconds_to_end is not None:
        pairs += [("seconds_to_end", f"{summary.seconds_to_end:.0f}")]
    if summary.drops:
        pairs += [("dropped", ",".join(f"{reason}:{count}" for reason, count in sorted(summary.dropped.items())))]
    return " ".join(f"{key}={value}" for key, value in pairs)


def rounds_text(rounds: RoundCounts) -> Text:
    """Rounds by outcome in words: those averaged, and what else there was."""
    counts = rounds.model_dump()
    parts = [
        Text(f"{counts[outcome]:,} {words}", style=style)
        for outcome, (words, style) in _OUTCOME_WORDS.items()
        if counts[outcome] or outcome == "averaged"
    ]
    return Text(", ").join(parts)


@dataclass(frozen=True)
class _View:
    summary: SwarmSummary
    run_id: str
    own_peer_ids: frozenset[str]
    max_peers: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        facts = Table.grid(padding=(0, 2, 0, 0))
        facts.add_column(style="bold", no_wrap=True)
        facts.add_column()
        for label, value in self._facts(bar_width=max(10, options.max_width - 56), is_ascii=options.ascii_only):
            facts.add_row(label, value)
        yield facts
        if self.summary.peers:
            yield Text()
            yield self._peers(width=options.max_width)
            if (num_hidden := len(self.summary.peers) - self.max_peers) > 0:
                yield Text(f"... and {num_hidden} more", style="dim")

    def _facts(self, *, bar_width: int, is_ascii: bool) -> Iterable[tuple[str, Text]]:
        summary, loss = self.summary, self.summary.loss
        share = min(1.0, summary.samples_accumulated / summary.target_batch_size)
        yield "run", Text(f"{self.run_id}, epoch {summary.epoch}/{summary.num_epochs}")
        counted = f" {summary.samples_accumulated:,}/{summary.target_batch_size:,} samples"
        yield "next step", Text.assemble(_bar(share, width=bar_width, is_ascii=is_ascii), counted)
        if loss is not None:
            behind = f"(epoch {loss.epoch}, {_count(loss.num_peers, 'peer', 'peers')})"
            yield "loss", Text(f"MLM {loss.mlm_mean_loss:.4f}   SOP {loss.sop_mean_loss:.4f}   {behind}")
        yield "speed", Text(f"{summary.samples_per_second:,.1f} samples/s; {self._time_left()}")
        yield "peers", Text(", ".join(self._roles()))
        parts = [rounds_text(summary.rounds)]
        if summary.num_resyncs:
            parts.append(Text(_count(summary.num_resyncs, "re-sync", "re-syncs"), style="yellow"))
        yield "rounds", Text(", ").join(parts)
        if summary.last_round is not None:
            yield "last round", _last_round(summary.last_round)
        if summary.drops:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(summary.dropped.items()))
            yield "not believed", Text(f"{_count(len(summary.drops), 'report', 'reports')}: {reasons}", style="yellow")

    def _time_left(self) -> str:
        next_epoch, end = self.summary.seconds_to_next_epoch, self.summary.seconds_to_end
        if next_epoch is None or end is None:
            return "nobody trains"
        return "the run is over" if end == 0 else f"next step in {_duration(next_epoch)}, end in {_duration(end)}"

    def _roles(self) -> Iterable[str]:
        for role, (one, many) in _ROLE_NAMES.items():
            peers = [peer for peer in self.summary.peers if peer.role == role]
            num_own = sum(peer.peer_id in self.own_peer_ids for peer in peers)
            is_split = role == "trainer" and peers and self.own_peer_ids
            split = f" ({_count(len(peers) - num_own, 'volunteer', 'volunteers')}, {num_own} ours)" if is_split else ""
            yield _count(len(peers), one, many) + split
        if self.summary.num_client_mode:
            yield f"{self.summary.num_client_mode} in client mode"

    def _peers(self, *, width: int) -> Table:
        is_wide, is_widest = width >= _WIDE_COLUMNS, width >= _WIDEST_COLUMNS
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        # Names give way, numbers do not: what the other columns need is known, so the name gets the rest.
        name_width = max(6, width - (94 if is_widest else 78 if is_wide else 64))
        table.add_column("peer", no_wrap=True)
        table.add_column("name", no_wrap=True, overflow="ellipsis", max_width=name_width)
        for name in ("role", "state"):
            table.add_column(name, no_wrap=True)
        for name in ("epoch", "samples/s", "contributed"):
            table.add_column(name, no_wrap=True, justify="right")
        if is_widest:
            table.add_column("last round", no_wrap=True)
        for peer in self.summary.peers[: self.max_peers]:
            cells = list(self._cells(peer, is_wide=is_wide))
            table.add_row(*cells, *([_outcome(peer)] if is_widest else []))
        return table

    def _cells(self, peer: PeerReport, *, is_wide: bool) -> Iterable[Text]:
        is_own, is_trainer = peer.peer_id in self.own_peer_ids, peer.role == "trainer"
        yield Text(peer.peer_id[-8:])  # all peer ids begin alike
        yield Text(peer.name or ("(ours)" if is_own else ""), style="dim" if is_own else "")
        yield Text(peer.role)
        yield Text(peer.state + (", client" if is_wide and peer.is_client_mode else ""))
        yield Text(f"{peer.epoch}", style="yellow" if peer.epoch < self.summary.epoch - 1 else "")
        yield Text(f"{peer.samples_per_second:,.1f}" if is_trainer else "")
        yield Text(f"{peer.samples_contributed:,}" if is_trainer else "")


def _outcome(peer: PeerReport) -> Text:
    words, style = _OUTCOME_WORDS[peer.last_round.outcome] if peer.last_round is not None else ("", "")
    return Text(words, style=style)


def _last_round(last: RoundSummary) -> Text:
    text = Text(f"epoch {last.epoch}: {_count(last.group_size, 'peer', 'peers')}, ").append(rounds_text(last.outcomes))
    if last.num_other_digests:
        text.append(f", {_count(last.num_other_digests, 'peer holds', 'peers hold')} another average", style="bold red")
    up, down = _megabytes(last.bytes_sent), _megabytes(last.bytes_received)
    return text.append(f"; {last.seconds:.1f} s, {up} up, {down} down")


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 9.95e6 else f"{num_bytes / 1e6:,.0f} MB"


def _bar(share: float, *, width: int, is_ascii: bool) -> Text:
    num_full = int(share * width)
    full, empty = ("#", "-") if is_ascii else ("█", "░")
    return Text.assemble((full * num_full, "green"), (empty * (width - num_full), "dim"))


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    if seconds < 100 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:,.0f} days"
