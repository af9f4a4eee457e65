"""Two ways to train without a swarm: to measure how fast a trainer is, and as the control that averages nothing."""

import torch

from benchmarks.swarm_spec import ProcessSpec
from benchmarks.swarm_tasks import Task, parameters_of, stepper


class LoneStepper:
    """Everyone steps for himself when he has done half of the target (there are two trainers); `solo` never steps."""

    def __init__(self, spec: ProcessSpec, task: Task) -> None:
        self.epoch = 0
        self.addresses: list[str] = []
        self.peer_id = spec.name
        self._samples_per_step = spec.target_batch_size // 2 if spec.driver == "control" else None
        self._parameters = parameters_of(task)
        self._sum = [torch.zeros_like(parameter) for parameter in self._parameters]
        self._num_samples = 0
        self._optimizer, self._schedule = stepper(task)

    def begin(self) -> None:
        """Nobody to catch up with."""

    @torch.no_grad()
    def step(self, num_samples: int) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        torch._foreach_add_(self._sum, gradients, alpha=float(num_samples))
        self._optimizer.zero_grad()
        self._num_samples += num_samples
        if self._samples_per_step is None or self._num_samples < self._samples_per_step:
            return
        for parameter, total in zip(self._parameters, self._sum, strict=True):
            parameter.grad = total / self._num_samples
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._schedule.step()
        torch._foreach_zero_(self._sum)
        self._num_samples = 0
        self.epoch += 1

    def settle(self) -> None:
        """Nothing is under way."""

    def assist(self) -> None:
        raise AssertionError("there is nobody to assist")

    def close(self) -> None:
        """Nothing to leave."""
