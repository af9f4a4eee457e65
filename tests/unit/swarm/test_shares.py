"""Shares by bandwidth: the slowest line bounds the time, the rest is balanced, and nothing odd comes out."""

import random

import pytest

from calm_ray.swarm.shares import balance, seconds_on_the_wire

MBIT = 1e6 / 8
HOME = [200 * MBIT, 100 * MBIT, 50 * MBIT, 20 * MBIT]
VECTOR = 80e6
"""Bytes of 20 M elements in fp32."""


def of_trainers(bandwidths: list[float | None]) -> list[float]:
    everyone = [True] * len(bandwidths)
    return balance(bandwidths, is_sender=everyone, can_reduce=everyone)


def seconds(shares: list[float], bandwidths: list[float], is_sender: list[bool]) -> float:
    return seconds_on_the_wire(shares, vector_bytes=VECTOR, bandwidths=bandwidths, is_sender=is_sender)


def test_balance_of_four_homes_gives_the_slowest_nothing_to_reduce() -> None:
    shares = of_trainers([*HOME])
    assert shares[3] == 0.0 and sum(shares) == pytest.approx(1.0)
    assert seconds(shares, HOME, [True] * 4) == pytest.approx(32.0)  # its own vector, at 2.5 MB/s
    assert seconds([0.25] * 4, HOME, [True] * 4) == pytest.approx(48.0)
    # The rest is balanced too, (1 + 2 share) / rate being a member's time: a share for 50 Mbit/s would take longer.
    assert shares[:3] == pytest.approx([5 / 6, 1 / 6, 0.0], abs=1e-3)


def test_balance_with_an_auxiliary_peer_gives_it_as_much_as_a_trainer_like_it() -> None:
    bandwidths, is_sender = [*HOME, 200 * MBIT], [True] * 4 + [False]
    shares = balance([*bandwidths], is_sender=is_sender, can_reduce=[True] * 5)
    assert shares == pytest.approx([7 / 15, 1 / 15, 0.0, 0.0, 7 / 15], abs=1e-3)
    assert seconds(shares, bandwidths, is_sender) == pytest.approx(32.0)
    busy = [
        VECTOR * ((1 + 3 * share) if sends else max(4 * share, 1 + 3 * share)) / rate
        for share, rate, sends in zip(shares, bandwidths, is_sender, strict=True)
        if share
    ]
    assert max(busy) == pytest.approx(min(busy), rel=1e-3)


@pytest.mark.parametrize("seed", range(10))
def test_balance_is_never_slower_than_other_splits(seed: int) -> None:
    generator = random.Random(seed)
    count = generator.randint(3, 9)
    bandwidths = [generator.choice([10, 20, 50, 100, 1000]) * MBIT for _ in range(count)]
    is_sender = [True, True, *(generator.random() < 0.7 for _ in range(count - 2))]
    can_reduce = [True, *(generator.random() < 0.8 for _ in range(count - 1))]
    best = seconds(balance([*bandwidths], is_sender=is_sender, can_reduce=can_reduce), bandwidths, is_sender)
    for _ in range(200):
        drawn = [generator.random() ** 3 * can for can in can_reduce]
        split = [share / sum(drawn) for share in drawn]
        assert seconds(split, bandwidths, is_sender) >= best * (1 - 0.02)


def test_balance_of_unknown_bandwidths_takes_their_mean() -> None:
    assert of_trainers([None] * 4) == [0.25] * 4
    shares = of_trainers([100 * MBIT, None, 100 * MBIT, None])
    assert shares == pytest.approx([0.25] * 4, abs=1e-3)


def test_balance_gives_nothing_to_those_that_nobody_can_call() -> None:
    can_reduce = [False, True, True, False]
    shares = balance([1e9, 1e6, 1e6, None], is_sender=[True] * 4, can_reduce=can_reduce)
    assert shares == pytest.approx([0.0, 0.5, 0.5, 0.0], abs=1e-3)
    assert balance([1e6, None], is_sender=[True] * 2, can_reduce=[False] * 2) == [0.0, 0.0]
    assert balance([0.0, 1e6], is_sender=[True] * 2, can_reduce=[True] * 2) == [0.0, 1.0]
    assert balance([], is_sender=[], can_reduce=[]) == []


def test_balance_of_many_uses_the_fastest_and_drops_what_is_not_worth_a_stream() -> None:
    bandwidths: list[float | None] = [float(10 + number) * MBIT for number in range(100)]
    shares = of_trainers(bandwidths)
    assert sum(share > 0 for share in shares) <= 32 and not any(shares[:68])
    assert sum(shares) == pytest.approx(1.0)
    tiny = of_trainers([1000 * MBIT, 1000 * MBIT, 333 * MBIT, 1 * MBIT])
    assert tiny[3] == 0.0


def test_balance_of_two_trainers_goes_by_rate() -> None:
    """One vector goes up and one down in any case: then by rate, for the processors' sake."""
    assert of_trainers([100 * MBIT, 25 * MBIT]) == pytest.approx([0.8, 0.2], abs=1e-3)
