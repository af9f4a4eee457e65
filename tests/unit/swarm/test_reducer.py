"""The arithmetic of one slice: who counts, what is averaged, and when there is no honest average."""

import math

import numpy as np
import pytest

from calm_ray.swarm.part_codecs import CODECS, BadPart, Vector
from calm_ray.swarm.reducer import Reduction, ReductionFailed

LENGTHS = [4, 4, 2]
ENCODE = CODECS["none"].encode


def reduction(*senders: str, codec: str = "none", carried: list[Vector] | None = None) -> Reduction:
    return Reduction(lengths=LENGTHS, senders=senders, codec=CODECS[codec], max_weight=100.0, carried=carried)


def ones(value: float) -> Vector:
    return np.full(10, value, dtype=np.float32)


def bring(target: Reduction, peer: str, value: float, *, parts: int = 3) -> None:
    for length in LENGTHS[target.delivered_by(peer) : parts]:
        target.add(peer, ENCODE(ones(value)[:length]))


def finish(target: Reduction) -> list[float]:
    """First value of each part that can be finished."""
    found = []
    while target.is_ready:
        found.append(float(target.finish_next()[0]))
    return found


def test_reduction_averages_by_weight_in_whatever_order_parts_come() -> None:
    target = reduction("a", "b", "own")
    target.contribute("own", [ones(10)[:length] for length in LENGTHS], 2.0)
    assert [target.admit("a", 1.0), target.admit("b", 5.0)] == ["", ""]
    assert not target.is_ready and target.awaited() == {"a", "b"}
    bring(target, "b", 4.0)
    bring(target, "a", 0.0, parts=2)
    assert finish(target) == [5.0, 5.0] and target.awaited() == {"a"}
    bring(target, "a", 8.0)
    assert finish(target) == [6.0] and target.is_complete
    assert target.weights() == {"a": 1.0, "b": 5.0, "own": 2.0}


def test_reduction_without_a_banned_sender_divides_by_the_weight_that_came() -> None:
    target = reduction("a", "b")
    target.admit("a", 1.0), target.admit("b", 3.0)
    bring(target, "a", 2.0)
    bring(target, "b", 6.0, parts=1)
    assert finish(target) == [5.0]
    target.ban("b", "silent")
    assert finish(target) == [2.0, 2.0]
    assert target.weights() == {"a": 1.0} and target.banned == {"b": "silent"}


@pytest.mark.parametrize("payload", [b"", ENCODE(ones(1)[:1]), ENCODE(ones(math.nan)[:4]), ENCODE(ones(1e9)[:4])])
def test_reduction_counts_nothing_of_a_bad_part(payload: bytes) -> None:
    target = reduction("a", "b")
    target.admit("a", 1.0), target.admit("b", 1.0)
    bring(target, "a", 2.0)
    with pytest.raises(BadPart):
        target.add("b", payload)
    target.add("b", ENCODE(ones(7)[:4]))  # too late
    assert finish(target) == [2.0, 2.0, 2.0] and "part 0" in target.banned["b"]


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0, 100.1])
def test_reduction_bans_a_sender_of_an_insane_weight(weight: float) -> None:
    target = reduction("a", "b")
    target.admit("a", 1.0)
    assert "weight" in target.admit("b", weight)
    bring(target, "a", 2.0)
    assert finish(target) == [2.0] * 3


def test_reduction_refuses_a_weight_of_who_promised_none() -> None:
    target = reduction("a")
    assert target.admit("stranger", 1.0) == "not a sender of this group"
    assert target.admit("reader", 0.0) == "" and not target.banned


def test_reduction_does_not_wait_for_senders_who_withdrew() -> None:
    target = reduction("a", "b", "c")
    target.admit("a", 1.0), target.admit("b", 0.0), target.admit("c", 0.0)
    bring(target, "a", 3.0)
    assert finish(target) == [3.0] * 3


def test_reduction_of_withdrawn_senders_only_has_no_weight() -> None:
    target = reduction("a", "b")
    target.admit("a", 0.0), target.admit("b", 0.0)
    with pytest.raises(ReductionFailed) as failure:
        target.finish_next()
    assert failure.value.outcome == "zero_weight"


def test_reduction_of_less_than_half_of_the_senders_is_partial() -> None:
    target = reduction("a", "b", "c")
    target.admit("a", 1.0)
    bring(target, "a", 1.0)
    target.ban("b", "silent")
    target.ban("c", "silent")
    assert target.is_ready
    with pytest.raises(ReductionFailed) as failure:
        target.finish_next()
    assert failure.value.outcome == "partial" and "1 of 3" in failure.value.detail


def test_reduction_bans_a_sender_of_more_parts_than_there_are_but_keeps_what_it_brought() -> None:
    target = reduction("a", "b")
    target.admit("a", 1.0), target.admit("b", 1.0)
    bring(target, "a", 1.0)
    bring(target, "b", 3.0)
    with pytest.raises(BadPart, match="more parts"):
        target.add("b", ENCODE(ones(1)[:2]))
    assert finish(target) == [2.0] * 3 and not target.banned


def test_reduction_hands_out_one_encoding_and_uses_it_itself() -> None:
    target = reduction("a", codec="fp16")
    target.admit("a", 3.0)
    for length in LENGTHS:
        target.add("a", CODECS["fp16"].encode(ones(0.1)[:length]))
    decoded = target.finish_next()
    assert decoded.tobytes() == CODECS["fp16"].decode(target.finished[0], 4).tobytes()


def test_reduction_of_the_largest_values_and_weights_stays_finite() -> None:
    target = reduction("a", "b")
    target.admit("a", 100.0), target.admit("b", 1e-30)
    bring(target, "a", 65504.0)
    bring(target, "b", -65504.0)
    assert finish(target) == [65504.0] * 3


def test_reduction_carries_what_8_bits_left_out_into_the_next_average() -> None:
    """Values far below the block's scale round to 0 each time, and still arrive in the long run."""
    values = [np.array([1.0, *[0.001] * 3], dtype=np.float32), np.full(6, 0.001, dtype=np.float32)]
    total, carried = [np.zeros(4), np.zeros(6)], None
    for _ in range(50):
        target = Reduction(lengths=[4, 6], senders=["own"], codec=CODECS["8bit"], max_weight=100.0, carried=carried)
        target.contribute("own", values, 7.0)
        for part in range(2):
            total[part] += target.finish_next()
        carried = target.residual
    assert all(np.abs(got - 50 * value).max() < 1 / 127 for got, value in zip(total, values, strict=True))
