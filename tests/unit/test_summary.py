"""What strangers' reports add up to: every lie below was accepted by hivemind's own tracker or monitor examples."""

import dataclasses
import json
from typing import Any

import pytest

from calm_ray.report import MAX_REPORT_BYTES, EpochRecord, PeerReport, RoundCounts, RoundReport, encode
from calm_ray.summary import SummaryLimits, SwarmSummary, summarise

NOW = 1_000_000.0
HASH = "ab" * 32
LIMITS = SummaryLimits(config_hash=HASH, num_epochs=100, target_batch_size=1000)


def last_epoch(epoch: int = 9, **changes: Any) -> EpochRecord:
    values = {"epoch": epoch, "mini_steps": 10, "num_samples": 160, "mlm_loss_sum": 50.0, "sop_loss_sum": 7.0}
    return EpochRecord(**(values | changes))


def last_round(epoch: int = 9, **changes: Any) -> RoundReport:
    values: dict[str, Any] = {
        "epoch": epoch, "outcome": "averaged", "digest": "d" * 64, "group_size": 3, "total_weight": 900.0,
        "weights": {"Qma": 300.0, "Qmb": 300.0, "Qmc": 300.0}, "seconds": 1.5, "bytes_sent": 4000,
        "bytes_received": 5000,
    }  # fmt: skip
    return RoundReport(**(values | changes))


def report(peer_id: str = "Qma", **changes: Any) -> PeerReport:
    values: dict[str, Any] = {
        "peer_id": peer_id, "boot_id": "b1", "role": "trainer", "version": "0.1.0", "config_hash": HASH,
        "state": "training", "is_client_mode": False, "epoch": 10, "samples_accumulated": 100,
        "samples_per_second": 10.0, "last_epoch": last_epoch(), "published_at": NOW - 5,
    }  # fmt: skip
    return PeerReport(**(values | changes))


def summary_of(*reports: PeerReport, limits: SummaryLimits = LIMITS) -> SwarmSummary:
    return summarise([(r.peer_id, encode(r)) for r in reports], now=NOW, limits=limits)


HONEST = (report("Qma"), report("Qmb"), report("Qmc"))
NAN = encode(report()).replace(b'"samples_per_second":10.0', b'"samples_per_second":NaN')


def test_summary_of_honest_peers_adds_them_up() -> None:
    summary = summary_of(
        report("Qma", samples_accumulated=400, samples_per_second=30.0, rounds=RoundCounts(averaged=2)),
        report("Qmb", samples_accumulated=200, samples_per_second=10.0, is_client_mode=True, samples_contributed=9),
        report("Qmc", role="auxiliary", state="assisting", samples_per_second=0, last_epoch=None),
        report("Qmd", role="monitor", state="watching", epoch=0, samples_per_second=0, last_epoch=None),
    )
    assert (summary.epoch, summary.samples_accumulated, summary.samples_per_second) == (10, 600, 40.0)
    assert summary.seconds_to_next_epoch == pytest.approx(400 / 40)
    assert summary.seconds_to_end == pytest.approx((400 + 89 * 1000) / 40)
    assert summary.peers_by_role == {"trainer": 2, "auxiliary": 1, "monitor": 1}
    assert (summary.num_client_mode, summary.rounds.averaged) == (1, 2)
    assert [peer.peer_id for peer in summary.peers] == ["Qmb", "Qma", "Qmc", "Qmd"]
    assert not summary.drops


def test_summary_loss_is_weighted_by_mini_steps_and_only_of_the_newest_epoch() -> None:
    loss = summary_of(
        report("Qma", last_epoch=last_epoch(9, mini_steps=30, mlm_loss_sum=30 * 5.0, sop_loss_sum=30 * 0.6)),
        report("Qmb", last_epoch=last_epoch(9, mini_steps=10, mlm_loss_sum=10 * 6.0, sop_loss_sum=10 * 0.8)),
        report("Qmc", last_epoch=last_epoch(4, mini_steps=10, mlm_loss_sum=10 * 6.5)),
    ).loss
    assert loss is not None
    assert (loss.epoch, loss.num_peers, loss.mini_steps, loss.num_samples) == (9, 2, 40, 320)
    assert loss.mlm_mean_loss == pytest.approx(5.25)
    assert loss.sop_mean_loss == pytest.approx(0.65)


def test_summary_of_no_reports_divides_by_nothing() -> None:
    summary = summary_of()
    assert (summary.epoch, summary.samples_per_second, summary.peers) == (0, 0.0, ())
    assert (summary.seconds_to_next_epoch, summary.seconds_to_end, summary.loss) == (None, None, None)


@pytest.mark.parametrize("rate", [0.0, 5e-324])
def test_summary_of_a_swarm_that_stands_still_has_no_arrival(rate: float) -> None:
    summary = summary_of(report(samples_per_second=rate))
    assert (summary.seconds_to_next_epoch, summary.seconds_to_end) == (None, None)


def test_summary_of_a_finished_run_has_nothing_left() -> None:
    summary = summary_of(*(report(f"Qm{c}", epoch=100, last_epoch=last_epoch(99)) for c in "abc"))
    assert (summary.epoch, summary.seconds_to_next_epoch, summary.seconds_to_end) == (100, 0.0, 0.0)
    assert summary.loss is not None
    assert summary.loss.epoch == 99


def test_summary_after_the_end_when_trainers_wait_shows_the_last_epoch() -> None:
    waiting = [report(f"Qm{c}", state="waiting", epoch=100, last_epoch=last_epoch(99)) for c in "ab"]
    behind = report("Qmc", role="auxiliary", state="assisting", epoch=99, last_epoch=None)
    summary = summary_of(*waiting, behind)
    assert (summary.epoch, summary.seconds_to_end) == (100, 0.0)


def test_summary_as_json_and_back_is_the_same() -> None:
    honest = [(r.peer_id, encode(r)) for r in HONEST]
    greedy = [
        (r.peer_id, encode(r)) for r in (report(f"Qmy{i}", rounds=RoundCounts(failed=10**9)) for i in range(1, 4))
    ]
    summary = summarise([*honest, *greedy, ("Qmz", b"?")], now=NOW, limits=LIMITS)
    assert SwarmSummary.model_validate(json.loads(summary.model_dump_json())) == summary


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"published_at": NOW - 121}, "stale"),
        ({"published_at": NOW + 11}, "from-the-future"),
        ({"config_hash": "cd" * 32}, "wrong-config"),
        ({"epoch": 101}, "epoch-out-of-reach"),
        ({"epoch": 21}, "epoch-out-of-reach"),
        ({"epoch": 9}, "epoch-out-of-reach"),
        ({"last_round": last_round(12)}, "epoch-out-of-reach"),
        ({"samples_per_second": 20_001.0}, "impossible-rate"),
        ({"last_epoch": last_epoch(mlm_loss_sum=10 * 31.0)}, "absurd-loss"),
        ({"last_epoch": last_epoch(sop_loss_sum=10 * 31.0)}, "absurd-loss"),
    ],
)
def test_summary_with_one_liar_drops_and_counts_it_alone(lie: dict[str, Any], reason: str) -> None:
    summary = summary_of(*HONEST, report("Qmz", **lie))
    assert summary.dropped == {reason: 1}
    assert summary.drops == (("Qmz", reason),)
    assert [peer.peer_id for peer in summary.peers] == ["Qma", "Qmb", "Qmc"]


def test_summary_with_hostile_bytes_counts_each_reason() -> None:
    hostile = [(f"Qmz{i}", data) for i, data in enumerate([b"[" * 2048, b" " * (MAX_REPORT_BYTES + 1), NAN])]
    honest = [(r.peer_id, encode(r)) for r in HONEST]
    summary = summarise([*hostile, *honest], now=NOW, limits=LIMITS)
    assert summary.dropped == {"malformed": 1, "oversized": 1, "non-finite": 1}
    assert len(summary.peers) == 3


def test_summary_when_a_report_names_another_owner_keeps_the_true_one() -> None:
    stolen = encode(report("Qma", samples_contributed=10**9))
    summary = summarise([("Qmz", stolen), *((r.peer_id, encode(r)) for r in HONEST)], now=NOW, limits=LIMITS)
    assert summary.drops == (("Qmz", "wrong-owner"),)
    assert all(peer.samples_contributed == 0 for peer in summary.peers)


def test_summary_when_one_owner_reports_twice_counts_the_newer() -> None:
    older, newer = report(published_at=NOW - 20, samples_per_second=1.0), report(samples_per_second=2.0)
    for pair in ((older, newer), (newer, older)):
        summary = summary_of(*pair)
        assert summary.samples_per_second == 2.0
        assert summary.dropped == {"duplicate-peer": 1}


def test_summary_of_more_reports_than_the_limit_reads_only_so_many() -> None:
    summary = summary_of(*HONEST, limits=dataclasses.replace(LIMITS, max_reports=2))
    assert len(summary.peers) == 2
    assert summary.drops == (("Qmc", "over-limit"),)


@pytest.mark.parametrize("claimed", [0, 11, 20, 10**9])
def test_swarm_epoch_with_one_liar_among_three_stays_with_the_honest(claimed: int) -> None:
    liar = report("Qmz", epoch=claimed, last_epoch=None)
    for honest in (HONEST[:2], HONEST):
        assert summary_of(*honest, liar).epoch == 10


def test_swarm_epoch_of_own_peer_and_one_liar_follows_the_own_peer() -> None:
    limits = dataclasses.replace(LIMITS, own_peer_ids=frozenset({"Qmown"}))
    own = report("Qmown", role="auxiliary", state="assisting", last_epoch=None)
    for claimed in (0, 90):
        assert summary_of(own, report("Qmz", epoch=claimed, last_epoch=None), limits=limits).epoch == 10


def test_swarm_epoch_when_an_own_peer_is_cut_off_follows_the_volunteers() -> None:
    limits = dataclasses.replace(LIMITS, own_peer_ids=frozenset({"Qmown"}))
    summary = summary_of(report("Qmown", epoch=3, last_epoch=None), *HONEST, limits=limits)
    assert summary.epoch == 10
    assert not summary.drops


def test_swarm_epoch_is_not_moved_by_peers_that_still_join() -> None:
    newcomers = [report(f"Qmn{i}", state="joining", epoch=0, last_epoch=None) for i in range(1, 9)]
    assert summary_of(*newcomers, *HONEST).epoch == 10


def test_swarm_rate_with_one_liar_grows_by_at_most_the_stated_ratio() -> None:
    honest = summary_of(*HONEST).samples_per_second
    lied = summary_of(*HONEST, report("Qmz", samples_per_second=20_000.0)).samples_per_second
    assert lied == honest + LIMITS.max_ratio_to_median * 10.0


def test_swarm_rate_with_a_liar_that_claims_almost_nothing_keeps_the_honest_whole() -> None:
    assert summary_of(*HONEST, report("Qmz", samples_per_second=1e-9)).samples_per_second == pytest.approx(30.0)


def test_swarm_samples_with_one_liar_grow_by_at_most_one_epoch() -> None:
    assert summary_of(*HONEST, report("Qmz", samples_accumulated=10**9)).samples_accumulated == 1300


@pytest.mark.parametrize("mean_loss", [0.0, 29.0])
@pytest.mark.parametrize("mini_steps", [1, 10**7])
def test_swarm_loss_with_one_liar_moves_less_than_the_stated_deviation(mean_loss: float, mini_steps: int) -> None:
    lie = last_epoch(mini_steps=mini_steps, mlm_loss_sum=mean_loss * mini_steps, sop_loss_sum=0.0)
    loss = summary_of(*HONEST, report("Qmz", last_epoch=lie)).loss
    assert loss is not None
    assert abs(loss.mlm_mean_loss - 5.0) < LIMITS.max_loss_deviation


def test_swarm_loss_when_a_liar_invents_a_newer_epoch_ignores_it() -> None:
    loss = summary_of(*HONEST, report("Qmz", epoch=15, last_epoch=last_epoch(14, mlm_loss_sum=1.0))).loss
    assert loss is not None
    assert (loss.epoch, loss.num_peers) == (9, 3)


def test_swarm_counts_only_trainers_samples_and_losses() -> None:
    summary = summary_of(*HONEST, report("Qmz", role="auxiliary", state="assisting", samples_per_second=900.0))
    assert summary.samples_per_second == 30.0
    assert summary.loss is not None
    assert summary.loss.num_peers == 3


def test_summary_of_a_full_house_counts_everyone() -> None:
    data = encode(report())
    owners = ["Qm" + f"{i:012b}".replace("0", "a") for i in range(4096)]
    reports = [(owner, data.replace(b'"Qma"', f'"{owner}"'.encode())) for owner in owners]
    assert len(summarise(reports, now=NOW, limits=LIMITS).peers) == 4096


def test_swarm_rounds_are_added_up_by_cause() -> None:
    summary = summary_of(
        report("Qma", rounds=RoundCounts(averaged=10, timeout=2), num_resyncs=1),
        report("Qmb", rounds=RoundCounts(averaged=12, non_finite=1)),
        report("Qmc", role="auxiliary", state="assisting", rounds=RoundCounts(averaged=11), num_resyncs=2),
    )
    assert summary.rounds == RoundCounts(averaged=33, timeout=2, non_finite=1)
    assert summary.num_resyncs == 3


@pytest.mark.parametrize("outcome", list(RoundCounts.model_fields))
def test_swarm_rounds_with_one_liar_grow_by_at_most_the_stated_ratio(outcome: str) -> None:
    honest = [report(f"Qm{c}", rounds=RoundCounts(averaged=100)) for c in "abc"]
    liar = report("Qmz", rounds=RoundCounts(**{outcome: 10**9}), num_resyncs=10**9)
    summary = summary_of(*honest, liar)
    assert getattr(summary.rounds, outcome) <= 300 + LIMITS.max_ratio_to_median * 100
    assert summary.num_resyncs <= LIMITS.max_ratio_to_median * 100


def test_swarm_rounds_of_an_own_peer_that_runs_for_long_are_counted_whole() -> None:
    limits = dataclasses.replace(LIMITS, own_peer_ids=frozenset({"Qmown"}))
    own = report("Qmown", role="auxiliary", state="assisting", last_epoch=None, rounds=RoundCounts(averaged=10**6))
    newcomers = [report(f"Qm{c}", rounds=RoundCounts(averaged=1)) for c in "abc"]
    assert summary_of(own, *newcomers, limits=limits).rounds.averaged == 10**6 + 3


def test_last_round_is_the_one_that_most_speak_of() -> None:
    rounds = [last_round(9, seconds=2.0), last_round(9), last_round(9, outcome="timeout", digest="", group_size=2)]
    summary = summary_of(
        *(report(f"Qm{c}", last_round=r) for c, r in zip("abc", rounds, strict=True)),
        report("Qmd", last_round=last_round(3)), report("Qme", last_round=last_round(11)), report("Qmf"),
    )  # fmt: skip
    last = summary.last_round
    assert last is not None
    assert (last.epoch, last.num_peers, last.outcomes) == (9, 3, RoundCounts(averaged=2, timeout=1))
    assert (last.digest, last.num_other_digests) == ("d" * 64, 0)
    assert (last.group_size, last.seconds, last.bytes_sent, last.bytes_received) == (3, 1.5, 4000, 5000)


def test_last_round_when_a_peer_holds_another_average_says_how_many() -> None:
    reports = [report(f"Qm{c}", last_round=last_round()) for c in "abc"]
    last = summary_of(*reports, report("Qmz", last_round=last_round(digest="e" * 64))).last_round
    assert last is not None
    assert (last.digest, last.num_other_digests) == ("d" * 64, 1)


def test_last_round_of_stock_peers_without_digests_disagrees_about_nothing() -> None:
    reports = [report(f"Qm{c}", last_round=last_round(digest="")) for c in "abc"]
    last = summary_of(*reports).last_round
    assert last is not None
    assert (last.digest, last.num_other_digests) == ("", 0)


def test_last_round_with_one_liar_keeps_the_honest_numbers() -> None:
    reports = [report(f"Qm{c}", last_round=last_round()) for c in "abc"]
    lies = [
        last_round(11), last_round(0), last_round(seconds=1e6, bytes_sent=10**13, group_size=4096),
        last_round(outcome="failed", digest="e" * 64),
    ]  # fmt: skip
    for lie in lies:
        last = summary_of(*reports, report("Qmz", last_round=lie)).last_round
        assert last is not None
        assert (last.epoch, last.digest, last.group_size, last.seconds) == (9, "d" * 64, 3, 1.5)
        assert last.outcomes.averaged >= 3


def test_parameter_norm_is_the_median_peers_in_step() -> None:
    norms = [report(f"Qm{c}", parameter_norm=n) for c, n in zip("abc", (70.0, 71.0, 1e30), strict=True)]
    assert summary_of(*norms, report("Qmd", epoch=8, parameter_norm=5.0, last_epoch=None)).parameter_norm == 71.0
    assert summary_of(*HONEST).parameter_norm is None
