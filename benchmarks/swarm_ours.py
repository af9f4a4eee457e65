"""Our optimizer in a measured or tested process: every round and every change of its parameters goes to the journal."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.swarm_spec import Journal, ProcessSpec
from benchmarks.swarm_tasks import Task, digest_of, norm_only
from calm_ray.swarm.averaging import OwnAveraging
from calm_ray.swarm.exchange import Exchange
from calm_ray.swarm.group import Group, Kind
from calm_ray.swarm.holder import StepRules
from calm_ray.swarm.node import NodeOptions, Swarm
from calm_ray.swarm.rounds import SwarmOptimizer
from calm_ray.swarm.verdict import RoundResult
from calm_ray.training.optim import make_optimizer, make_schedule

FIRST_FETCH_SECONDS = 10.0
CHANGES = ("step", "load", "load_parameters")
"""The methods of `StateHolder` that change parameters: a step, a downloaded state, an average of parameters."""


class OurStepper:
    """`SwarmOptimizer` as `calm_ray.peers.trainer` and `calm_ray.peers.auxiliary` use it."""

    def __init__(self, spec: ProcessSpec, task: Task, journal: Journal) -> None:
        self._journal = journal
        self._swarm = Swarm.join(
            spec.run_id,
            initial_peers=spec.initial_peers,
            options=NodeOptions(
                is_client_mode=spec.role == "client", listen="/ip4/127.0.0.1/tcp/0",
                identity_path=spec.folder / "identity",
            ),
        )  # fmt: skip
        self.peer_id = self._swarm.peer_id
        self.addresses = [] if spec.role == "client" else self._swarm.addresses()
        if spec.should_watch:
            _watch_rounds(journal)
        table = task.optimizer_table
        self.optimizer = SwarmOptimizer(
            self._swarm, param_groups=task.param_groups, averaging=spec.averaging,
            target_batch_size=spec.target_batch_size, num_epochs=spec.num_epochs,
            is_auxiliary=spec.role == "auxiliary",
            rules=StepRules(
                make_optimizer=lambda groups: make_optimizer(groups, table=table),
                make_schedule=make_schedule(table), before_step=norm_only,
            ),
        )  # fmt: skip
        self.optimizer.on_round.append(self._on_round)
        if spec.should_watch:
            for name in CHANGES:
                self._watch_holder(name)

    @property
    def epoch(self) -> int:
        return self.optimizer.local_epoch

    def begin(self) -> None:
        self.optimizer.wait_for_swarm(timeout_seconds=FIRST_FETCH_SECONDS)
        if self.optimizer.swarm_epoch > self.optimizer.local_epoch:
            self.optimizer.load_state_from_peers()
        self._journal.write("begin", epoch=self.epoch)
        self.optimizer.start()

    def step(self, num_samples: int) -> None:
        self.optimizer.step(batch_size=num_samples)
        self.optimizer.zero_grad()

    def settle(self) -> None:
        """The last round has been stepped when its epoch is over, but the model learns of it at the next `step`."""
        self.optimizer.holder.copy_to_model()

    def assist(self) -> None:
        if self.optimizer.failure is not None:
            raise self.optimizer.failure

    def close(self) -> None:
        tally = self.optimizer.rounds
        self._journal.write(
            "tally", by_outcome=dict(tally.by_outcome), late_reads=tally.num_late_reads, resyncs=tally.num_resyncs,
            samples_averaged=tally.samples_averaged, samples_dropped=tally.samples_dropped,
        )  # fmt: skip
        self.optimizer.shutdown()
        self._swarm.close()

    def _on_round(self, result: RoundResult, epoch: int) -> None:
        self._journal.write(
            "round", epoch=epoch, outcome=result.outcome, is_true=result.is_true, digest=result.digest,
            group_size=result.group_size, num_senders=result.num_senders, total_weight=result.total_weight,
            weights=dict(result.weights), banned=dict(result.banned), seconds=result.seconds, detail=result.detail,
            bytes_sent=result.bytes_sent, bytes_received=result.bytes_received,
        )  # fmt: skip

    def _watch_holder(self, name: str) -> None:
        """Have every call of one of the holder's methods written down, with the parameters before and after it."""
        holder: Any = self.optimizer.holder
        act: Callable[..., Any] = getattr(holder, name)

        def watched(given: Any) -> Any:
            average = digest_of([given]) if isinstance(given, torch.Tensor) else None
            before = digest_of([holder.flat_parameters])
            outcome = act(given)
            self._journal.write(
                "parameters", by=name, epoch=holder.epoch, given=average, before=before,
                digest=digest_of([holder.flat_parameters]),
            )  # fmt: skip
            return outcome

        setattr(holder, name, watched)


def _watch_rounds(journal: Journal) -> None:
    """Have each round's whole length written down, beside the bound that its limits state: its leader's and ours."""
    averaging: Any = OwnAveraging
    exchange: Any = Exchange
    average, run = averaging.average, exchange.run
    groups: list[Group] = []

    async def watched_run(own: Exchange, group: Group, **values: Any) -> RoundResult:
        groups.append(group)
        result: RoundResult = await run(own, group, **values)
        return result

    def watched_average(wire: OwnAveraging, kind: Kind, epoch: int, take: Any) -> RoundResult:
        began, told = time.monotonic(), [wire.limits(kind)]
        groups.clear()
        try:
            result: RoundResult = average(wire, kind, epoch, take)
            return result
        finally:
            seconds = time.monotonic() - began
            told += [group.limits for group in groups]
            bound = max(each.matchmaking_seconds + each.round_seconds for each in told)
            journal.write("averaging", kind=kind, epoch=epoch, seconds=seconds, bound_seconds=bound)

    exchange.run, averaging.average = watched_run, watched_average
