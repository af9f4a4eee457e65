"""Invites: what is pasted comes back whole; what a chat program or a stranger did to one is told in a sentence."""

import base64
import hashlib
import json
from dataclasses import replace

import pytest

from calm_ray.errors import ConfigError
from calm_ray.invite import MAX_ADDRESSES, PREFIX, Invite, decode_invite

PEER_ID = "QmQhps72kzA2DHfBJ6SAWvnXCaBW7KkMeNwt18AxgYxann"
INVITE = Invite(
    run_id="sahajbert-2",
    addresses=(
        f"/ip4/44.77.0.1/tcp/4001/p2p/{PEER_ID}",
        f"/ip6/2001:db8::1/tcp/4001/p2p/{PEER_ID}",
        f"/dns4/boot.example.org/udp/4001/quic-v1/p2p/{PEER_ID}",
    ),
    organiser_key=bytes(range(32)),
)


def seal(content: object) -> str:
    """An invite whose form is right, whatever it says."""
    payload = json.dumps(content).encode()
    return PREFIX + base64.urlsafe_b64encode(payload + hashlib.sha256(payload).digest()[:4]).decode().rstrip("=")


@pytest.mark.parametrize("run_id", ["a", "ab", "abc", "sahajbert-2", "x" * 63])
def test_invite_read_back_is_the_same(run_id: str) -> None:
    invite = replace(INVITE, run_id=run_id)
    assert decode_invite(invite.encode()) == invite


def test_invite_is_one_word_that_a_double_click_selects() -> None:
    text = INVITE.encode()
    assert text.startswith(PREFIX)
    assert text.replace("-", "").replace("_", "").isalnum()


def test_invite_wrapped_by_a_mail_program_is_read_all_the_same() -> None:
    text = INVITE.encode()
    wrapped = "\n".join(text[start : start + 60] for start in range(0, len(text), 60))
    assert decode_invite(f"  {wrapped}\r\n") == INVITE


def test_every_truncated_invite_is_refused() -> None:
    text = INVITE.encode()
    for length in range(len(text)):
        with pytest.raises(ConfigError, match=r"^invite: .*(copy|ask)"):
            decode_invite(text[:length])


def test_every_invite_with_one_wrong_letter_is_refused() -> None:
    text = INVITE.encode()
    for position, letter in enumerate(text[:-1]):  # of the last letter, base64 does not use every bit
        other = "A" if letter != "A" else "B"
        with pytest.raises(ConfigError, match=r"^invite: "):
            decode_invite(text[:position] + other + text[position + 1 :])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must start with `calm1-`, got ``"),
        ("https://example.org/join", "must start with `calm1-`, got `https://exam`"),
        ("/ip4/1.2.3.4/tcp/4001/p2p/Qm", "must start with `calm1-`"),
        ("calm2-AAAA", "must start with `calm1-`"),
        ("calm1-", "incomplete or altered"),
        ("calm1-!!!!", "characters that do not belong there"),
        ("calm1-Ä", "characters that do not belong there"),
        ("calm1-A", "characters that do not belong there"),
        ("calm1-AAAA", "incomplete or altered"),
        (INVITE.encode() + "AAAA", "incomplete or altered"),
    ],
)
def test_what_is_no_invite_is_told_as_such(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^invite: .*{message}"):
        decode_invite(text)


ADDRESS = INVITE.addresses[0]
KEY = "00" * 32


@pytest.mark.parametrize(
    "content",
    [
        None,
        17,
        [],
        {},
        {"run_id": "a", "addresses": [ADDRESS], "key": KEY},
        ["a", [ADDRESS]],
        ["a", [ADDRESS], KEY, "more"],
        [7, [ADDRESS], KEY],
        [None, [ADDRESS], KEY],
        ["../../etc", [ADDRESS], KEY],
        ["UPPER", [ADDRESS], KEY],
        ["a\n", [ADDRESS], KEY],
        ["a" * 64, [ADDRESS], KEY],
        ["a", [], KEY],
        ["a", [ADDRESS] * (MAX_ADDRESSES + 1), KEY],
        ["a", ADDRESS, KEY],
        ["a", [[ADDRESS]], KEY],
        ["a", [None], KEY],
        ["a", ["44.77.0.1:4001"], KEY],
        ["a", ["/ip4/44.77.0.1/tcp/4001"], KEY],
        ["a", [f"/ip4/44.77.0.1/tcp/0/p2p/{PEER_ID}"], KEY],
        ["a", [f"/ip4/44.77.0.1/tcp/65536/p2p/{PEER_ID}"], KEY],
        ["a", [f"/unix/tmp/socket/p2p/{PEER_ID}"], KEY],
        ["a", [f"/ip4/44.77.0.1/tcp/4001/p2p/{PEER_ID}/p2p-circuit"], KEY],
        ["a", [f"/ip4/44.77.0.1 -rm/tcp/4001/p2p/{PEER_ID}"], KEY],
        ["a", [f"/ip4/44.77.0.1/tcp/4001/p2p/{PEER_ID}\n"], KEY],
        ["a", [ADDRESS], KEY[:-2]],
        ["a", [ADDRESS], KEY + "00"],
        ["a", [ADDRESS], "zz" * 32],
        ["a", [ADDRESS], 5],
        ["a", [ADDRESS], None],
    ],
)
def test_invite_with_impossible_content_is_refused(content: object) -> None:
    with pytest.raises(ConfigError, match=r"^invite: its content is not one of ours; ask the organiser for a new one$"):
        decode_invite(seal(content))


def test_invite_that_nests_without_end_is_refused() -> None:
    payload = b"[" * 100_000
    text = PREFIX + base64.urlsafe_b64encode(payload + hashlib.sha256(payload).digest()[:4]).decode().rstrip("=")
    with pytest.raises(ConfigError, match=r"^invite: its content is not one of ours"):
        decode_invite(text)


def test_invite_that_is_not_text_is_refused() -> None:
    payload = b"\xff\xfe"
    text = PREFIX + base64.urlsafe_b64encode(payload + hashlib.sha256(payload).digest()[:4]).decode().rstrip("=")
    with pytest.raises(ConfigError, match=r"^invite: its content is not one of ours"):
        decode_invite(text)
