"""A group: who averages what with whom, as its leader sent it to every member."""

from dataclasses import dataclass
from typing import Literal

from calm_ray.swarm.limits import RoundLimits

Kind = Literal["gradients", "state"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One peer of a group."""

    peer_id: str
    """Base58."""
    is_sender: bool
    """Whether it brings a vector. Others only receive, and may reduce."""
    fraction: float
    """Share of the vector that it averages for everyone; 0 for peers that nobody can call."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Frozen by its leader; all members hold the same one."""

    group_id: bytes
    """16 random bytes."""
    kind: Kind
    epoch: int
    members: tuple[Member, ...]
    limits: RoundLimits
    drift: float = 0.0
    """Largest relative distance between two members' parameters, as their sketches say; 0: all the same."""
    out_of_step: tuple[str, ...] = ()
    """Members whose parameters are another model's: they bring nothing, and get the state anew after the round."""

    @property
    def num_senders(self) -> int:
        return sum(member.is_sender for member in self.members)
