"""What the watcher remembers of what it sees, and how a peer's status is read."""

from benchmarks.fault_account import BACK_OFF, DOWNLOAD, GONE, JOINING, STARTING, TRAINING
from benchmarks.fault_rig import sighting_of
from benchmarks.fault_watch import RoundSeen, Sighting, Watch
from calm_ray.peers.status import PeerStatus
from calm_ray.report import EpochRecord, PeerReport, RoundReport
from tests.eventually import eventually

DIGEST = "ab" * 32


def _watch(*looks: list[Sighting]) -> Watch:
    """One that has had these looks."""
    left = list(looks)

    def look() -> list[Sighting]:
        return left.pop(0) if left else []

    watch = Watch(look, is_true=lambda num_members: num_members >= 2, look_seconds=0.01)
    watch.start()
    eventually(lambda: not left, 10)
    watch.stop()
    return watch


def _trainer(name: str, key: str | None = None, *, phase: str = TRAINING, **fields: object) -> Sighting:
    seen = RoundSeen(key=key, epoch=3, samples={name: 10.0}) if key is not None else None
    return Sighting(name=name, phase=phase, is_at_work=phase == TRAINING, round=seen, **fields)  # type: ignore[arg-type]


def test_round_is_true_once_two_peers_hold_the_same_average() -> None:
    watch = _watch([_trainer("a", "x"), _trainer("b", "y")], [_trainer("b", "x")])
    (found,) = watch.rounds()
    assert found.samples == {"a": 10.0, "b": 10.0}
    assert found.members == {"a", "b"}


def test_samples_are_those_of_every_life_and_epoch_at_their_last_word() -> None:
    watch = _watch(
        [_trainer("a", boot="1", computed={0: 50})], [_trainer("a", boot="1", computed={0: 70, 1: 5})],
        [_trainer("a", boot="2", computed={1: 30})],
    )  # fmt: skip
    assert watch.computed(["a"], first=0, last=99) == 70 + 5 + 30
    assert watch.computed(["a"], first=1, last=1) == 5 + 30
    assert watch.computed(["b"], first=0, last=99) == 0


def test_phases_follow_each_other_without_repetition() -> None:
    watch = _watch([_trainer("a")], [_trainer("a")], [_trainer("a", phase=GONE)])
    assert [span.phase for span in watch.spans(["a"], end=float("inf"))] == [TRAINING, GONE]


def _status(state: str, *, detail: str = "", report: PeerReport | None = None) -> PeerStatus:
    return PeerStatus(role="trainer", state=state, detail=detail, report=report)


def _report() -> PeerReport:
    return PeerReport(
        peer_id="Qm1111111111", boot_id="b", role="trainer", version="1", config_hash="ab", state="training",
        is_client_mode=False, epoch=5, samples_accumulated=20, published_at=1.0,
        last_epoch=EpochRecord(epoch=4, mini_steps=2, num_samples=40, mlm_loss_sum=1.0, sop_loss_sum=1.0),
        last_round=RoundReport(epoch=4, outcome="averaged", digest=DIGEST, weights={"1111111111": 40.0}),
    )  # fmt: skip


def test_status_of_a_trainer_tells_its_round_and_what_it_computed() -> None:
    seen = sighting_of("trainer-0", _status("training", report=_report()), {"1111111111": "trainer-0"})
    assert seen.is_at_work and seen.phase == TRAINING
    assert seen.computed == {4: 40, 5: 20}
    assert seen.round == RoundSeen(key=f"4/{DIGEST}", epoch=4, samples={"trainer-0": 40.0})


def test_status_of_a_trainer_that_is_not_at_work_tells_its_phase() -> None:
    told = [
        ("restarting", "", BACK_OFF), ("starting", "", STARTING), ("joining", "asking for the run bundle", JOINING),
        ("joining", "downloading the state of epoch 4", DOWNLOAD), ("leaving", "", GONE), ("training", "", STARTING),
    ]  # fmt: skip
    assert [sighting_of("trainer-0", _status(s, detail=d), {}).phase for s, d, _ in told] == [p for _, _, p in told]
