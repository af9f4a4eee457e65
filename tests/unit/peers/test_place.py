"""Whether this machine is somewhere else than it was: what the operating system says is faked."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from calm_ray.peers import place
from calm_ray.peers.place import Place, has_moved, own_place

HOME, DOCKER = "192.168.1.5", "172.17.0.1"


def at(source: str, *hosts: str) -> Place:
    return Place(source=source, hosts=frozenset({*hosts, *([source] if source else [])}))


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        (at(HOME), at(HOME, "10.0.0.2"), False),
        (at(HOME, DOCKER), at("10.0.0.2", DOCKER), True),  # it went elsewhere, and took Docker with it
        (at(HOME, DOCKER), at("10.8.0.2", HOME, DOCKER), False),  # a VPN began
        (at("10.8.0.2", HOME), at(HOME), True),  # and ended
        (at(HOME, DOCKER), at("", DOCKER), False),  # the cable is out: nowhere, yet
        (at(HOME), at(""), False),
        (at("", "1.2.3.4"), at("", "1.2.3.4", "10.0.0.2"), False),  # a network without a way out
        (at("", "1.2.3.4", "10.0.0.2"), at("", "10.0.0.2"), False),
        (at("", "1.2.3.4"), at("", "10.0.0.2"), True),
        (at(""), at(HOME), False),
    ],
)
def test_machine_has_moved_once_its_way_out_begins_elsewhere(before: Place, now: Place, expected: bool) -> None:
    assert has_moved(before, now) is expected


def interfaces(*addresses: str) -> dict[str, list[SimpleNamespace]]:
    return {
        str(number): [SimpleNamespace(family=socket.AF_INET6 if ":" in text else socket.AF_INET, address=text)]
        for number, text in enumerate(addresses)
    }


def test_place_holds_what_others_could_see(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = interfaces("127.0.0.1", "::1", "fe80::1%eth0", "169.254.7.7", HOME, "2001:db8:1::2")
    seen["link"] = [SimpleNamespace(family=getattr(socket, "AF_PACKET", -1), address="00:11:22:33:44:55")]
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: seen)
    monkeypatch.setattr(place, "_source", lambda family, anywhere: HOME if family == socket.AF_INET else "")
    assert own_place() == Place(source=HOME, hosts=frozenset({HOME, "2001:db8:1::2"}))
    assert str(own_place()) == HOME


def test_way_out_that_begins_at_no_visible_address_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: interfaces("169.254.7.7", HOME))
    monkeypatch.setattr(place, "_source", lambda family, anywhere: "169.254.7.7")
    assert own_place() == Place(hosts=frozenset({HOME}))
    assert str(own_place()) == HOME


def test_this_machine_can_be_asked() -> None:
    found = own_place()
    assert not found.source or found.source in found.hosts
