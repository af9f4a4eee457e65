"""How a vector is cut into parts and dealt to slices: nothing missing, nothing twice, and the same for everyone."""

import random

import pytest

from calm_ray.swarm.parts import MIN_STREAMS, Layout


@pytest.mark.parametrize("seed", range(20))
def test_layout_of_any_fractions_deals_each_part_once_and_in_proportion(seed: int) -> None:
    generator = random.Random(seed)
    fractions = [generator.choice([0.0, generator.random()]) for _ in range(generator.randint(1, 12))] + [0.5]
    num_elements, part_elements = generator.randint(0, 100_000), generator.randint(1, 600)
    layout = Layout.from_fractions(fractions, num_elements=num_elements, part_elements=part_elements)
    spans = [layout.span(part) for part in range(layout.num_parts)]
    assert [element for start, stop in spans for element in range(start, stop)] == list(range(num_elements))
    assert all(stop - start == part_elements for start, stop in spans[:-1])
    dealt = [0] * len(fractions)
    for number, member in enumerate(layout.reducers):
        parts = layout.parts_of(number)
        assert list(parts) == sorted(parts) and bool(parts) == (number in layout.slices)
        dealt[member] += len(parts)
    assert sorted(part for number in layout.slices for part in layout.parts_of(number)) == list(range(layout.num_parts))
    lanes = len(layout.reducers) // len(set(layout.reducers))
    assert lanes == max(1, MIN_STREAMS // len(set(layout.reducers)))
    for count, fraction in zip(dealt, fractions, strict=True):
        assert abs(count - layout.num_parts * fraction / sum(fractions)) < lanes * 2


def test_layout_lets_all_reducers_go_through_the_vector_side_by_side() -> None:
    """Or hashing would have to wait for the end of the round."""
    layout = Layout.from_fractions([0.1, 0.2, 0.3, 0.4], num_elements=10_000, part_elements=10)
    for done in (0.25, 0.5, 0.75):
        come = {part for s in layout.slices for part in layout.parts_of(s)[: round(done * len(layout.parts_of(s)))]}
        in_order = next(part for part in range(layout.num_parts) if part not in come)
        assert in_order > (done - 0.02) * layout.num_parts


def test_layout_of_few_reducers_gives_each_several_slices_for_the_sake_of_its_streams() -> None:
    layout = Layout.from_fractions([0.75, 0.0, 0.25], num_elements=1600, part_elements=50)
    assert layout.reducers == (0, 0, 2, 2)
    assert [len(layout.parts_of(number)) for number in range(4)] == [12, 12, 4, 4]
    many = Layout.from_fractions([0.1] * 10, num_elements=1600, part_elements=50)
    assert many.reducers == tuple(range(10))


def test_layout_of_fewer_parts_than_slices_leaves_some_without() -> None:
    layout = Layout.from_fractions([0.5, 0.5], num_elements=10, part_elements=4)
    assert [layout.parts_of(number) for number in range(4)] == [(0,), (1,), (2,), ()]
    assert layout.slices == [0, 1, 2] and layout.span(2) == (8, 10)


@pytest.mark.parametrize("fractions", [[], [0.0, 0.0], [-0.1, 1.0], [1.1], [float("nan"), 1.0], [1e-30]])
def test_layout_of_insane_fractions_is_refused(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match=r"fraction|averages"):
        Layout.from_fractions(fractions, num_elements=10, part_elements=4)
