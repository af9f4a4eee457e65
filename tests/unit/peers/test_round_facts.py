"""Whatever a round brought, the report of it can be published, and says the same as the tally."""

import math
from typing import Any, get_args

from calm_ray.peers.round_facts import round_facts
from calm_ray.report import MAX_LISTED, Outcome, PeerReport, RoundCounts, RoundReport, decode, encode
from calm_ray.swarm import verdict
from calm_ray.swarm.tally import RoundTally
from calm_ray.swarm.verdict import RoundResult

DIGEST = "d" * 64


def published(tally: RoundTally) -> PeerReport:
    """The report as others read it."""
    values: dict[str, Any] = {
        "peer_id": "Qma", "boot_id": "b1", "role": "trainer", "version": "0.1.0", "config_hash": "ab",
        "state": "training", "is_client_mode": False, "epoch": 10, "published_at": 1.0,
    }  # fmt: skip
    return decode(encode(PeerReport(**(values | round_facts(tally)))))


def test_outcomes_of_rounds_are_the_same_words_in_swarm_and_report() -> None:
    assert set(get_args(Outcome)) == set(get_args(verdict.Outcome)) == set(RoundCounts.model_fields)


def test_facts_of_a_peer_without_a_round_are_empty() -> None:
    told = published(RoundTally())
    assert (told.rounds, told.last_round, told.last_group_size) == (RoundCounts(), None, 0)
    assert (told.num_resyncs, told.parameter_norm, told.samples_contributed) == (0, None, 0)


def test_facts_of_a_true_round_are_what_the_tally_holds() -> None:
    tally = RoundTally(num_resyncs=2, parameter_norm=73.25)
    result = RoundResult(
        outcome="averaged", digest=DIGEST, group_size=3, num_senders=2, total_weight=96.0,
        weights={"12D3KooWabcdefghij12345": 64.0, "12D3KooWabcdefghij67891": 32.04}, banned={"Qmz": "slow"},
        bytes_sent=1000, bytes_received=2000, seconds=1.23456,
    )  # fmt: skip
    tally.note(9, result, num_samples=64, is_counted=True)
    told = published(tally)
    assert told.last_round == RoundReport(
        epoch=9, outcome="averaged", digest=DIGEST, group_size=3, total_weight=96.0,
        weights={"fghij12345": 64.0, "fghij67891": 32.0}, num_banned=1, seconds=1.235, bytes_sent=1000,
        bytes_received=2000,
    )  # fmt: skip
    assert (told.rounds, told.samples_contributed) == (RoundCounts(averaged=1), 64)
    assert (told.num_resyncs, told.parameter_norm, told.last_group_size) == (2, 73.25, 3)


def test_facts_of_each_outcome_are_counted_by_cause() -> None:
    tally = RoundTally()
    for outcome in get_args(verdict.Outcome):
        tally.note(1, RoundResult(outcome=outcome), num_samples=0, is_counted=False)
    assert set(published(tally).rounds.model_dump().values()) == {1}


def test_facts_of_absurd_numbers_are_held_to_the_reports_bounds() -> None:
    tally = RoundTally(samples_averaged=10**30, num_resyncs=10**30, parameter_norm=math.nan)
    tally.by_outcome["failed"] = 10**30
    weights = {"Qma": math.nan, "Qmb": 1e300, "Qmc": -1.0, "Qmd": math.inf}
    result = RoundResult(
        outcome="failed", group_size=10**9, total_weight=math.inf, weights=weights, seconds=1e300,
        bytes_sent=10**40, bytes_received=10**40,
    )  # fmt: skip
    tally.note(10**30, result, num_samples=1, is_counted=True)
    told = published(tally.__class__(**{**vars(tally), "last_epoch": 10**30}))
    assert told.last_round is not None
    assert told.last_round.weights == {"Qma": 0.0, "Qmb": 1e6, "Qmc": 0.0, "Qmd": 0.0}
    assert told.parameter_norm is None


def result_of(peers: list[str], *, digest: str) -> RoundTally:
    tally = RoundTally()
    weights = dict.fromkeys(peers, 1.0)
    tally.note(1, RoundResult(outcome="averaged", digest=digest, weights=weights), num_samples=1, is_counted=True)
    return tally


def test_facts_of_a_large_group_list_the_same_members_for_all_and_others_each_round() -> None:
    peers = [f"12D3KooW{n:010b}".replace("0", "a") for n in range(200)]
    listed = [published(result_of(order, digest=DIGEST)).last_round for order in (peers, peers[::-1])]
    assert listed[0] == listed[1]
    seen: set[str] = set()
    for n in range(30):
        last = published(result_of(peers, digest=f"{n:064x}")).last_round
        assert last is not None
        assert len(last.weights) == MAX_LISTED
        seen |= set(last.weights)
    assert len(seen) == 200
