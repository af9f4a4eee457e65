"""Ray as far as the actors' code calls it, without a cluster: calls that are answered when a test says so."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import ray


@dataclass
class FakeActor:
    """`answers[method]` answers each call of it, with what it returns or raises; while there is none, calls wait."""

    answers: dict[str, Callable[..., Any]] = field(default_factory=dict)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> "Ref":
            self.calls.append((method, args))
            return Ref(self, method, args)

        return SimpleNamespace(remote=remote)

    def called(self, method: str) -> list[tuple[Any, ...]]:
        """The arguments of each call of it."""
        return [args for name, args in self.calls if name == method]


@dataclass(eq=False)
class Ref:
    """The promise of an answer."""

    actor: FakeActor
    method: str
    args: tuple[Any, ...]

    @property
    def is_ready(self) -> bool:
        return self.method in self.actor.answers

    def get(self) -> Any:
        return self.actor.answers[self.method](*self.args)


class FakeRay:
    """One namespace of named actors on some nodes."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.actors: dict[str, FakeActor] = {}
        self.killed: list[FakeActor] = []
        self.lingers = False
        """An actor that was killed is still listed."""

    def get_actor(self, name: str, namespace: str) -> FakeActor:
        if name not in self.actors:
            raise ValueError(f"no actor {name}")
        return self.actors[name]

    def named_actors(self) -> set[str]:
        return set(self.actors)

    def kill(self, actor: FakeActor, *, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(actor)
        if not self.lingers:
            self.actors = {name: there for name, there in self.actors.items() if there is not actor}

    def wait(self, refs: list[Ref], *, timeout: float, num_returns: int = 1) -> tuple[list[Ref], list[Ref]]:
        return [ref for ref in refs if ref.is_ready], [ref for ref in refs if not ref.is_ready]

    def get(self, ref: Ref, timeout: float = 0) -> Any:
        if not ref.is_ready:
            raise ray.exceptions.GetTimeoutError("no answer")
        return ref.get()

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "elsewhere", was_current_actor_reconstructed=False)
