"""Sketches see what matters of millions of parameters: the same bits, a drift in the last ones, another model."""

import math
import struct
import time
from collections.abc import Sequence

import pytest
import torch

from calm_ray.swarm.sketch import (
    NUM_PROJECTIONS,
    TOLERANCE,
    WIRE_BYTES,
    Sketch,
    reference_of,
    relative_distance,
    standing,
)


def vector(seed: int = 0, num_elements: int = 20_000) -> torch.Tensor:
    return torch.randn(num_elements, generator=torch.Generator().manual_seed(seed)) * 0.02


def drifted(by: float, seed: int = 1, base: int = 0) -> Sketch:
    """A sketch of `vector(base)` moved by `by` of its norm in a random direction."""
    start, direction = vector(base), vector(seed)
    return Sketch.of(start + direction * (by * start.norm() / direction.norm()))


SAME = Sketch.of(vector())


def test_sketch_is_what_every_machine_computes() -> None:
    """Integers, so that no rounding hides in it: other sums here mean another seed, hash or order."""
    sketch = Sketch.of((torch.arange(100_000) % 17 - 8).float())
    assert (sketch.num_elements, sketch.projections[:4]) == (100_000, (-161.0, 141.0, -10.0, 31.0))
    assert sketch.norm == pytest.approx(math.sqrt(2_400_055))


def test_sketch_over_several_chunks_is_the_sum_of_its_parts() -> None:
    """Chunks of 2**20 elements are an implementation's matter: projections are linear."""
    a, b = torch.zeros(2_200_000), torch.zeros(2_200_000)
    a[:5], b[-5:] = 1.0, 2.0
    both = Sketch.of(a + b).projections
    parts = zip(Sketch.of(a).projections, Sketch.of(b).projections, strict=True)
    assert both == tuple(x + y for x, y in parts)
    assert any(Sketch.of(b).projections), "the last chunk counts"


def test_sketches_of_one_value_in_either_sign_cancel_on_average() -> None:
    """A constant vector is all structure; random signs make its projections as small as those of noise."""
    sketch = Sketch.of(torch.ones(64_000))
    assert sum(p * p for p in sketch.projections) == pytest.approx(64_000, rel=0.7)
    assert {p > 0 for p in sketch.projections} == {True, False}


@pytest.mark.parametrize("by", [1e-7, 1e-5, 1e-3, 0.1])
def test_distance_of_a_moved_vector_is_estimated_well(by: float) -> None:
    estimates = [relative_distance(SAME, drifted(by, seed=seed)) for seed in range(1, 11)]
    assert all(by / 2 < estimate < by * 2 for estimate in estimates)
    assert sum(estimates) / len(estimates) == pytest.approx(by, rel=0.2)


@pytest.mark.parametrize("where", [slice(None, None, 64), slice(0, 300), slice(19_700, None)])
def test_distance_sees_a_change_wherever_it_sits(where: slice) -> None:
    """In one column, or in one layer at either end."""
    changed = vector()
    changed[where] += 0.02
    truth = float((changed - vector()).norm() / vector().norm())
    assert truth / 2 < relative_distance(SAME, Sketch.of(changed)) < truth * 2


def test_distance_is_symmetric_and_zero_only_for_the_same() -> None:
    other = drifted(1e-6)
    assert relative_distance(SAME, other) == relative_distance(other, SAME) > 0
    assert relative_distance(SAME, Sketch.of(vector())) == 0.0
    zero = Sketch.of(torch.zeros(20_000))
    assert relative_distance(zero, zero) == 0.0
    assert relative_distance(zero, SAME) == math.inf


def test_distance_to_another_length_or_to_values_not_finite_is_infinite() -> None:
    poisoned = vector()
    poisoned[7] = math.nan
    for other in (Sketch.of(vector(num_elements=19_999)), Sketch.of(poisoned), Sketch.of(vector() * math.inf)):
        assert relative_distance(SAME, other) == math.inf


def test_distance_to_a_stranger_who_claims_a_huge_norm_stays_large() -> None:
    liar = Sketch(20_000, 1e300, tuple(p + 1.0 for p in SAME.projections))
    assert relative_distance(SAME, liar) > 1
    assert relative_distance(SAME, Sketch(20_000, 1e300, SAME.projections)) > 1


def test_sketch_as_bytes_and_back_is_the_same() -> None:
    data = SAME.to_bytes()
    assert len(data) == WIRE_BYTES == 529
    assert Sketch.from_bytes(data) == SAME


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * WIRE_BYTES, b"\xff" * WIRE_BYTES, SAME.to_bytes()[:-1], SAME.to_bytes() + b"\0",
        b"\x02" + SAME.to_bytes()[1:], Sketch(1, -1.0, SAME.projections).to_bytes(),
        SAME.to_bytes()[:-8] + struct.pack("<d", math.inf), Sketch(1, math.nan, SAME.projections).to_bytes(),
    ],
    ids=range(9),
)  # fmt: skip
def test_bytes_that_are_no_sketch_are_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="sketch"):
        Sketch.from_bytes(data)


def judge(own: Sketch, sketches: Sequence[Sketch], *, tolerance: float = TOLERANCE) -> str:
    """Where one of some peers stands among all of them, as a leader sees it."""
    return standing(own, reference=reference_of(sketches, tolerance=tolerance), tolerance=tolerance)


def test_judge_among_equal_peers_says_in_step() -> None:
    assert judge(SAME, [SAME]) == "in_step"
    assert judge(SAME, [SAME, SAME, SAME]) == "in_step"


def test_judge_of_a_peer_that_drifted_in_the_last_bits_says_drifting() -> None:
    other = drifted(1e-7)
    assert judge(other, [SAME, other, SAME]) == "drifting"
    assert judge(SAME, [SAME, other, SAME]) == "in_step"


def test_judge_of_a_peer_that_missed_a_step_says_out_of_step() -> None:
    peers = [SAME, drifted(1e-3), drifted(1e-7)]
    assert [judge(peer, peers) == "out_of_step" for peer in peers] == [False, True, False]


def test_judge_with_a_wider_tolerance_forgives_more() -> None:
    other = drifted(1e-3)
    assert judge(other, [SAME, SAME, other], tolerance=1e-2) == "drifting"


def test_judge_of_values_not_finite_says_out_of_step_and_they_do_not_count() -> None:
    nan = Sketch.of(torch.full((20_000,), math.nan))
    assert judge(nan, [nan, nan, SAME]) == "out_of_step"
    assert judge(SAME, [nan, nan, SAME]) == "in_step"
    with pytest.raises(ValueError, match="no finite sketch"):
        reference_of([nan])


@pytest.mark.parametrize("num_peers", [2, 3, 4, 7])
def test_judge_when_all_disagree_leaves_exactly_one_in_step_whatever_the_order(num_peers: int) -> None:
    sketches = [drifted(0.1 * i, seed=i + 1) for i in range(num_peers)]
    for turn in range(num_peers):
        order = sketches[turn:] + sketches[:turn]
        assert reference_of(order) == reference_of(sketches)
    standings = [judge(sketch, sketches) for sketch in sketches]
    assert sorted(standings) == ["in_step"] + ["out_of_step"] * (num_peers - 1)


def test_reference_is_of_the_largest_cluster_not_the_largest_exact_group() -> None:
    cluster = [drifted(1e-7, seed=seed) for seed in (1, 2, 3)]
    assert reference_of([*cluster, drifted(0.5, seed=9), drifted(0.5, seed=9)]) in cluster
    assert TOLERANCE < 0.5


def test_reference_within_a_cluster_is_what_most_hold_to_the_bit() -> None:
    assert reference_of([drifted(1e-7), SAME, drifted(1e-7, seed=2), SAME]) == SAME
    assert len(SAME.projections) == NUM_PROJECTIONS


def test_reference_of_a_full_group_is_found_at_once() -> None:
    """The leader asks on its event loop."""
    sketches = [Sketch(20_000, SAME.norm, tuple(p + i * 1e-9 for p in SAME.projections)) for i in range(64)]
    start = time.perf_counter()
    reference_of(sketches)
    assert time.perf_counter() - start < 0.5
