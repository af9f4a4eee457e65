"""One host of `benchmarks.averaging --bare`: hivemind's own DecentralizedAverager, in fp32, on the same lines.

Its auxiliary mode is used as it is: such a peer uploads a whole vector of weight 0 (`modes` get lost between averager
and runner in 1.1.12), and so would have been slower still if its line were.
"""

import json
import sys
import time

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager

from benchmarks.averaging_peer import TILE_ELEMENTS, HostSpec, RoundSpec, say

MATCHMAKING_SECONDS = 10.0
ROUND_SECONDS = 300.0
CHUNK_SECONDS = 60.0
POLL_SECONDS = 0.01
MBIT = 1e6 / 8


def main(spec: HostSpec) -> None:
    dht = hivemind.DHT(initial_peers=spec.bootstrap or None, start=True, host_maddrs=[spec.address])
    say(peer_id=dht.peer_id.to_base58(), addresses=[str(address) for address in dht.get_visible_maddrs()])
    noise = torch.randn(TILE_ELEMENTS, generator=torch.Generator().manual_seed(0))
    noise = noise.repeat(-(-spec.num_elements // TILE_ELEMENTS))[: spec.num_elements]
    averagers = []
    for line in sys.stdin:
        plan = RoundSpec.model_validate_json(line)
        averager = DecentralizedAverager(
            [noise * (1 + spec.number) if spec.is_sender else torch.zeros(spec.num_elements)],
            dht,
            prefix=f"bare{plan.epoch}",
            start=True,
            min_matchmaking_time=MATCHMAKING_SECONDS,
            target_group_size=len(plan.everyone),
            bandwidth=spec.bandwidth / MBIT if plan.is_weighted else None,
            auxiliary=not spec.is_sender,
            allreduce_timeout=ROUND_SECONDS,
            next_chunk_timeout=CHUNK_SECONDS,
        )
        averagers.append(averager)  # not shut down before all are done: its groupmates may still read from it
        say(**_take_part(averager, noise, num_senders=len(plan.everyone) - 1))
    for averager in averagers:
        averager.shutdown()
    dht.shutdown()


def _take_part(averager: DecentralizedAverager, noise: torch.Tensor, *, num_senders: int) -> dict[str, object]:
    started = time.monotonic()
    control = averager.step(wait=False, timeout=MATCHMAKING_SECONDS + ROUND_SECONDS)
    formed = 0.0
    while not control.done():
        if not formed and control.began_allreduce:
            formed = time.monotonic()
        time.sleep(POLL_SECONDS)
    ended = time.monotonic()
    try:
        group_size = len(control.result() or ())
    except Exception as exc:  # noqa: BLE001  whatever it is, it is what is reported
        return {
            "outcome": repr(exc)[:100],
            "group_size": 0,
            "started": started,
            "formed": ended,
            "ended": ended,
            "error": 1,
        }
    with averager.get_tensors() as (average,):
        mean = noise * ((1 + num_senders) / 2)
        error = float((average - mean).abs().max() / mean.abs().max())
    return {
        "outcome": "averaged",
        "group_size": group_size,
        "started": started,
        "formed": formed or started,
        "ended": ended,
        "error": error,
    }


if __name__ == "__main__":
    main(HostSpec(**json.loads(sys.argv[1])))
