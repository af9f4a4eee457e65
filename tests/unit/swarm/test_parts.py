"""How a vector is cut into slices and parts: nothing missing, nothing twice, and the same for everyone."""

import random

import pytest

from calm_ray.swarm.parts import MIN_STREAMS, Layout


@pytest.mark.parametrize("seed", range(20))
def test_layout_of_any_fractions_covers_each_element_once_and_in_order(seed: int) -> None:
    generator = random.Random(seed)
    fractions = [generator.choice([0.0, generator.random()]) for _ in range(generator.randint(1, 12))] + [0.5]
    num_elements, part_elements = generator.randint(0, 10_000), generator.randint(1, 600)
    layout = Layout.from_fractions(fractions, num_elements=num_elements, part_elements=part_elements)
    covered, reduced = [], [0] * len(fractions)
    for number, member in enumerate(layout.reducers):
        start, stop = layout.extent(number)
        reduced[member] += stop - start
        spans = [layout.span(part) for part in layout.parts_of(number)]
        assert bool(spans) == (number in layout.slices)
        assert all(layout.slice_with(part) == number for part in layout.parts_of(number))
        assert all(0 < b - a <= part_elements for a, b in spans)
        assert all(b - a == part_elements for a, b in spans[:-1])
        covered += [element for a, b in spans for element in range(a, b)]
    assert covered == list(range(num_elements)) and layout.num_elements == num_elements
    assert all(
        abs(num - num_elements * fraction / sum(fractions)) <= 1
        for num, fraction in zip(reduced, fractions, strict=True)
    )
    assert len(layout.reducers) > MIN_STREAMS / 2


def test_layout_of_a_member_without_a_fraction_has_no_part_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calm_ray.swarm.parts.MIN_STREAMS", 1)
    layout = Layout.from_fractions([0.0, 0.5, 0.0, 0.5], num_elements=10, part_elements=4)
    assert layout.bounds == (0, 5, 10) and layout.reducers == (1, 3)
    assert [list(layout.parts_of(number)) for number in range(2)] == [[0, 1], [2, 3]]
    assert [layout.span(part) for part in range(4)] == [(0, 4), (4, 5), (5, 9), (9, 10)]


def test_layout_of_few_reducers_gives_each_several_slices_for_the_sake_of_its_streams() -> None:
    layout = Layout.from_fractions([0.75, 0.0, 0.25], num_elements=1600, part_elements=50)
    assert layout.reducers == (0, 0, 2, 2)
    assert layout.bounds == (0, 600, 1200, 1400, 1600)
    many = Layout.from_fractions([0.1] * 10, num_elements=1600, part_elements=50)
    assert many.reducers == tuple(range(10))


@pytest.mark.parametrize("fractions", [[], [0.0, 0.0], [-0.1, 1.0], [1.1], [float("nan"), 1.0], [1e-30]])
def test_layout_of_insane_fractions_is_refused(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match=r"fraction|averages"):
        Layout.from_fractions(fractions, num_elements=10, part_elements=4)


@pytest.mark.parametrize("bounds", [(), (1, 5), (0, 5, 4)])
def test_layout_of_bounds_that_a_stranger_made_up_is_refused(bounds: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="bounds"):
        Layout(bounds=bounds, part_elements=4)
