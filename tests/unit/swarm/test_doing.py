"""What `calm-ray status` says that the rounds thread is doing."""

import pytest

from calm_ray.swarm.doing import Doing, Stage


@pytest.mark.parametrize(
    ("stage", "num_missing", "words"),
    [
        (Stage.ACCUMULATE, None, ""),
        (Stage.MATCH, None, "finding the others to average with"),
        (Stage.MATCH, 0, "finding the others to average with"),
        (Stage.MATCH, 1, "waiting for 1 more peer to average with"),
        (Stage.MATCH, 2, "waiting for 2 more peers to average with"),
        (Stage.AVERAGE, 2, "averaging"),
        (Stage.STEP, None, ""),
        (Stage.CATCH_UP, None, "others are ahead: re-syncing"),
    ],
)
def test_each_stage_has_its_words(stage: Stage, num_missing: int | None, words: str) -> None:
    assert Doing(stage=stage).words(num_missing=num_missing) == words


def test_peer_whom_everybody_has_left_says_so_unless_it_does_something() -> None:
    assert "everybody else has fallen silent" in Doing(is_forsaken=True).words(num_missing=None)
    assert Doing(is_forsaken=True, stage=Stage.MATCH).words(num_missing=1).startswith("waiting for 1 more peer")


def test_download_is_told_in_percent_that_never_reach_the_end_and_counts_as_turns() -> None:
    doing = Doing(stage=Stage.CATCH_UP)
    doing.begin_download(1000)
    told = []
    for num_bytes in (0, 432, 1000, 1200):  # what comes may be a little more than what was expected
        doing.note_downloaded(num_bytes)
        told.append(doing.words(num_missing=None))
    assert told == [f"downloading the swarm's state, {percent} %" for percent in (0, 43, 99, 99)]
    assert doing.turns == 4
    doing.end_download()
    assert doing.words(num_missing=None) == "others are ahead: re-syncing"
