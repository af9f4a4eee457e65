"""How long does one all-reduce take between homes? `python -m benchmarks.averaging [--million N] [--codec ...]`

Hosts of 200, 100, 50 and 20 Mbit/s in each direction, each in a network namespace of its own, and an auxiliary peer of
200 Mbit/s that brings nothing and reduces. 20 M parameters. Seconds count from the moment the first member has the
group until the last one has copied the average into its parameters, hash and all; matching stands beside it.

The limit of a split is the larger of two: what its busiest line needs for the payload alone; and the processor time
that all codecs took, shared by the two cores that the hosts share here. The line of 20 Mbit/s bounds every split: its
owner's vector goes up once and the average comes down once. Of what is above the limit, 4.6 % are the headers of TCP,
IP and Ethernet and 2 % the acknowledgements of the other direction; the rest is a quarter to half a second for each
round: until the first parts are there, for the last ones to come back through two queues, and for copying. Hence 8-bit
rounds, whose limit is only 8 s, stay further above it.

What had to go to get there (ratios of the weighted split in fp32, where nothing else is said):

- 1.25 -> 1.10: the sender's windows. Without them libp2p takes megabytes, and the permissions for the other direction
  wait behind them: see `calm_ray.swarm.exchange_window`. 1.10 -> 1.08:
  windows for 0.06 s of queue instead of 0.1; with 0.15, 1.12. Windows by round trip instead of one way: 1.12 to 1.25.
- More streams instead (9 of 256 kB each): 1.28 to 1.35. Each direction waits longer still for the other.
- Parts of 512 KiB, as hivemind's, take 0.2 s each over the slowest line, twice; of 32 KiB: 13 ms.
- Hashing after the round: 0.1 to 0.3 s for five hosts on two cores, now done while parts come: see
  `calm_ray.swarm.parts`.
- BBR as congestion control, this machine's default: 1.16 to 1.25 for the same rounds, and 1.10 to 1.41 for plain TCP
  sockets in both directions; CUBIC, which nearly all computers use, takes plain sockets to 1.07.
- Not the interpreter: all five hosts together use a fifth of a core, and their `p2pd` as much again.

Other work on the machine shows at once. Needs root.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.averaging_peer import HostSpec, RoundSpec
from calm_ray.swarm.part_codecs import CODECS
from calm_ray.swarm.shares import balance, seconds_on_the_wire
from tests.integration.namespaces import PUBLIC_NET, Internet

MBIT = 1e6 / 8
LINES = (200, 100, 50, 20, 200)
"""Mbit/s of each host; the last is the auxiliary peer."""
NUM_CORES = 2
PORT = 4001
STOP_SECONDS = 60.0
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class HostProcess:
    """A started host and the pipes to it."""

    spec: HostSpec
    process: "subprocess.Popen[str]"
    peer_id: str = ""

    @property
    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin is not None and self.process.stdout is not None
        return self.process.stdin, self.process.stdout

    def tell(self, message: str) -> None:
        self._pipes[0].write(message + "\n")
        self._pipes[0].flush()

    def hear(self) -> dict[str, Any]:
        line = self._pipes[1].readline()
        if not line:
            raise RuntimeError(f"host {self.spec.number} has ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def leave(self) -> None:
        self._pipes[0].close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=float, default=20.0, help="parameters, in millions (default: 20)")
    parser.add_argument("--codec", choices=[*CODECS], nargs="+", default=[*CODECS])
    parser.add_argument("--split", choices=["equal", "weighted"], nargs="+", default=["equal", "weighted"])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--bare", action="store_true", help="also hivemind's own averager, in fp32")
    parser.add_argument("--details", action="store_true", help="print what each host measured")
    arguments = parser.parse_args()
    num_elements = round(arguments.million * 1e6)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces are removed
    with Internet() as internet:
        hosts = start_hosts(internet, num_elements=num_elements)
        print(heading(num_elements))
        epoch = 0
        for codec in arguments.codec:
            for split in arguments.split:
                for _ in range(arguments.repeats):
                    epoch += 1
                    facts = run_round(hosts, epoch=epoch, codec=codec, is_weighted=split == "weighted")
                    print(row_of(hosts, facts, codec=codec, split=split, num_elements=num_elements), flush=True)
                    if arguments.details:
                        for host, fact in zip(hosts, facts, strict=True):
                            print(details_of(host, fact), flush=True)
        stop(hosts)
        if arguments.bare:
            hosts = start_hosts(internet, num_elements=num_elements, module="benchmarks.averaging_bare")
            print("hivemind's own averager, fp32")
            for number, split in enumerate(arguments.split * arguments.repeats):
                facts = run_round(hosts, epoch=number, codec="none", is_weighted=split == "weighted")
                print(bare_row_of(facts, split=split), flush=True)
            stop(hosts)


def start_hosts(
    internet: Internet, *, num_elements: int, module: str = "benchmarks.averaging_peer"
) -> list[HostProcess]:
    """All hosts, known to each other, on lines of their speed."""
    hosts: list[HostProcess] = []
    bootstrap: list[str] = []
    for number, mbit in enumerate(LINES):
        namespace = f"{internet.prefix}-host{number + 1}"
        if namespace not in internet.names:
            internet.public_host(number + 1)
            internet.shape(number + 1, mbit=mbit)
        spec = HostSpec(
            number=number,
            address=f"/ip4/{PUBLIC_NET}.{number + 1}/tcp/{PORT}",
            bootstrap=bootstrap,
            num_elements=num_elements,
            bandwidth=mbit * MBIT,
            is_sender=number < len(LINES) - 1,
        )
        process = subprocess.Popen(
            internet.inside(namespace, sys.executable, "-m", module, spec.model_dump_json()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
        )
        host = HostProcess(spec, process)
        hosts.append(host)
        hello = host.hear()
        host.peer_id, bootstrap = hello["peer_id"], [*bootstrap, *hello["addresses"]]
    return hosts


def stop(hosts: list[HostProcess]) -> None:
    for host in hosts:
        host.leave()
    for host in hosts:
        host.process.wait(timeout=STOP_SECONDS)


def run_round(hosts: list[HostProcess], *, epoch: int, codec: str, is_weighted: bool) -> list[dict[str, Any]]:
    spec = RoundSpec(
        epoch=epoch, codec=codec, is_weighted=is_weighted, everyone=[host.peer_id for host in hosts]
    ).model_dump_json()
    for host in hosts:
        host.tell(spec)
    return [host.hear() for host in hosts]


def limits_of(
    facts: list[dict[str, Any]], shares: list[float], *, codec: str, num_elements: int
) -> tuple[float, float]:
    """Seconds that the lines need at least for a split, and that the codecs took on two cores."""
    wire = seconds_on_the_wire(
        shares,
        vector_bytes=CODECS[codec].encoded_bytes(num_elements),
        bandwidths=[mbit * MBIT for mbit in LINES],
        is_sender=[number < len(LINES) - 1 for number in range(len(LINES))],
    )
    return wire, sum(fact["codec_seconds"] for fact in facts) / NUM_CORES


def heading(num_elements: int) -> str:
    return (
        f"{num_elements / 1e6:g} M parameters, lines of {', '.join(map(str, LINES))} Mbit/s, the last one auxiliary\n"
        "codec split    | match  all-reduce | limit: wire  codec | ratio | best split: wire, ratio | "
        "true group bits  error   CPU: peers p2pd"
    )


def row_of(hosts: list[HostProcess], facts: list[dict[str, Any]], *, codec: str, split: str, num_elements: int) -> str:
    formed = min(fact["formed"] for fact in facts)
    matching = max(fact["formed"] for fact in facts) - min(fact["started"] for fact in facts)
    seconds = max(fact["ended"] for fact in facts) - formed
    shares = [facts[0]["fractions"].get(host.peer_id, 0.0) for host in hosts]
    wire, codecs = limits_of(facts, shares, codec=codec, num_elements=num_elements)
    best = balance(
        [mbit * MBIT for mbit in LINES],
        is_sender=[host.spec.is_sender for host in hosts],
        can_reduce=[True] * len(hosts),
    )
    best_wire, _ = limits_of(facts, best, codec=codec, num_elements=num_elements)
    limit, best_limit = max(wire, codecs), max(best_wire, codecs)
    is_true = all(fact["outcome"] == "averaged" for fact in facts)
    return (
        f"{codec:5} {split:8} | {matching:5.2f}  {seconds:10.2f} | {wire:11.2f} {codecs:6.2f} | "
        f"{seconds / limit:5.3f} | {best_wire:16.2f}, {seconds / best_limit:5.3f} | "
        f"{'yes' if is_true else 'NO':4} {min(fact['group_size'] for fact in facts):5} "
        f"{'equal' if len({fact['digest'] for fact in facts}) == 1 else 'DIFFER'} "
        f"{max(fact['error'] for fact in facts):.0e}  {sum(fact['cpu_seconds'] for fact in facts):10.1f} "
        f"{sum(fact['daemon_seconds'] for fact in facts):4.1f}"
    )


def bare_row_of(facts: list[dict[str, Any]], *, split: str) -> str:
    trainers = facts[:-1]
    formed = min(fact["formed"] for fact in facts)
    matching = max(fact["formed"] for fact in facts) - min(fact["started"] for fact in facts)
    outcomes = sorted({fact["outcome"] for fact in facts})
    return (
        f"bare  {split:8} | {matching:5.2f}  {max(fact['ended'] for fact in facts) - formed:10.2f} | "
        f"groups of {[fact['group_size'] for fact in facts]}, trainers' largest error "
        f"{max(fact['error'] for fact in trainers):.0e}, {', '.join(outcomes)}"
    )


def details_of(host: HostProcess, fact: dict[str, Any]) -> str:
    names = ("outcome", "detail", "bytes_sent", "bytes_received", "codec_seconds", "cpu_seconds", "daemon_seconds")
    share, seconds = fact["fractions"][host.peer_id], fact["ended"] - fact["formed"]
    facts = " ".join(
        f"{name}={fact[name]:.4g}" if isinstance(fact[name], float) else f"{name}={fact[name]}" for name in names
    )
    return f"    {LINES[host.spec.number]:4} Mbit/s share={share:.3f} seconds={seconds:.2f} {facts}"


if __name__ == "__main__":
    main()
