"""Multiaddresses: what is read from them, and how their verdicts sound. Probing real ports is tested with the desk."""

import socket

import pytest

from calm_ray.swarm.addresses import Verdict, all_refuse, live_addresses, parse_address, peer_at, probe

PEER_ID = "QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxann"


@pytest.mark.parametrize(
    ("text", "host", "port", "is_tcp", "peer_id"),
    [
        ("/ip4/44.77.0.1/tcp/4001", "44.77.0.1", 4001, True, ""),
        (f"/ip4/44.77.0.1/tcp/4001/p2p/{PEER_ID}", "44.77.0.1", 4001, True, PEER_ID),
        (f"/ip6/2001:db8::1/tcp/1/p2p/{PEER_ID}", "2001:db8::1", 1, True, PEER_ID),
        (f"/dns4/boot.example.org/tcp/65535/p2p/{PEER_ID}", "boot.example.org", 65535, True, PEER_ID),
        ("/dns/boot.example.org/tcp/4001", "boot.example.org", 4001, True, ""),
        (f"/ip4/44.77.0.1/udp/4001/quic-v1/p2p/{PEER_ID}", "44.77.0.1", 4001, False, PEER_ID),
        (f"/ip4/44.77.0.1/tcp/4001/ws/p2p/{PEER_ID}", "44.77.0.1", 4001, True, PEER_ID),
    ],
)
def test_multiaddress_is_split_into_its_parts(text: str, host: str, port: int, is_tcp: bool, peer_id: str) -> None:
    address = parse_address(text)
    assert (address.text, address.host, address.port, address.is_tcp, address.peer_id) == (
        text, host, port, is_tcp, peer_id,
    )  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "44.77.0.1:4001",
        "https://example.org",
        "/ip4/44.77.0.1",
        "/ip4/44.77.0.1/tcp",
        "/ip4/44.77.0.1/tcp/",
        "/ip4/44.77.0.1/tcp/port",
        "/ip4/44.77.0.1/tcp/0",
        "/ip4/44.77.0.1/tcp/65536",
        "/ip4/44.77.0.1/tcp/-1",
        "/ip4//tcp/4001",
        "/unix/tmp/socket/tcp/4001",
        "/ip4/44.77.0.1/tcp/4001\n",
        f"/ip4/44.77.0.1/tcp/4001/p2p/{PEER_ID}/p2p-circuit",
    ],
)
def test_what_is_no_multiaddress_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a multiaddress with host and port"):
        parse_address(text)


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("/ip4/127.0.0.1", True),
        ("/ip4/127.8.8.8", True),
        ("/ip6/::1", True),
        ("/dns4/localhost", True),
        ("/ip4/0.0.0.0", False),
        ("/ip4/192.168.1.2", False),
        ("/dns4/localhost.example.org", False),
        ("/ip6/2001:db8::1", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert parse_address(f"{host}/tcp/4001").is_loopback is expected


def test_verdict_names_host_port_and_problem() -> None:
    address = parse_address(f"/dns4/boot.example.org/tcp/4001/p2p/{PEER_ID}")
    assert str(Verdict(address=address, problem="name does not resolve")) == (
        "boot.example.org:4001 name does not resolve"
    )
    assert str(Verdict(address=address, problem="")) == "boot.example.org:4001 accepts connections"


def test_udp_address_gets_the_benefit_of_the_doubt() -> None:
    text = f"/ip4/44.77.0.1/udp/4001/quic-v1/p2p/{PEER_ID}"
    assert not probe(parse_address(text), timeout_seconds=0.0).problem
    others = [text.replace("44.77.0.1", f"44.77.0.{n}") for n in (3, 2)]
    assert live_addresses([text, *others]) == [text, *others], "the organiser's order is kept"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"/ip4/44.77.0.1/tcp/4001/p2p/{PEER_ID}", PEER_ID),
        ("/ip4/44.77.0.1/tcp/4001", ""),
        (f"/ip4/44.77.0.1/udp/4001/quic-v1/p2p/{PEER_ID}", ""),
        (f"/ip4/44.77.0.1/tcp/4001/p2p/{PEER_ID}/p2p-circuit/p2p/{PEER_ID}", ""),
        (f"/ip6zone/eth0/ip6/fe80::1/tcp/4001/p2p/{PEER_ID}", ""),
        ("/ip4/44.77.0.1/tcp/4001/p2p/Qm0OIl", ""),
        ("rubbish", ""),
    ],
)
def test_peer_is_found_in_what_can_be_dialled(text: str, expected: str) -> None:
    assert peer_at(text) == expected


def test_machines_that_refuse_are_told_from_silence() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = f"/ip4/127.0.0.1/tcp/{closed.getsockname()[1]}/p2p/{PEER_ID}"
        assert all_refuse([refused])
        assert not all_refuse([refused, f"/dns4/no-such-host.invalid/tcp/4001/p2p/{PEER_ID}"])
        closed.listen()
        assert not all_refuse([refused]), "somebody is there"
