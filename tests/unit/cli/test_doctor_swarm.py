"""What the doctor makes of the way to a run. Pure; real desks and dead addresses are in tests/integration."""

from typing import Any

import pytest

from calm_ray.peers.doctor_machine import SystemFacts
from calm_ray.peers.doctor_swarm import REFUSED_SECONDS, judge_addresses, judge_clock, judge_reach, judge_version
from calm_ray.peers.vigil import MAX_CLOCK_SECONDS
from calm_ray.swarm.clock_offset import ClockOffset
from calm_ray.swarm.probing import AddressFacts, ReachFacts, place_of

PEER_ID = "QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxann"
LINUX = SystemFacts(platform="linux", machine="x86_64", kernel="6.8.0")


def facts(step: Any = "done", problem: str = "", **values: Any) -> AddressFacts:
    text = f"/ip4/203.0.113.7/tcp/4001/p2p/{PEER_ID}"
    return AddressFacts(text=text, place=place_of(text), step=step, problem=problem, **values)


def offset(seconds: float, *, error: float = 0.02, num_desks: int = 2, num_agreeing: int = 2) -> ClockOffset:
    return ClockOffset(
        offset_seconds=seconds, error_seconds=error, num_desks=num_desks, num_agreeing=num_agreeing
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "place"),
    [("/dns4/boot.example.org/tcp/4001", "boot.example.org:4001"), ("/ip6/2001:db8::1/tcp/9", "[2001:db8::1]:9")],
)
def test_place_is_host_and_port(text: str, place: str) -> None:
    assert place_of(text) == place


TROUBLES = [
    (facts("name", "name does not resolve"), "203.0.113.7:4001: name does not resolve", "is online"),
    (facts("tcp", "no answer within 5 s"), "203.0.113.7:4001: no answer within 5 s", "firewall"),
    (facts("tcp", "refuses connections: the peer is down"), "203.0.113.7:4001 refuses", "ask the organiser"),
    (facts("tcp"), "could not be checked", "run `calm-ray doctor` again"),
    (facts("libp2p", "it hangs up"), "is no peer that we can talk to (it hangs up)", "ask the organiser"),
    (facts("peer", "x", peer_id=PEER_ID), "is peer ...Yxann".replace("Yxann", PEER_ID[-6:]), "do not join"),
    (facts("desk", "no desk for this run"), "does not hand out run 'demo' (no desk", "try again"),
]


@pytest.mark.parametrize(("trouble", "words", "remedy"), TROUBLES)
def test_dead_address_fails_alone_and_warns_beside_a_living_one(trouble: AddressFacts, words: str, remedy: str) -> None:
    (alone,) = judge_addresses([trouble], run_id="demo")
    assert alone.verdict == "fail"
    assert words in alone.found
    assert remedy in alone.remedy
    beside, living = judge_addresses([trouble, facts(tcp_seconds=0.0234, libp2p_seconds=0.1)], run_id="demo")
    assert (beside.verdict, beside.found) == ("warn", alone.found)
    assert (living.name, living.verdict) == ("bootstrap 2", "ok")
    assert living.found == "203.0.113.7:4001 serves run 'demo'; 23 ms by TCP, 100 ms by libp2p"


def test_forged_bundle_fails_beside_a_living_one_too() -> None:
    forged = facts("bundle", "run bundle: not signed by the organiser of this invite; ask for a new invite")
    judged, _ = judge_addresses([forged, facts()], run_id="demo")
    assert judged.verdict == "fail"
    assert judged.remedy == "do not join; ask for a new invite"


def test_version_that_does_not_fit_is_told_with_its_pip_line() -> None:
    mismatch = "this run needs calm-ray 0.2, you have 0.1.0; run: pip install calm-ray==0.2.0"
    judged = judge_version([facts(), facts(mismatch=mismatch)], own="0.1.0", free_bytes=None)
    assert judged is not None
    assert (judged.verdict, judged.remedy) == ("fail", "run: pip install calm-ray==0.2.0")


@pytest.mark.parametrize(("free_bytes", "verdict"), [(None, "ok"), (1 << 30, "ok"), (1 << 20, "fail")])
def test_bundle_must_fit_on_the_disk(free_bytes: int | None, verdict: str) -> None:
    served = facts(version="0.1.0", bundle_bytes=12 << 20)
    judged = judge_version([facts("tcp", "no answer"), served], own="0.1.0", free_bytes=free_bytes)
    assert judged is not None
    assert judged.verdict == verdict
    assert "12 MB" in judged.found


def test_version_is_not_judged_when_nobody_showed_a_manifest() -> None:
    assert judge_version([facts("tcp", "no answer")], own="0.1.0", free_bytes=None) is None


@pytest.mark.parametrize(
    ("found", "verdict", "words"),
    [
        (offset(0.01), "ok", "agrees with 2 bootstrap peers within 0.03 s"),
        (offset(0.7), "ok", "0.7 s ahead of 2 bootstrap peers"),
        (offset(-1.4), "warn", "1.4 s behind 2 bootstrap peers"),
        (offset(-34.2, error=0.3), "fail", "34.2 s behind 2 bootstrap peers, give or take 0.3 s; from 30 s on nobody"),
        (offset(30.1, error=0.3), "warn", "30.1 s ahead of 2 bootstrap peers, give or take 0.3 s; a swarm's clocks"),
        (offset(-4.2), "warn", "4.2 s behind 2 bootstrap peers; a swarm's clocks should agree within 3 s"),
        (offset(3.1, error=0.5), "warn", "3.1 s ahead of"),
        (offset(5.0, num_agreeing=0), "warn", "do not agree with each other"),
        (offset(0.0, num_desks=1, num_agreeing=1), "ok", "agrees with 1 bootstrap peer within"),
        (None, "warn", "no bootstrap peer told its time"),
    ],
)
def test_clock_fails_only_where_join_would_refuse_it(found: ClockOffset | None, verdict: str, words: str) -> None:
    assert REFUSED_SECONDS == MAX_CLOCK_SECONDS
    judged = judge_clock(found, system=LINUX)
    assert judged.verdict == verdict
    assert words in judged.found
    assert bool(judged.remedy) is (verdict != "ok")


@pytest.mark.parametrize(
    ("system", "words"),
    [
        (LINUX, "timedatectl"),
        (SystemFacts(platform="linux", machine="x86_64", kernel="5.15.1-microsoft-standard-WSL2"), "wsl --shutdown"),
        (SystemFacts(platform="darwin", machine="arm64", kernel="24.1.0"), "sntp"),
    ],
)
def test_clock_is_set_as_the_system_has_it(system: SystemFacts, words: str) -> None:
    assert words in judge_clock(offset(100.0), system=system).remedy


@pytest.mark.parametrize(
    ("reach", "verdict", "words"),
    [
        (ReachFacts(is_reachable=True, place="198.51.100.2:4001"), "ok", "at 198.51.100.2:4001: full peer"),
        (ReachFacts(problem="nobody answers (seen as 198.51.100.2)"), "ok", "client mode, which is fine"),
        (ReachFacts(problem="busy", is_known=False), "warn", "not known (busy)"),
        (None, "warn", "not known (no time left)"),
    ],
)
def test_who_cannot_be_reached_is_welcome_all_the_same(reach: ReachFacts | None, verdict: str, words: str) -> None:
    judged = judge_reach(reach)
    assert judged.verdict == verdict
    assert words in judged.found
