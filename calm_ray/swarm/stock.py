"""`[run] wire = "hivemind-1.1"`: rounds in which a bare `hivemind.Optimizer` 1.1 can take part.

It is hivemind's own protocol, so each kind of round has a process of its own (`stock_process.py`), forked when this
object is made, and a vector in memory that both share. Prefixes, class names and shapes are those of a bare optimizer;
who differs in any of them is in another swarm. Stock reducers answer `average - mine`, so peers' averages differ in the
last bits on this wire, and there is no digest.

Subclasses of stock's GradientAverager and TrainingStateAverager were rejected: they keep each gradient three times,
serve their buffers as "state", and their `step()` waits for ever for a process that has died.
"""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from hivemind.compression import NoCompression

from calm_ray.errors import SwarmUnreachable
from calm_ray.swarm.codecs import gradient_codec
from calm_ray.swarm.group import Kind
from calm_ray.swarm.limits import RoundLimits
from calm_ray.swarm.node import STARTUP_TIMEOUT_SECONDS, Swarm
from calm_ray.swarm.roster import state_prefix
from calm_ray.swarm.stock_process import (
    GradientAverager,
    NoAnswerError,
    RoundRequest,
    Standing,
    StockProcess,
    TrainingStateAverager,
    Verdict,
)
from calm_ray.swarm.stock_reduce import flaw_of
from calm_ray.swarm.verdict import Outcome, RoundResult

Take = Callable[[], tuple[torch.Tensor, float] | None]
"""Called when the group stands: (flat fp32 vector, its weight), or None to only receive."""

ANSWER_SECONDS = 1.0
"""For a process that has run out of time to say how far it came."""
STATE_WEIGHT = 1.0
"""Of everybody's parameters: bare peers send no other."""


class StockAveraging:
    """Make it before any thread runs: it forks. `average` from one thread per kind; `close` at the end."""

    def __init__(
        self, swarm: Swarm, *, shapes: Sequence[torch.Size], compression: str, limits: RoundLimits, max_weight: float
    ) -> None:
        """`shapes` are the parameters', in the optimizer's order. `compression` is for gradients, and must be that of
        the bare peers in the swarm, as it decides where a vector is cut into parts.
        """
        self.limits = limits
        """Of the rounds that begin from now on."""
        self._own_id = swarm.peer_id
        self._numbers = itertools.count(1)
        self._vectors: dict[Kind, torch.Tensor] = {}
        self._processes: dict[Kind, StockProcess] = {}
        self._max_weights: dict[Kind, float] = {"gradients": max_weight, "state": STATE_WEIGHT}
        kinds: tuple[tuple[Kind, type[StockProcess], str, object], ...] = (
            ("gradients", GradientAverager, f"{swarm.run_id}_grad_averager", gradient_codec(compression)),
            ("state", TrainingStateAverager, state_prefix(swarm.run_id), NoCompression()),
        )
        for kind, process, prefix, codec in kinds:
            vector = torch.zeros(sum(shape.numel() for shape in shapes)).share_memory_()
            parts = vector.split([shape.numel() for shape in shapes])
            self._vectors[kind] = vector
            self._processes[kind] = process(
                swarm, prefix=prefix, tensors=[part.view(shape) for part, shape in zip(parts, shapes, strict=True)],
                codec=codec, limits=limits, max_weight=self._max_weights[kind],
            )  # fmt: skip
        for started in self._processes.values():
            started.start()
        for kind, started in self._processes.items():
            try:
                started.wait_until_ready(STARTUP_TIMEOUT_SECONDS)
            except Exception as exc:
                self.close(linger_seconds=0.0)
                raise SwarmUnreachable(f"the process that averages {kind} did not start: {exc!r}") from exc

    def average(self, kind: Kind, epoch: int, take: Take, *, timeout_seconds: float) -> RoundResult:
        """Find a group and average with it; blocks for `timeout_seconds` at most. Never raises, but what `take` does.

        `take` is called once the group stands, and may wait for the end of an epoch if groups are looked for ahead of
        it. Its vector stays as it is; None: we only read. A vector that is not finite, or beyond 16 bits, or with a
        weight beyond what is allowed is not sent either: we read, and `banned` names ourselves. `epoch` of a state
        round is the one after the step, which bare peers tell each other, too.
        """
        started = time.monotonic()
        process, number, until = self._processes[kind], next(self._numbers), started + timeout_seconds
        flaw = ""
        try:
            process.tell("begin", self._request(number, epoch, started, timeout_seconds))
            answer = process.answer(number, until=until)
            if isinstance(answer, Standing):
                weight, flaw = self._load(kind, take())
                process.tell("contribute", number, weight, weight == 0)
                answer = process.answer(number, until=until)
        except NoAnswerError as exc:
            process.tell("abandon", number)
            return RoundResult(outcome=exc.outcome, detail=exc.detail, seconds=time.monotonic() - started)
        except BaseException:
            process.tell("abandon", number)
            raise
        assert isinstance(answer, Verdict)
        result = replace(self._result(kind, answer), seconds=time.monotonic() - started)
        if not flaw:
            return result
        outcome: Outcome = "non_finite" if result.outcome == "zero_weight" else result.outcome
        detail = "; ".join(filter(None, [f"our own vector: {flaw}", result.detail]))
        return replace(result, outcome=outcome, detail=detail, banned={**result.banned, self._own_id: flaw})

    def is_alive(self) -> bool:
        """Whether both averaging processes run. Without one, rounds of its kind fail for ever."""
        return all(process.is_alive() for process in self._processes.values())

    def close(self, *, linger_seconds: float | None = None) -> None:
        """End both processes; who still fetches an average from us gets `linger_seconds`, or the rest of the round."""
        linger = self.limits.round_seconds if linger_seconds is None else linger_seconds
        for process in self._processes.values():
            process.close(linger_seconds=linger)

    def _request(self, number: int, epoch: int, started: float, timeout_seconds: float) -> RoundRequest:
        reserve = min(self.limits.round_seconds, timeout_seconds / 2)
        return RoundRequest(
            number=number, epoch=epoch, search_until=started + timeout_seconds - reserve,
            deadline=started + timeout_seconds - min(ANSWER_SECONDS, timeout_seconds / 10), limits=self.limits,
        )  # fmt: skip

    def _load(self, kind: Kind, contribution: tuple[torch.Tensor, float] | None) -> tuple[float, str]:
        """Put what we bring into the shared vector. Returns its weight, 0 if we only read, and why it is not sent."""
        shared, flaw = self._vectors[kind], ""
        if contribution is not None:
            vector, weight = contribution
            assert vector.shape == shared.shape and vector.dtype == shared.dtype
            flaw = flaw_of(vector) if 0 <= weight <= self._max_weights[kind] else f"weight {weight:g}"
            if weight and not flaw:
                shared.copy_(vector)
                return float(weight), ""
        shared.zero_()
        return 0.0, flaw

    def _result(self, kind: Kind, verdict: Verdict) -> RoundResult:
        result = RoundResult(
            outcome=verdict.outcome, detail=verdict.detail, group_size=verdict.group_size,
            bytes_sent=verdict.traffic.sent, bytes_received=verdict.traffic.received,
        )  # fmt: skip
        if (report := verdict.report) is not None:
            result = replace(
                result, num_senders=report.num_senders, weights=report.weights, banned=report.banned,
                total_weight=math.fsum(report.weights.values()), missing_fraction=report.missing_fraction,
            )  # fmt: skip
        if result.outcome != "averaged":
            return result
        average = self._vectors[kind].clone()
        if flaw := flaw_of(average):
            return replace(result, outcome="non_finite", detail=f"average {flaw}")
        return replace(result, average=average)
