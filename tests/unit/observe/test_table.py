"""What a person reads: the same facts at 80 and 120 columns, and one line for logs. Drawn with rich, not mocked."""

import io
from typing import Any

import pytest
from rich.console import Console

from calm_ray.observe.table import plain_line, render
from calm_ray.report import EpochRecord, PeerReport, RoundCounts, RoundReport, encode
from calm_ray.summary import SummaryLimits, SwarmSummary, summarise

NOW = 1_000_000.0
LIMITS = SummaryLimits(config_hash="ab", num_epochs=125_000, target_batch_size=4096)
OWN = "12D3KooWownownown"


def last_round(**changes: Any) -> RoundReport:
    values: dict[str, Any] = {
        "epoch": 12030, "outcome": "averaged", "digest": "d" * 64, "group_size": 4, "seconds": 7.62,
        "bytes_sent": 36_000_000, "bytes_received": 128_000_000,
    }  # fmt: skip
    return RoundReport(**(values | changes))


def report(peer_id: str, **changes: Any) -> PeerReport:
    record = EpochRecord(epoch=12030, mini_steps=30, num_samples=480, mlm_loss_sum=30 * 2.31, sop_loss_sum=30 * 0.41)
    values: dict[str, Any] = {
        "peer_id": peer_id, "boot_id": "b1", "role": "trainer", "version": "0.1.0", "config_hash": "ab",
        "state": "training", "is_client_mode": False, "epoch": 12031, "samples_accumulated": 612,
        "samples_per_second": 14.25, "samples_contributed": 1_203_311, "last_epoch": record, "published_at": NOW,
        "rounds": RoundCounts(averaged=1200, partial=12, alone=1, failed=3), "last_round": last_round(),
    }  # fmt: skip
    return PeerReport(**(values | changes))


def summary_of(*reports: PeerReport, lies: int = 0) -> SwarmSummary:
    told = [(r.peer_id, encode(r)) for r in reports] + [("z", b"?")] * lies
    return summarise(told, now=NOW, limits=LIMITS)


FULL = summary_of(
    report("12D3KooWaaaaaaaa", name="Zoë @home", is_client_mode=True),
    report("12D3KooWbbbbbbbb", name="中文名字很长很长很长很长很长很长很长很长很长"),
    report(OWN, samples_per_second=300.0),
    report("12D3KooWcccccccc", role="auxiliary", state="assisting", last_epoch=None),
    report(
        "12D3KooWdddddddd", role="monitor", state="watching", last_epoch=None, last_round=None, rounds=RoundCounts()
    ),
    lies=2,
)


def drawn(summary: SwarmSummary, *, width: int, **kwargs: Any) -> str:
    console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True)
    console.print(render(summary, run_id="sahajbert", **kwargs))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_table_at_usual_widths_shows_every_fact_uncut(width: int) -> None:
    text = drawn(FULL, width=width, own_peer_ids={OWN})
    assert all(len(line) <= width for line in text.splitlines())
    unwrapped = " ".join(text.split())
    for fact in (
        "sahajbert, epoch 12031/125000", "1,836/4,096 samples", "MLM 2.3100 SOP 0.4100 (epoch 12030, 3 peers)",
        "328.5 samples/s; next step in 7 s, end in 16 days",
        "3 trainers (2 volunteers, 1 ours), 1 auxiliary peer, 1 monitor, 1 in client mode",
        "4,800 averaged, 48 partial, 4 alone, 12 failed",
        "epoch 12030: 4 peers, 4 averaged; 7.6 s, 36 MB up, 128 MB down", "2 reports: 2 malformed",
        "contributed", "Zoë @home", "aaaaaaaa", "auxiliary assisting", "12031 300.0 1,203,311", "(ours)",
    ):  # fmt: skip
        assert fact in unwrapped


def test_table_at_120_columns_says_who_is_in_client_mode() -> None:
    assert "training, client" in drawn(FULL, width=120)
    assert "training, client" not in drawn(FULL, width=80)


def test_table_at_80_columns_cuts_only_names() -> None:
    lines = drawn(FULL, width=80).splitlines()
    assert [line.count("…") for line in lines if "bbbbbbbb" in line] == [1]
    assert sum(line.count("…") for line in lines) == 1


@pytest.mark.parametrize("width", [20, 40, 1000])
def test_table_at_odd_widths_draws_something(width: int) -> None:
    assert "12031" in drawn(FULL, width=width)


def test_table_of_many_peers_shows_the_first_and_counts_the_rest() -> None:
    digits = "123456789abcdefghijk"
    peers = [report(f"12D3KooW{d * 8}", samples_contributed=1000 - i) for i, d in enumerate(digits)]
    text = drawn(summary_of(*peers), width=80, max_peers=5)
    assert "55555555" in text
    assert "66666666" not in text
    assert "... and 15 more" in text
    assert len(drawn(summary_of(*peers, lies=1), width=80).splitlines()) < 24


EVERY_CAUSE = dict.fromkeys(RoundCounts.model_fields, 45)


def test_table_of_rounds_that_ended_in_every_way_stays_within_a_screen() -> None:
    digits = "123456789abcdefghijk"
    outcomes = [last_round(outcome=outcome, digest="") for outcome in RoundCounts.model_fields]
    peers = [
        report(f"12D3KooW{d * 8}", rounds=RoundCounts(**EVERY_CAUSE), num_resyncs=3, last_round=outcomes[i % 8])
        for i, d in enumerate(digits)
    ]
    text = drawn(summary_of(*peers, lies=1), width=80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert len(text.splitlines()) <= 24
    for fact in (
        "900 averaged, 900 partial, 900 alone, 900 only clients, 900 timed out, 900 not finite, 900 without samples, "
        "900 failed, 60 re-syncs",
        "3 averaged, 3 partial, 3 alone, 3 only clients, 2 timed out, 2 not finite, 2 without samples, 2 failed",
    ):
        assert fact in " ".join(text.split())


def test_table_shows_only_causes_that_occurred() -> None:
    text = drawn(summary_of(report("12D3KooWaaaaaaaa", rounds=RoundCounts(averaged=3))), width=80)
    assert ["rounds", "3", "averaged"] in [line.split() for line in text.splitlines()]
    assert not any(word in text for word in ("partial", "timed out", "failed", "re-sync", "another average"))


def test_table_when_peers_hold_different_averages_says_how_many() -> None:
    peers = [
        report(f"12D3KooW{c * 8}", last_round=last_round(digest=d * 64)) for c, d in zip("abc", "eef", strict=True)
    ]
    assert "3 averaged, 1 peer holds another average" in " ".join(drawn(summary_of(*peers), width=80).split())


def test_table_at_120_columns_shows_how_each_peers_last_round_ended() -> None:
    failed = report("12D3KooWaaaaaaaa", last_round=last_round(outcome="only_clients", digest=""))
    lines = drawn(summary_of(failed, report("12D3KooWbbbbbbbb")), width=120).splitlines()
    assert [line.split()[-2:] for line in lines if "aaaaaaaa" in line] == [["only", "clients"]]
    assert [line.split()[-1] for line in lines if "bbbbbbbb" in line] == ["averaged"]
    assert (
        "only clients\n" not in drawn(summary_of(failed, report("12D3KooWbbbbbbbb")), width=80).split("samples/s")[-1]
    )


def test_table_of_an_empty_swarm_says_that_nobody_trains() -> None:
    text = drawn(summary_of(), width=80)
    assert "nobody trains" in text
    assert "0 trainers" in text
    assert "loss" not in text


def test_table_of_a_finished_run_says_so() -> None:
    assert "the run is over" in drawn(summary_of(report("12D3KooWaaaaaaaa", epoch=125_000)), width=80)


def test_table_for_a_terminal_without_unicode_draws_its_bar_in_ascii() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    Console(width=80, file=file).print(render(FULL, run_id="sahajbert"))
    file.flush()
    assert b"##########----" in file.buffer.getvalue()


def test_plain_line_is_one_line_of_keys_and_values() -> None:
    line = plain_line(FULL)
    pairs = dict(pair.split("=", 1) for pair in line.split(" "))
    assert "\n" not in line
    assert pairs["epoch"] == "12031/125000"
    assert (pairs["mlm_mean_loss"], pairs["sop_mean_loss"], pairs["loss_epoch"]) == ("2.3100", "0.4100", "12030")
    assert (pairs["trainers"], pairs["auxiliary"], pairs["client_mode"]) == ("3", "1", "1")
    assert (pairs["rounds_averaged"], pairs["rounds_failed"]) == ("4800", "12")
    assert "rounds_timeout" not in pairs
    assert (pairs["round_epoch"], pairs["round_group_size"], pairs["round_seconds"]) == ("12030", "4", "7.6")
    assert pairs["round_bytes_sent"] == "36000000"
    assert pairs["dropped"] == "malformed:2"
    assert float(pairs["seconds_to_end"]) > 0


def test_plain_line_of_an_empty_swarm_leaves_out_what_is_not_known() -> None:
    line = plain_line(summary_of())
    assert line.startswith("epoch=0/125000 samples=0/4096 samples_per_second=0.0 trainers=0")
    assert not any(key in line for key in ("loss", "dropped", "seconds_to_end"))
