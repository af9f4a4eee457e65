"""Reports come from strangers: every lie below was accepted by hivemind's own tracker or monitor examples."""

import dataclasses
import json
import math
from typing import Any

import pytest

from calm_ray.report import (
    MAX_REPORT_BYTES,
    EpochRecord,
    PeerReport,
    ReportRejected,
    RoundCounts,
    SummaryLimits,
    SwarmSummary,
    decode,
    encode,
    summarise,
)

NOW = 1_000_000.0
HASH = "ab" * 32
LIMITS = SummaryLimits(config_hash=HASH, num_epochs=100, target_batch_size=1000)


def last_epoch(epoch: int = 9, **changes: Any) -> EpochRecord:
    values = {"epoch": epoch, "mini_steps": 10, "num_samples": 160, "mlm_loss_sum": 50.0, "sop_loss_sum": 7.0}
    return EpochRecord(**(values | changes))


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


def test_report_encoded_and_decoded_is_the_same() -> None:
    original = report(name="Zoë @home", rounds=RoundCounts(averaged=3, alone=1), last_group_size=4)
    assert decode(encode(original)) == original


def test_report_with_every_field_at_its_bound_fits_into_the_dht() -> None:
    widest = report(
        "z" * 64, boot_id="b" * 36, name="𐐷" * 32, version="1" * 32, config_hash="f" * 64,
        role="auxiliary", state="averaging", epoch=10**9, samples_accumulated=10**9, samples_per_second=1e6 / 3,
        samples_contributed=10**15, last_group_size=4096, published_at=1e11 / 3,
        rounds=RoundCounts(averaged=10**9, partial=10**9, alone=10**9, failed=10**9),
        last_epoch=EpochRecord(
            epoch=10**9, mini_steps=10**7, num_samples=10**9, mlm_loss_sum=1e9 / 3, sop_loss_sum=1e9 / 7
        ),
    )  # fmt: skip
    assert len(encode(widest)) < MAX_REPORT_BYTES / 2


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe{}", b"[" * MAX_REPORT_BYTES, b'{"a":' * 400,
        b"9" * MAX_REPORT_BYTES, b'{"epoch":' + b"9" * 2000 + b"}", b"\x00" * 10, b'{"name":"\\ud800"}', b"{}\n{}",
    ],
    ids=repr,
)  # fmt: skip
def test_decode_of_bytes_that_are_no_report_says_malformed(data: bytes) -> None:
    with pytest.raises(ReportRejected) as caught:
        decode(data)
    assert caught.value.reason == "malformed"
    assert len(str(caught.value)) <= 200


def altered(**changes: Any) -> bytes:
    """An honest report with fields replaced after validation, as a stranger would send it."""
    return json.dumps(json.loads(encode(report())) | changes).encode()


RECORD = json.loads(encode(report()))["last_epoch"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b" " * (MAX_REPORT_BYTES + 1), "oversized"),
        (altered(samples_per_second=math.nan), "non-finite"),
        (altered(published_at=math.inf), "non-finite"),
        (altered().replace(b'"samples_per_second": 10.0', b'"samples_per_second": 1e999'), "non-finite"),
        (altered()[:-1] + b',"epoch":3}', "malformed"),
        (altered(colour="red"), "malformed"),
        (altered(**{"a\nb" * 100: 1}), "malformed"),
        (altered(epoch="10"), "malformed"),
        (altered(epoch=True), "malformed"),
        (altered(epoch=10.0), "malformed"),
        (altered(role="king"), "malformed"),
        (altered(name="[red]x[/red]"), "malformed"),
        (altered(name="line\nbreak"), "malformed"),
        (altered(name="\ud800"), "malformed"),
        (altered(name="right\u202eleft"), "malformed"),
        (altered(peer_id="not base58: 0OIl"), "malformed"),
        (altered(epoch=-1), "epoch-out-of-reach"),
        (altered(epoch=10**300), "epoch-out-of-reach"),
        (altered(samples_per_second=1e30), "impossible-rate"),
        (altered(last_epoch=RECORD | {"mini_steps": 0}), "zero-mini-steps"),
        (altered(last_epoch=RECORD | {"mlm_loss_sum": -1e30}), "absurd-loss"),
    ],
)
def test_decode_of_a_lie_names_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ReportRejected) as caught:
        decode(data)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


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
    hostile = [(f"Qmz{i}", data) for i, data in enumerate([b"[" * 2048, b" " * 2049, altered(published_at=math.nan)])]
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
