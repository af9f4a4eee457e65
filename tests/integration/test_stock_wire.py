"""Our rounds on hivemind's wire, by real processes: what each member gets, what it is told, and how long it takes."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.eventually import Children, eventually
from tests.integration.stock import Bare, start_bare
from tests.integration.stock_nodes import LIMITS, run_cases
from tests.shards import ROOT

NUM_EPOCHS = 3
TARGET_BATCH_SIZE = 2000
"""Some seconds of computing for four trainers: a bare peer looks for its groups ahead, and cannot in less."""


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


# --- with bare optimizers --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[Bare], Path]]:
    """Two bare optimizers, with and without offloading, and two of ours that end after some epochs."""
    folder = tmp_path_factory.mktemp("mixed")
    with Children(folder) as children:
        ours = folder / "ours"
        ours.mkdir()
        gate = ours / "gate"
        start = partial(start_bare, children, run_id="mixed", target_batch_size=TARGET_BATCH_SIZE, gate=gate)
        first = start(folder / "first")
        second = start(folder / "second", peer=first.addresses[0], seed=1, no_offload=True)
        argv: list[str | Path] = [sys.executable, "-W", "ignore", "-m", "tests.integration.stock_driver", ours, "mixed"]
        driver = children.start([*argv, str(NUM_EPOCHS), str(TARGET_BATCH_SIZE), first.addresses[0]], cwd=ROOT)
        eventually((ours / "ready").exists, 60, driver.tail)
        gate.touch()
        assert driver.wait(150) == 0, driver.tail()
        for bare in (first, second):
            bare.stop()
        eventually(lambda: not first.child.is_running() and not second.child.is_running(), 30)
        yield [first, second], ours


@pytest.mark.slow(shard=1)
@pytest.mark.timeout(300)
def test_bare_optimizers_average_with_us(mixed: tuple[list[Bare], Path]) -> None:
    """Which needs their prefixes, their class names and the hash of their tensors, offloaded or not."""
    bares, ours = mixed
    members = {bare.peer_id for bare in bares}
    for rounds in json.loads((ours / "rounds.json").read_text()):
        true = [each for each in rounds if each["is_true"] and each["group_size"] == 4]
        told = [(each["kind"], each["epoch"], each["outcome"], each["group_size"], each["detail"]) for each in rounds]
        for kind in ("gradients", "state"):
            assert len([each for each in true if each["kind"] == kind]) >= NUM_EPOCHS - 1, told
        for each in true:
            assert not each["weights"] or members < each["weights"].keys(), "bare peers' contributions count"
            assert each["seconds"] < LIMITS.round_seconds + 15


@pytest.mark.slow(shard=1)
@pytest.mark.timeout(300)
def test_parameters_of_bare_optimizers_and_ours_stay_together(mixed: tuple[list[Bare], Path]) -> None:
    bares, ours = mixed
    first, second = (torch.load(ours / f"peer-{number}.pt") for number in range(2))
    assert (first - second).abs().max() < 1e-6
    moved = (first[1:] - first[:-1]).abs().amax(dim=1)
    assert bool((moved > 1e-4).all()), "every epoch has a step"
    rounds = json.loads((ours / "rounds.json").read_text())[0]
    whole = [e["epoch"] + 1 for e in rounds if (e["kind"], e["group_size"], e["is_true"]) == ("gradients", 4, True)]
    for epoch in whole:
        for bare in bares:  # before its state is averaged: that takes out what a round without us put in
            assert (bare.parameters(epoch) - first[epoch]).abs().max() < 1e-5, (epoch, bare.logged("Averaged"))
