"""What counts as useful in the efficiency benchmark, on journals made by hand."""

from typing import Any

from benchmarks.efficiency_account import TrueRound, account, bare_rounds, our_rounds, stale_samples

NUM_EPOCHS = 3


def _boundary(epoch: int, clock: float, cpu: float = 0.0) -> dict[str, Any]:
    return {"event": "boundary", "epoch": epoch, "clock": clock, "cpu": {"num_samples": cpu}}


def _told(epoch: int, group: str, **changes: Any) -> dict[str, Any]:
    """What one bare trainer says of one round."""
    event = {"event": "bare_round", "epoch": epoch, "group": group, "group_size": 2, "received": 1.0, "num_banned": 0}
    return {**event, "weight": 100.0, "num_samples": 100, **changes}


def _round(epoch: int, digest: str, **changes: Any) -> dict[str, Any]:
    """What one of our trainers says of one round."""
    event = {"event": "round", "epoch": epoch, "is_true": True, "digest": digest, "weights": {"a": 90.0, "b": 70.0}}
    return {**event, **changes}


def _ready(peer_id: str) -> dict[str, Any]:
    return {"event": "ready", "peer_id": peer_id}


def test_bare_round_whole_for_both_trainers_counts() -> None:
    assert bare_rounds([[_told(1, "x")], [_told(1, "x", weight=60.0)]]) == [
        TrueRound(epoch=1, samples={0: 100, 1: 60}, group="x")
    ]


def test_bare_round_that_one_trainer_did_not_receive_whole_is_not_true() -> None:
    assert bare_rounds([[_told(1, "x")], [_told(1, "x", received=0.5)]]) == []


def test_bare_round_with_a_banned_sender_is_not_true() -> None:
    assert bare_rounds([[_told(1, "x", num_banned=1)], [_told(1, "x")]]) == []


def test_bare_round_in_two_groups_is_not_true() -> None:
    assert bare_rounds([[_told(1, "x", group_size=1)], [_told(1, "y", group_size=1)]]) == []


def test_bare_round_that_failed_is_not_true() -> None:
    assert bare_rounds([[{"event": "bare_round", "epoch": 1, "failed": "timeout"}], [_told(1, "x")]]) == []


def test_our_round_that_only_one_trainer_calls_true_does_not_count() -> None:
    assert our_rounds([[_ready("a"), _round(1, "d")], [_ready("b"), _round(1, "d", is_true=False)]]) == []


def test_our_rounds_with_two_digests_do_not_count() -> None:
    assert our_rounds([[_ready("a"), _round(1, "d")], [_ready("b"), _round(1, "other")]]) == []


def test_our_round_without_a_banned_trainer_counts_the_other() -> None:
    told = _round(1, "d", weights={"a": 90.0})
    assert our_rounds([[_ready("a"), told], [_ready("b"), told]]) == [TrueRound(epoch=1, samples={0: 90})]


def test_samples_older_than_one_epoch_are_stale() -> None:
    """Ten samples of epoch 0 wait until the round of epoch 2: the round of epoch 0 took 20 of the 30."""
    micros = [{"event": "micro", "epoch": 0, "num_samples": 10}] * 3
    rounds = [TrueRound(epoch=0, samples={0: 20}), TrueRound(epoch=2, samples={0: 10})]
    assert stale_samples(micros, trainer=0, rounds=rounds) == {2: 10}


def test_samples_of_the_epoch_before_are_not_stale() -> None:
    micros = [{"event": "micro", "epoch": 0, "num_samples": 10}] * 3
    rounds = [TrueRound(epoch=0, samples={0: 20}), TrueRound(epoch=1, samples={0: 10})]
    assert not stale_samples(micros, trainer=0, rounds=rounds)


def test_account_counts_between_the_first_and_the_last_boundary_only() -> None:
    """The round of epoch 0 ends at the first boundary: its samples were computed before the clock started."""
    journal = [
        _boundary(0, 1.0), _boundary(1, 10.0, 50), _boundary(2, 20.0, 150), _boundary(3, 31.0, 260),
        {"event": "end", "loss": 2.0},
    ]  # fmt: skip
    rounds = [TrueRound(epoch=epoch, samples={0: 100, 1: 90}) for epoch in range(NUM_EPOCHS)]
    found = account([journal, journal], num_epochs=NUM_EPOCHS, rounds=rounds)
    assert (found.seconds, found.useful_samples, found.num_true_rounds, found.num_rounds) == (21.0, 380, 2, 2)
    assert found.samples_per_second == 380 / 21
    assert found.cpu[0]["num_samples"] == 210
