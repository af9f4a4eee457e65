"""Which rows of the feed a summary of the swarm is worth. Pure; idempotence is the feed's, by key.

Kind `peer-epoch`: each completed epoch of each boot of each peer, once, as the peer claims it (unverified sums). Kind
`epoch`: one row for each epoch. The feed keeps the first row that it gets, so an epoch's row must wait until its peers
have reported: it is written once no trainer in step is still in that epoch. A trainer that never leaves must not hold
the row for ever, so with `previous` it is written at the latest when a newer epoch completes. Epochs that pass between
two looks have no row; their peers' rows may still be there. Kind `round`: the last gradient round of a peer as it saw
it, with the weights that it received from others; a round and its retry, which end differently, are two rows.
"""

from typing import Any

from calm_ray.observe.feed import FeedRow
from calm_ray.report import IN_STEP_STATES, PeerReport, RoundReport
from calm_ray.summary import EpochLoss, SwarmSummary

PEER_EPOCH, EPOCH, ROUND = "peer-epoch", "epoch", "round"


def rows_of(summary: SwarmSummary, *, previous: SwarmSummary | None = None) -> tuple[FeedRow, ...]:
    """Rows to append now. `previous` is the summary before this one, if there was one."""
    rows = [_peer_row(peer, at=summary.at) for peer in summary.peers if peer.role == "trainer" and peer.last_epoch]
    rows += [_round_row(peer, peer.last_round, at=summary.at) for peer in summary.peers if peer.last_round is not None]
    if summary.loss is not None:
        if previous is not None and previous.loss is not None and previous.loss.epoch < summary.loss.epoch:
            rows.append(_epoch_row(previous, previous.loss))
        if _is_settled(summary, summary.loss):
            rows.append(_epoch_row(summary, summary.loss))
    return tuple(rows)


def _is_settled(summary: SwarmSummary, loss: EpochLoss) -> bool:
    return not any(
        peer.epoch == loss.epoch and peer.role == "trainer" and peer.state in IN_STEP_STATES for peer in summary.peers
    )


def _peer_row(peer: PeerReport, *, at: float) -> FeedRow:
    assert peer.last_epoch is not None
    payload = {
        "peer_id": peer.peer_id,
        "name": peer.name,
        "is_client_mode": peer.is_client_mode,
        "samples_per_second": peer.samples_per_second,
        **peer.last_epoch.model_dump(),
    }
    # `at` is our clock: a peer's own is a claim too.
    return FeedRow(
        kind=PEER_EPOCH, key=f"{peer.last_epoch.epoch}/{peer.peer_id}/{peer.boot_id}", at=at, payload=payload
    )


def _round_row(peer: PeerReport, last: RoundReport, *, at: float) -> FeedRow:
    payload = {"peer_id": peer.peer_id, "role": peer.role, **last.model_dump()}
    return FeedRow(kind=ROUND, key=f"{last.epoch}/{peer.peer_id}/{peer.boot_id}/{last.outcome}", at=at, payload=payload)


def _epoch_row(summary: SwarmSummary, loss: EpochLoss) -> FeedRow:
    payload: dict[str, Any] = {
        **loss.model_dump(),
        "samples_per_second": summary.samples_per_second,
        "peers_by_role": dict(summary.peers_by_role),
        "num_client_mode": summary.num_client_mode,
        "rounds": summary.rounds.model_dump(),
        "num_resyncs": summary.num_resyncs,
        "last_round": summary.last_round.model_dump() if summary.last_round is not None else None,
        "parameter_norm": summary.parameter_norm,
        "dropped": dict(summary.dropped),
    }
    return FeedRow(kind=EPOCH, key=str(loss.epoch), at=summary.at, payload=payload)
