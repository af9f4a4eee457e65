"""Each completed epoch of each peer becomes one row, however often it is seen and however peers come and go."""

from pathlib import Path
from typing import Any

import pytest

from calm_ray.observe.feed import Feed
from calm_ray.observe.ingest import rows_of
from calm_ray.report import MAX_LISTED, EpochRecord, PeerReport, RoundCounts, RoundReport, encode
from calm_ray.summary import SummaryLimits, SwarmSummary, summarise

NOW = 1_000_000.0
LIMITS = SummaryLimits(config_hash="ab", num_epochs=100, target_batch_size=1000)


def report(peer_id: str, *, done: int | None, boot_id: str = "b1", **changes: Any) -> PeerReport:
    """A trainer that has completed epoch `done` and is in the next."""
    values: dict[str, Any] = {
        "peer_id": peer_id, "boot_id": boot_id, "role": "trainer", "version": "0.1.0", "config_hash": "ab",
        "state": "training", "is_client_mode": False, "epoch": 0 if done is None else done + 1,
        "samples_per_second": 10.0, "published_at": NOW,
    }  # fmt: skip
    if done is not None:
        values["last_epoch"] = EpochRecord(epoch=done, mini_steps=10, num_samples=160, mlm_loss_sum=50, sop_loss_sum=7)
    return PeerReport(**(values | changes))


def averaged(epoch: int, **changes: Any) -> RoundReport:
    values: dict[str, Any] = {"epoch": epoch, "outcome": "averaged", "digest": "d" * 64, "weights": {"Qma": 160.0}}
    return RoundReport(**(values | changes))


def summary_of(*reports: PeerReport, now: float = NOW) -> SwarmSummary:
    return summarise([(r.peer_id, encode(r)) for r in reports], now=now, limits=LIMITS)


def keys(summary: SwarmSummary, **kwargs: Any) -> list[str]:
    return [f"{row.kind} {row.key}" for row in rows_of(summary, **kwargs)]


def test_rows_of_a_swarm_that_has_completed_nothing_are_none() -> None:
    assert rows_of(summary_of()) == ()
    assert rows_of(summary_of(report("Qma", done=None))) == ()


def test_rows_of_a_completed_epoch_are_one_per_peer_and_one_for_the_epoch() -> None:
    assert keys(summary_of(report("Qma", done=4), report("Qmb", done=4, boot_id="b2"))) == [
        "peer-epoch 4/Qma/b1", "peer-epoch 4/Qmb/b2", "epoch 4",
    ]  # fmt: skip


def test_row_of_an_epoch_waits_for_those_still_in_it() -> None:
    a, b, late = report("Qma", done=4), report("Qmb", done=4), report("Qmc", done=3)
    assert "epoch 4" not in keys(summary_of(a, b, late))
    assert "epoch 4" in keys(summary_of(a, b, report("Qmc", done=4)))


def test_row_of_an_epoch_does_not_wait_for_a_peer_that_fell_behind_or_left() -> None:
    a, b = report("Qma", done=4), report("Qmb", done=4)
    assert "epoch 4" in keys(summary_of(a, b, report("Qmc", done=1)))
    assert "epoch 4" in keys(summary_of(a, b, report("Qmc", done=3, state="leaving")))


def test_row_of_an_epoch_that_never_settled_is_written_when_the_next_one_completes() -> None:
    stuck = report("Qmc", done=3)
    before = summary_of(report("Qma", done=4), report("Qmb", done=4), stuck)
    after = summary_of(report("Qma", done=5), report("Qmb", done=5), stuck)
    assert keys(after, previous=before) == [
        "peer-epoch 5/Qma/b1", "peer-epoch 5/Qmb/b1", "peer-epoch 3/Qmc/b1", "epoch 4", "epoch 5",
    ]  # fmt: skip
    assert keys(before, previous=before)[-1] != "epoch 4"


def test_row_of_an_epoch_holds_the_swarm_and_what_was_not_believed() -> None:
    reports = [report(f"Qm{c}", done=4) for c in "abc"]
    summary = summarise([*((r.peer_id, encode(r)) for r in reports), ("Qmz", b"?")], now=NOW, limits=LIMITS)
    payload = rows_of(summary)[-1].payload
    assert (payload["epoch"], payload["num_peers"], payload["num_samples"]) == (4, 3, 480)
    assert payload["mlm_mean_loss"] == pytest.approx(5.0)
    assert payload["dropped"] == {"malformed": 1}
    assert payload["peers_by_role"] == {"trainer": 3, "auxiliary": 0, "monitor": 0}


def test_rows_of_what_an_auxiliary_peer_claims_to_have_trained_are_none() -> None:
    assert keys(summary_of(report("Qma", done=4), report("Qmz", done=4, role="auxiliary"))) == [
        "peer-epoch 4/Qma/b1", "epoch 4",
    ]  # fmt: skip


def test_rows_of_a_round_are_one_for_each_peer_that_saw_it_with_the_weights_it_received() -> None:
    summary = summary_of(
        report("Qma", done=None, epoch=5, last_round=averaged(4)),
        report("Qmb", done=None, epoch=5, role="auxiliary", state="assisting", last_round=averaged(4)),
        report("Qmc", done=None, epoch=5),
    )
    assert keys(summary) == ["round 4/Qma/b1/averaged", "round 4/Qmb/b1/averaged"]
    payload = rows_of(summary)[1].payload
    assert (payload["peer_id"], payload["role"], payload["epoch"]) == ("Qmb", "auxiliary", 4)
    assert (payload["outcome"], payload["digest"], payload["weights"]) == ("averaged", "d" * 64, {"Qma": 160.0})


def test_rows_of_a_failed_round_and_of_its_retry_are_two(tmp_path: Path) -> None:
    tries = [averaged(4, outcome="timeout", digest="", weights={}), averaged(4), averaged(4)]
    with Feed(tmp_path / "feed.sqlite") as feed:
        for last in tries:
            feed.append_all(rows_of(summary_of(report("Qma", done=None, epoch=5, last_round=last))))
        assert [event.key for event in feed.events()] == ["4/Qma/b1/timeout", "4/Qma/b1/averaged"]


def test_row_of_an_epoch_says_how_rounds_went() -> None:
    reports = [
        report(f"Qm{c}", done=4, last_round=averaged(4), rounds=RoundCounts(averaged=5, timeout=1), parameter_norm=73.5)
        for c in "abc"
    ]
    payload = rows_of(summary_of(*reports))[-1].payload
    assert (payload["rounds"]["averaged"], payload["rounds"]["timeout"], payload["num_resyncs"]) == (15, 3, 0)
    assert (payload["last_round"]["epoch"], payload["last_round"]["digest"]) == (4, "d" * 64)
    assert payload["parameter_norm"] == 73.5


def test_feed_of_ten_epochs_seen_often_and_across_restarts_has_each_row_once(tmp_path: Path) -> None:
    path = tmp_path / "feed.sqlite"
    for _ in range(3):  # the monitor restarts and sees the last epoch again, later
        for done in range(10):
            with Feed(path) as feed:
                for look in range(3):
                    summary = summary_of(report("Qma", done=done), report("Qmb", done=done), now=NOW + done + look)
                    feed.append_all(rows_of(summary))
    with Feed(path) as feed:
        events = feed.events()
    assert [event.payload["epoch"] for event in events if event.kind == "epoch"] == list(range(10))
    assert len(events) == 30
    assert events[2].at == NOW


@pytest.mark.parametrize(("num_listed", "max_bytes"), [(None, 600), (4, 1500), (16, 1800), (MAX_LISTED, 2900)])
def test_feed_rows_of_a_peer_and_epoch_have_the_stated_size(
    tmp_path: Path, num_listed: int | None, max_bytes: int
) -> None:
    path = tmp_path / "feed.sqlite"
    num_epochs, peers = 10, [f"12D3KooW{i:044d}".replace("0", "x") for i in range(100)]
    weights = {f"{i:010b}".replace("0", "z"): 123.0 for i in range(num_listed or 0)}
    with Feed(path) as feed:
        for done in range(num_epochs):
            last = averaged(done, weights=weights, total_weight=1e5 / 3, seconds=1 / 3, bytes_sent=36_000_000)
            reports = [
                report(p, done=done, boot_id="f" * 32, name="a volunteer at home", epoch=done + 1,
                       samples_per_second=1 / 3, last_round=None if num_listed is None else last) for p in peers
            ]  # fmt: skip
            feed.append_all(rows_of(summary_of(*reports)))
    num_bytes = path.stat().st_size / (num_epochs * len(peers))
    print(f"{num_listed} weights: {num_bytes:.0f} bytes for each peer and epoch")
    assert num_bytes < max_bytes
