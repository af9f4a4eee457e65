"""Our rounds on hivemind's wire, by real processes: what each member gets, what it is told, and how long it takes.

With bare optimizers: `test_bare_optimizer.py`. Attacked: `test_pitfalls_rounds.py`.
"""

from typing import Any

import pytest

from tests.integration.stock_nodes import run_cases


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases(
        tmp_path_factory.mktemp("wire"),
        "stock_rounds",
        "ours_mixed_fp16",
        "ours_own_nan",
        "ours_without_process",
        "ours_stuck",
    )


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_cases(
        tmp_path_factory.mktemp("more"), "stock_rounds", "ours_mixed_none", "ours_mixed_8bit", "ours_alone",
        "ours_unlike_epochs", "ours_weightless",
    )  # fmt: skip


def check_mixed(results: list[dict[str, Any]], *, error: float) -> None:
    """1.0, 3.0 and the client's 5.0 with weights of 1, 2 and 5, and one that reads."""
    assert [result["outcome"] for result in results] == ["averaged"] * 4
    for result in results:
        assert result["is_true"] and result["size"] == 4 and result["missing"] == 0 and not result["banned"]
        assert abs(result["least"] - 4.0) < error and abs(result["most"] - 4.0) < error
        assert result["weights"] in ({}, {"0": 1.0, "1": 2.0, "3": 5.0}), "of who reduced something"
    assert any(result["weights"] for result in results)


def test_senders_a_reader_and_a_client_get_the_weighted_mean(found: dict[str, Any]) -> None:
    results = found["ours_mixed_fp16"]
    check_mixed(results, error=4e-3)
    vector_bytes = results[3]["sent"]
    assert results[3]["received"] == vector_bytes, "a client sends its vector, and gets the average"


def test_own_vector_that_is_not_finite_is_not_sent_and_the_average_comes_all_the_same(found: dict[str, Any]) -> None:
    *honest, own = found["ours_own_nan"]
    for result in (*honest, own):
        assert result["is_true"] and result["senders"] == 2
        assert result["least"] == pytest.approx(2.0) and result["most"] == pytest.approx(2.0)
    assert own["banned"] == {"2": "not finite"} and "not finite" in own["detail"]
    assert all(not result["banned"] for result in honest)


def test_round_without_its_process_fails_at_once_and_says_why(found: dict[str, Any]) -> None:
    """Stock's `step` waits for the dead process for ever."""
    result = found["ours_without_process"]
    assert result["outcome"] == "failed" and "process has ended" in result["detail"]
    assert result["seconds"] < 10


def test_round_with_a_stuck_process_ends_in_its_time(found: dict[str, Any]) -> None:
    result = found["ours_stuck"]
    assert result["outcome"] == "timeout" and "did not answer" in result["detail"]
    assert result["seconds"] == pytest.approx(3.0, abs=1.0)


@pytest.mark.slow(shard=1)
@pytest.mark.parametrize(("codec", "error"), [("none", 1e-5), ("8bit", 0.1)])
def test_mean_is_as_exact_as_the_codec(more: dict[str, Any], codec: str, error: float) -> None:
    check_mixed(more[f"ours_mixed_{codec}"], error=error)


@pytest.mark.slow(shard=1)
def test_peer_without_company_is_told_so_in_time(more: dict[str, Any]) -> None:
    assert more["ours_alone"]["outcome"] == "alone"
    assert more["ours_alone"]["seconds"] < 6


@pytest.mark.slow(shard=1)
def test_parameters_of_unlike_epochs_are_no_true_round(more: dict[str, Any]) -> None:
    """hivemind's groups know no epochs: whoever looks for one at the time is in it."""
    assert [result["outcome"] for result in more["ours_unlike_epochs"]] == ["failed"] * 2
    assert "epoch 7, others at [8]" in more["ours_unlike_epochs"][0]["detail"]


@pytest.mark.slow(shard=1)
def test_round_of_readers_is_weightless(more: dict[str, Any]) -> None:
    assert [result["outcome"] for result in more["ours_weightless"]] == ["zero_weight"] * 2
