"""A bare `hivemind.Optimizer`, set up as a good user would, and made to tell what entered its averages.

hivemind itself only says how large a group was. So its gradient averager is asked, after each all-reduce, which share
of the vector came back averaged and whom it gave up on; nothing else about it is changed.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import hivemind
import torch
from hivemind.averaging.control import StepControl
from hivemind.compression import Float16Compression
from hivemind.optim.grad_averager import GradientAverager

from benchmarks.swarm_spec import Journal, ProcessSpec
from benchmarks.swarm_tasks import Task
from calm_ray.training.optim import make_optimizer, make_schedule

MATCHMAKING_SECONDS = 2.0
AVERAGING_TIMEOUT_SECONDS = 20.0
REQUEST_TIMEOUT_SECONDS = 1.0
TRACKER = {"min_refresh_period": 0.2, "default_refresh_period": 0.5, "max_refresh_period": 1.0}
AVERAGE_STATE_EVERY = 10
"""Stock's default of 1 costs a second all-reduce per epoch; ours averages state every 10 epochs at most."""


class Gathered(dict[Any, Any]):
    """What a stock round returns, with what the all-reduce knows attached; crosses the process boundary by pickle."""

    told: dict[str, Any]


class CountingAverager(GradientAverager):
    """Stock's, with a memory. Every member of the group must have it: its name is part of the RPC's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.begun: list[tuple[int, int, StepControl]] = []
        """Epoch, our samples, and the control of each averaging step that was begun."""
        self.epoch = 0
        super().__init__(*args, **kwargs)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        num_samples = self.local_samples_accumulated
        control = super().step(*args, **kwargs)
        self.begun.append((self.epoch, num_samples, control))
        return control

    async def _aggregate_with_group(self, *args: Any, **kwargs: Any) -> Gathered:
        gathered = Gathered(await super()._aggregate_with_group(*args, **kwargs))
        gathered.told = self._told
        return gathered

    async def _run_allreduce_inplace_(
        self, tensors: Sequence[torch.Tensor], group_info: Any, group_id: bytes | None = None, **kwargs: Any
    ) -> None:
        began = time.monotonic()
        await super()._run_allreduce_inplace_(tensors, group_info, group_id, **kwargs)
        runner = self._running_groups[group_id or group_info.group_id].result()
        container = runner.tensor_part_container
        self._told = {
            "group": (group_id or group_info.group_id).hex(),
            "group_size": group_info.group_size,
            "received": 1.0 - container.failed_size / max(1, container.total_size),
            "num_banned": len(runner.banned_senders),
            "weight": float(runner.weight),
            "seconds": time.monotonic() - began,
        }


class BareStepper:
    """hivemind as its own ALBERT example uses it; `bare-synchronous` has every kind of delay switched off."""

    def __init__(self, spec: ProcessSpec, task: Task, journal: Journal) -> None:
        self._journal, self._task = journal, task
        is_delayed = spec.driver == "bare-delayed"
        self._dht = hivemind.DHT(
            initial_peers=list(spec.initial_peers) or None, start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"],
        )  # fmt: skip
        self.peer_id = str(self._dht.peer_id)
        self.addresses = [str(address) for address in self._dht.get_visible_maddrs()]
        table = task.optimizer_table
        self._optimizer = hivemind.Optimizer(
            dht=self._dht,
            run_id=spec.run_id,
            target_batch_size=spec.target_batch_size,
            batch_size_per_step=spec.micro_batch_size,
            params=task.param_groups,
            optimizer=lambda groups: make_optimizer(groups, table=table),
            scheduler=make_schedule(table),
            matchmaking_time=MATCHMAKING_SECONDS,
            averaging_timeout=AVERAGING_TIMEOUT_SECONDS,
            next_chunk_timeout=AVERAGING_TIMEOUT_SECONDS / 4,
            offload_optimizer=True,
            delay_grad_averaging=is_delayed,
            delay_optimizer_step=is_delayed,
            delay_state_averaging=is_delayed,
            average_state_every=AVERAGE_STATE_EVERY,
            grad_compression=Float16Compression(),
            state_averaging_compression=Float16Compression(),
            grad_averager_factory=partial(CountingAverager, request_timeout=REQUEST_TIMEOUT_SECONDS),
            averager_opts={"request_timeout": REQUEST_TIMEOUT_SECONDS},
            tracker_opts=TRACKER,
        )

    @property
    def epoch(self) -> int:
        return int(self._optimizer.local_epoch)

    def begin(self) -> None:
        """A bare user begins to train at once."""

    def step(self, num_samples: int) -> None:
        self._optimizer.grad_averager.epoch = self.epoch
        self._optimizer.step(batch_size=num_samples)
        self._optimizer.zero_grad()

    def settle(self) -> None:
        """Wait for the delayed step, apply it, and write down how each round went."""
        self._optimizer.state_averager.step(wait_for_delayed_updates=True, apply_delayed_updates=True)
        for epoch, num_samples, control in self._optimizer.grad_averager.begun:
            try:
                gathered = control.result(AVERAGING_TIMEOUT_SECONDS)
                told = dict(gathered.told)
            except Exception as exc:  # noqa: BLE001  whatever ended the round: it did not average
                told = {"failed": repr(exc)}
            self._journal.write("bare_round", epoch=epoch, num_samples=num_samples, **told)

    def assist(self) -> None:
        raise AssertionError("bare hivemind is measured without auxiliary peers")

    def close(self) -> None:
        self._optimizer.shutdown()
        self._dht.shutdown()
