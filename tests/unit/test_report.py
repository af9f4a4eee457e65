"""Reports come from strangers: whatever the bytes, they are a report within its bounds or they are refused."""

import json
import math
from typing import Any

import pytest

from calm_ray.report import (
    MAX_LISTED,
    MAX_REPORT_BYTES,
    EpochRecord,
    PeerReport,
    ReportRejected,
    RoundCounts,
    RoundReport,
    decode,
    encode,
)

NOW = 1_000_000.0
HASH = "ab" * 32


def last_epoch(epoch: int = 9, **changes: Any) -> EpochRecord:
    values = {"epoch": epoch, "mini_steps": 10, "num_samples": 160, "mlm_loss_sum": 50.0, "sop_loss_sum": 7.0}
    return EpochRecord(**(values | changes))


def report(peer_id: str = "Qma", **changes: Any) -> PeerReport:
    values: dict[str, Any] = {
        "peer_id": peer_id, "boot_id": "b1", "role": "trainer", "version": "0.1.0", "config_hash": HASH,
        "state": "training", "is_client_mode": False, "epoch": 10, "samples_accumulated": 100,
        "samples_per_second": 10.0, "last_epoch": last_epoch(), "published_at": NOW - 5,
    }  # fmt: skip
    return PeerReport(**(values | changes))


def last_round(**changes: Any) -> RoundReport:
    values: dict[str, Any] = {
        "epoch": 9, "outcome": "averaged", "digest": "d" * 64, "group_size": 3, "total_weight": 96.0,
        "weights": {"abcdefghij": 64.0, "abcdefghik": 32.0}, "seconds": 1.5, "bytes_sent": 4000, "bytes_received": 5000,
    }  # fmt: skip
    return RoundReport(**(values | changes))


def test_report_encoded_and_decoded_is_the_same() -> None:
    original = report(name="Zoë @home", rounds=RoundCounts(averaged=3, alone=1), last_group_size=4)
    original = original.model_copy(update={"last_round": last_round(), "num_resyncs": 1, "parameter_norm": 73.5})
    assert decode(encode(original)) == original


TINY = 2.2250738585072014e-308
"""No float is longer in JSON."""
WIDEST = report(
    "z" * 64, boot_id="b" * 36, name="𐐷" * 32, version="1" * 32, config_hash="f" * 64,
    role="auxiliary", state="assisting", epoch=10**9, samples_accumulated=10**9, samples_per_second=TINY,
    samples_contributed=10**15, last_group_size=4096, published_at=1e11 / 7, num_resyncs=10**9, parameter_norm=TINY,
    rounds=RoundCounts(**dict.fromkeys(RoundCounts.model_fields, 10**9)),
    last_epoch=EpochRecord(epoch=10**9, mini_steps=10**7, num_samples=10**9, mlm_loss_sum=TINY, sop_loss_sum=TINY),
    last_round=RoundReport(
        epoch=10**9, outcome="only_clients", digest="d" * 64, group_size=4096, total_weight=999_999_999.9,
        weights={f"{i:010b}".replace("0", "z"): 999_999.9 for i in range(MAX_LISTED)}, num_banned=4096,
        seconds=999_999.999, bytes_sent=10**13, bytes_received=10**13,
    ),
)  # fmt: skip


def test_report_with_every_field_at_its_bound_fits_into_the_dht() -> None:
    assert len(encode(WIDEST)) < MAX_REPORT_BYTES
    assert decode(encode(WIDEST)) == WIDEST


def test_report_of_a_usual_peer_is_small() -> None:
    peer = report("Qm" + "a" * 44, boot_id="b" * 32, name="volunteer", last_round=last_round())
    assert len(encode(peer)) < 1024


def test_report_with_one_more_weight_is_our_own_mistake() -> None:
    with pytest.raises(ValueError, match="weights"):
        last_round(weights={f"{i:010b}".replace("0", "z"): 1.0 for i in range(MAX_LISTED + 1)})


@pytest.mark.parametrize(
    "data",
    [
        b"", b"null", b"[]", b"7", b'"x"', b"{", b"\xff\xfe{}", b"[" * MAX_REPORT_BYTES, b'{"a":' * 400,
        b"9" * MAX_REPORT_BYTES, b'{"epoch":' + b"9" * 2000 + b"}", b"\x00" * 10, b'{"name":"\\ud800"}', b"{}\n{}",
    ],
    ids=repr,
)  # fmt: skip
def test_decode_of_bytes_that_are_no_report_says_malformed(data: bytes) -> None:
    with pytest.raises(ReportRejected) as caught:
        decode(data)
    assert caught.value.reason == "malformed"
    assert len(str(caught.value)) <= 200


def altered(**changes: Any) -> bytes:
    """An honest report with fields replaced after validation, as a stranger would send it."""
    return json.dumps(json.loads(encode(report())) | changes).encode()


RECORD = json.loads(encode(report()))["last_epoch"]
ROUND = json.loads(encode(report(last_round=last_round())))["last_round"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b" " * (MAX_REPORT_BYTES + 1), "oversized"),
        (altered(samples_per_second=math.nan), "non-finite"),
        (altered(published_at=math.inf), "non-finite"),
        (altered().replace(b'"samples_per_second": 10.0', b'"samples_per_second": 1e999'), "non-finite"),
        (altered()[:-1] + b',"epoch":3}', "malformed"),
        (altered(colour="red"), "malformed"),
        (altered(**{"a\nb" * 100: 1}), "malformed"),
        (altered(epoch="10"), "malformed"),
        (altered(epoch=True), "malformed"),
        (altered(epoch=10.0), "malformed"),
        (altered(role="king"), "malformed"),
        (altered(name="[red]x[/red]"), "malformed"),
        (altered(name="line\nbreak"), "malformed"),
        (altered(name="\ud800"), "malformed"),
        (altered(name="right\u202eleft"), "malformed"),
        (altered(peer_id="not base58: 0OIl"), "malformed"),
        (altered(epoch=-1), "epoch-out-of-reach"),
        (altered(epoch=10**300), "epoch-out-of-reach"),
        (altered(samples_per_second=1e30), "impossible-rate"),
        (altered(last_epoch=RECORD | {"mini_steps": 0}), "zero-mini-steps"),
        (altered(last_epoch=RECORD | {"mlm_loss_sum": -1e30}), "absurd-loss"),
        (altered(last_round=ROUND | {"outcome": "won"}), "malformed"),
        (altered(last_round=ROUND | {"digest": "d" * 63}), "malformed"),
        (altered(last_round=ROUND | {"digest": "D" * 64}), "malformed"),
        (altered(last_round=ROUND | {"bytes_sent": 10**14}), "malformed"),
        (altered(last_round=ROUND | {"weights": [["abcdefghij", 1.0]]}), "malformed"),
        (altered(last_round=ROUND | {"weights": {"abcdefghij": "1.0"}}), "malformed"),
        (altered(last_round=ROUND | {"weights": {"abcdefghij": -1.0}}), "malformed"),
        (altered(last_round=ROUND | {"weights": {"abcdefghij": 1e9}}), "malformed"),
        (altered(last_round=ROUND | {"weights": {"abcdefghij": math.nan}}), "non-finite"),
        (altered(last_round=ROUND | {"weights": {"too long for it": 1.0}}), "malformed"),
        (altered(last_round=ROUND | {"weights": {"a\nb": 1.0}}), "malformed"),
        (altered(rounds={"averaged": 10**10}), "malformed"),
        (altered(parameter_norm=-1.0), "malformed"),
    ],
)
def test_decode_of_a_lie_names_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ReportRejected) as caught:
        decode(data)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
