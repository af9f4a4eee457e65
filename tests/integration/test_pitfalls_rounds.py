"""What stock hivemind 1.1.12 does in a round, and what we do: each pitfall twice, by real processes.

The stock halves fail the day that hivemind mends them: then what we do about it can go. Ours are on hivemind's wire
here, beside it; on our own wire they are in `tests/unit/swarm/test_exchange*.py`.
"""

from typing import Any

import numpy as np
import pytest

from tests.integration.stock_nodes import ATTACKS, run_cases

pytestmark = [pytest.mark.slow(shard=1), pytest.mark.timeout(240)]

HONEST_MEAN = 2.0
is_numpy_strict = tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4)
STOCK = [
    *(f"stock_attacked_{name}" for name in ATTACKS), "stock_weightless", "stock_mate_dies", "stock_cut_off",
    "stock_fragments", "stock_integers", "stock_eight_bits",
]  # fmt: skip
OURS = [
    *(f"ours_attacked_{name}" for name in ATTACKS), "ours_attacked_by_reducer", "ours_weightless", "ours_mate_dies",
    "ours_cut_off", "ours_mixed_8bit",
]  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases(tmp_path_factory.mktemp("stock"), "stock_rounds", *STOCK, timeout=200)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases(tmp_path_factory.mktemp("ours"), "stock_rounds", *OURS, timeout=200)


# --- P1 and P4: what one peer can do to all others -------------------------------------------------------------------


def test_stock_poisons_the_swarm_with_one_nan(stock: dict[str, Any]) -> None:
    for honest in stock["stock_attacked_nan"]:
        assert honest["group_size"] == 3, "a success, by its word"
        assert not honest["is_finite"]


def test_stock_lets_one_weight_take_the_average(stock: dict[str, Any]) -> None:
    """100 everywhere (`values_in` makes it 50 to 100), with a weight of a billion."""
    for honest in stock["stock_attacked_weight"]:
        assert (honest["least"], honest["most"]) == pytest.approx((50.0, 100.0), rel=1e-3)


def test_stock_takes_one_element_for_a_whole_part(stock: dict[str, Any]) -> None:
    for honest in stock["stock_attacked_one-element"]:
        assert honest["least"] > 1000


def test_stock_waits_in_vain_when_a_part_is_too_short(stock: dict[str, Any]) -> None:
    """Counted, then not added: the round hangs until its timeout, and is begun again without the culprit, or not."""
    sizes = [honest["group_size"] for honest in stock["stock_attacked_short"]]
    assert 3 not in sizes


@pytest.mark.parametrize(
    ("attack", "reason"), [("nan", "not finite"), ("weight", "weight 1e+09"), ("one-element", "part of (1,)"),
                           ("short", "part of (1000,)")],
)  # fmt: skip
def test_ours_bans_who_sends_what_cannot_be_right_and_averages_the_rest(
    ours: dict[str, Any], attack: str, reason: str
) -> None:
    for honest in ours[f"ours_attacked_{attack}"]:
        assert honest["is_true"] and honest["size"] == 3
        assert (honest["least"], honest["most"]) == pytest.approx((HONEST_MEAN, HONEST_MEAN))
        assert set(honest["banned"]) <= {"2"}
        assert all(reason in said for said in honest["banned"].values())
    assert any(honest["banned"] for honest in ours[f"ours_attacked_{attack}"]), "whoever reduced something saw it"


def test_ours_takes_no_nan_from_a_reducer(ours: dict[str, Any]) -> None:
    """A bare peer with a NaN makes its own slice NaN for all. Ours cannot mend that; they say so, and use nothing."""
    for honest in ours["ours_attacked_by_reducer"]:
        assert honest["outcome"] in ("non_finite", "averaged")
        assert honest["outcome"] == "non_finite" or honest["most"] == pytest.approx(HONEST_MEAN)
    assert any(honest["outcome"] == "non_finite" for honest in ours["ours_attacked_by_reducer"])


def test_stock_divides_by_zero_when_nobody_has_a_weight(stock: dict[str, Any]) -> None:
    assert [peer["is_finite"] for peer in stock["stock_weightless"]] == [False, False]


def test_ours_divides_nothing_when_nobody_has_a_weight(ours: dict[str, Any]) -> None:
    assert [peer["outcome"] for peer in ours["ours_weightless"]] == ["zero_weight"] * 2


# --- P2: eight bits ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not is_numpy_strict, reason=f"numpy {np.__version__} still turns a one-element array into a number")
def test_stock_averages_nothing_in_eight_bits_and_calls_it_a_success(stock: dict[str, Any]) -> None:
    """Its decoder fails under numpy 2.4. One tensor at a time: `test_codecs.py`."""
    for peer, own in zip(stock["stock_eight_bits"], (1.0, 3.0), strict=True):
        assert peer["group_size"] == 2
        assert (peer["least"], peer["most"]) == pytest.approx((own, own))


def test_ours_averages_in_eight_bits(ours: dict[str, Any]) -> None:
    for peer in ours["ours_mixed_8bit"]:
        assert peer["is_true"]
        assert (peer["least"], peer["most"]) == pytest.approx((4.0, 4.0), abs=0.1)


# --- P3: success, with nothing averaged ------------------------------------------------------------------------------


def test_stock_calls_a_round_a_success_in_which_nothing_came(stock: dict[str, Any]) -> None:
    survivor = stock["stock_mate_dies"]
    assert survivor["group_size"] == 2, "a full group"
    assert (survivor["least"], survivor["most"]) == pytest.approx((1.0, 1.0)), "and its own tensors as they were"


def test_ours_calls_it_partial_and_gives_no_average(ours: dict[str, Any]) -> None:
    survivor, victim, _ = ours["ours_mate_dies"]
    assert survivor["outcome"] == "partial" and not survivor["is_true"] and "least" not in survivor
    assert survivor["missing"] > 0.1 and "did not come" in survivor["detail"]
    assert victim["outcome"] == "failed" and "process has ended" in victim["detail"]


# --- P9: groups that fall apart --------------------------------------------------------------------------------------


def test_stock_makes_two_groups_of_those_who_start_some_seconds_apart(stock: dict[str, Any]) -> None:
    """Ours: `tests/unit/swarm/test_late_members.py`, on our own wire. hivemind's has no word for "wait for me"."""
    assert stock["stock_fragments"] == [2, 2, 2, 2]


# --- P12: tensors that are no real numbers ---------------------------------------------------------------------------


def test_stock_fails_on_integers(stock: dict[str, Any]) -> None:
    """BatchNorm counts its batches in one. We average parameters alone, as one vector of fp32."""
    assert all("Long" in peer["error"] for peer in stock["stock_integers"])


# --- P13: who leaves early -------------------------------------------------------------------------------------------


def test_stock_cuts_off_a_slower_mate_when_it_leaves(stock: dict[str, Any]) -> None:
    full, client = stock["stock_cut_off"]
    assert (full["least"], full["most"]) == pytest.approx((HONEST_MEAN, HONEST_MEAN))
    assert client["group_size"] == 2, "a success, by its word"
    assert client["most"] == pytest.approx(3.0), "and some of its tensors as they were"


def test_ours_stays_until_a_slower_mate_has_everything(ours: dict[str, Any]) -> None:
    for peer in ours["ours_cut_off"]:
        assert peer["is_true"]
        assert (peer["least"], peer["most"]) == pytest.approx((HONEST_MEAN, HONEST_MEAN))
