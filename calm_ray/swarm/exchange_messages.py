"""The headers of our own wire: JSON, checked for size and type before anything else looks at them. Pure.

Only headers are JSON; parts travel as bytes. Nothing that a peer sends is ever unpickled.
"""

from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from calm_ray.swarm.group import Kind
from calm_ray.swarm.verdict import Outcome

MAX_HEADER_BYTES = 256 * 1024
"""A header names each sender once: room for two thousand."""

MAX_WEIGHT = 1e12

GroupId = Annotated[str, Field(max_length=64, pattern="^[0-9a-f]*$")]
PeerKey = Annotated[str, Field(max_length=128)]
Reason = Annotated[str, Field(max_length=400)]


class BadMessage(Exception):
    """A peer does not speak our protocol, or not this version of it."""


class Message(BaseModel):
    # Infinities travel as they are, so that whoever gets an absurd weight can say so.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")

    def encode(self) -> bytes:
        return self.model_dump_json().encode()


M = TypeVar("M", bound=Message)


def decode(kind: type[M], payload: bytes) -> M:
    """BadMessage unless `payload` is a `kind`."""
    try:
        return kind.model_validate_json(payload)
    except ValidationError as exc:
        raise BadMessage(f"no {kind.__name__}: {exc.errors()[0]['msg'][:100]}") from exc


class Opening(Message):
    """A member to a reducer: here I am, this is what I bring to one of your slices."""

    group_id: GroupId
    kind: Kind
    epoch: int
    weight: float
    """0 for a reader."""
    num_elements: int
    codec: str = Field(max_length=16)
    slice: int


class Ending(Message):
    """A reducer, after its last part."""

    weights: dict[PeerKey, Annotated[float, Field(ge=0, le=MAX_WEIGHT)]]
    """Senders whose whole contribution was counted."""
    banned: dict[PeerKey, Reason]


class Failure(Message):
    """A reducer that has no average to give, now or later, or that does not know the caller."""

    outcome: Outcome
    detail: Reason


class Ban(Message):
    """A reducer to a sender: stop sending, and read on."""

    reason: Reason
    counted: int = Field(ge=0)
    """Parts of it that stay in the average."""


class PartsRequest(Message):
    """Averaged parts, please: of one slice of a group's round, or all that you stepped with (no group id)."""

    group_id: GroupId
    kind: Kind
    epoch: int
    slice: int = Field(default=0, ge=0)
    skip: int = Field(default=0, ge=0)
    """Parts of the slice that are there already; as far as they came from their reducer, they are the first ones."""


class PartsHeader(Message):
    """What the peer has of that average, before the parts themselves."""

    is_known: bool
    may_come: bool = False
    """Whether it still expects parts that it does not have, from their reducer itself."""
    codec: str = Field(default="", max_length=16)
    num_elements: int = 0
    digest: str = Field(default="", max_length=64)
    """Empty while the average is not whole."""
