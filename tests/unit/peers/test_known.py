"""What a peer remembers of others: bounded, and only what can be dialled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from calm_ray.peers.known import MAX_KEPT, KnownPeers, load_known, one_each, remember, save_known
from calm_ray.peers.spec import KNOWN_FILE

IDS = [f"QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxa{number + 111}".replace("0", "a") for number in range(40)]
RELAYED = f"/ip4/1.2.3.4/tcp/4001/p2p/{IDS[0]}/p2p-circuit/p2p/{IDS[1]}"
ZONED = f"/ip6zone/eth0/ip6/fe80::1/tcp/4001/p2p/{IDS[1]}"


def address(number: int, *, port: int = 4001) -> str:
    return f"/ip4/44.77.0.{number}/tcp/{port}/p2p/{IDS[number]}"


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    known = KnownPeers(listen="/ip4/0.0.0.0/tcp/4001", is_client_mode=False, addresses=(address(1), address(2)))
    save_known(tmp_path, known)
    assert load_known(tmp_path) == known


def test_nothing_is_known_without_a_sound_file(tmp_path: Path) -> None:
    assert load_known(tmp_path) == KnownPeers()
    (tmp_path / KNOWN_FILE).write_text('{"addresses": 7}')
    assert load_known(tmp_path) == KnownPeers()


def test_addresses_that_cannot_be_dialled_are_dropped_and_cost_nothing_else(tmp_path: Path) -> None:
    """One relayed neighbour made every later start fail."""
    told = {"listen": "/ip4/0.0.0.0/tcp/4001", "addresses": [RELAYED, address(1), ZONED, "rubbish", address(1)]}
    (tmp_path / KNOWN_FILE).write_text(json.dumps(told))
    known = load_known(tmp_path)
    assert known.addresses == (address(1),)
    assert known.listen == "/ip4/0.0.0.0/tcp/4001"


def test_too_many_addresses_are_cut_short(tmp_path: Path) -> None:
    (tmp_path / KNOWN_FILE).write_text(json.dumps({"addresses": [address(number) for number in range(40)]}))
    assert load_known(tmp_path).addresses == tuple(address(number) for number in range(MAX_KEPT))


def test_one_address_of_each_peer_is_kept() -> None:
    assert one_each([address(1, port=7), address(2), address(1, port=8), RELAYED]) == (address(1, port=7), address(2))


def test_addresses_that_are_given_come_before_those_that_were_known(tmp_path: Path) -> None:
    save_known(tmp_path, KnownPeers(listen="/ip4/0.0.0.0/tcp/4001", addresses=(address(1), address(2))))
    remember(tmp_path, [address(3), address(2, port=8), ZONED])
    known = load_known(tmp_path)
    assert known.addresses == (address(3), address(2, port=8), address(1))
    assert known.listen == "/ip4/0.0.0.0/tcp/4001"


def test_blank_folder_remembers_what_it_is_given(tmp_path: Path) -> None:
    remember(tmp_path / "new", [])
    assert not (tmp_path / "new").exists()
    remember(tmp_path / "new", [address(1)])
    assert load_known(tmp_path / "new").addresses == (address(1),)


def test_whoever_starts_peers_pays_nothing_heavy_for_it() -> None:
    code = "import sys, calm_ray.peers.known; print({'torch', 'hivemind', 'ray', 'safetensors'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("wanted", ["/ip4/0.0.0.0/tcp/5000", "/ip4/127.0.0.1/tcp/0"])
def test_port_of_before_is_used_only_where_it_fits(wanted: str) -> None:
    assert KnownPeers(listen="/ip4/0.0.0.0/tcp/4001").free_listen(wanted) == wanted
