"""What a peer counts about its rounds."""

import logging

import pytest
import torch

from calm_ray.swarm.tally import RoundTally
from calm_ray.swarm.verdict import RoundResult

TRUE = RoundResult(
    outcome="averaged", average=torch.ones(3), digest="ab" * 32, group_size=3, num_senders=2, weights={"a": 8, "b": 4},
    total_weight=12.0, banned={"c": "slow"}, bytes_sent=100, bytes_received=200, seconds=1.5, residual=torch.ones(3),
)  # fmt: skip
FAILED = RoundResult(outcome="timeout", detail="not done after 30 s", group_size=2)


def test_outcomes_and_samples_are_counted() -> None:
    tally = RoundTally()
    tally.note(4, TRUE, num_samples=8, is_counted=True)
    tally.note(5, FAILED, num_samples=8, is_counted=False)
    tally.note(5, TRUE, num_samples=16, is_counted=True)
    tally.note(6, TRUE, num_samples=16, is_counted=False)
    assert tally.by_outcome == {"averaged": 3, "timeout": 1}
    assert tally.samples_averaged == 24, "what was banned or failed is no contribution"
    assert (tally.last_epoch, tally.last_group_size) == (6, 3)


def test_last_round_is_kept_without_its_vectors() -> None:
    tally = RoundTally()
    tally.note(4, TRUE, num_samples=8, is_counted=True)
    assert tally.last is not None
    assert tally.last.average is None and tally.last.residual is None, "two vectors as long as the model"
    assert (tally.last.digest, tally.last.weights, tally.last.banned) == (TRUE.digest, TRUE.weights, TRUE.banned)


def test_each_round_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tally = RoundTally()
    tally.note(4, TRUE, num_samples=8, is_counted=True)
    tally.note(5, FAILED, num_samples=0, is_counted=False)
    first, second = caplog.messages
    for fact in (
        "epoch=4",
        "outcome=averaged",
        "group_size=3",
        "senders=2",
        "samples=8",
        "total_weight=12",
        "banned=1",
    ):
        assert fact in first.split()
    assert "detail" not in first
    assert "outcome=timeout" in second and "detail='not done after 30 s'" in second
