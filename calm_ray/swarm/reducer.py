"""What a reducer does with its slice: check contributions, add them up, divide, and encode the average once.

Senders are not coupled: each brings its parts in order at its own pace, they are added up in fp32, and a part is
finished when every sender who is still trusted has brought it. A sender who breaks the rules, or is too
slow, is banned for the round: what it brought before that was checked, and stays; later parts are averaged without it,
over the weight that did come. All members get the reducer's own encoded average, so they cannot differ.

Pure arithmetic: no clock and no socket. hivemind counts a part before it looks at it (TensorPartReducer), so that one
malformed part stalls everyone, and lets a part of one element shift a whole one; here nothing counts before the checks.
"""

import math
from collections.abc import Collection, Sequence

import numpy as np

from calm_ray.swarm.part_codecs import BadPart, PartCodec, Vector
from calm_ray.swarm.verdict import Outcome


class ReductionFailed(Exception):
    """The slice cannot get an honest average, whoever waits longer."""

    def __init__(self, outcome: Outcome, detail: str) -> None:
        super().__init__(detail)
        self.outcome, self.detail = outcome, detail


class Reduction:
    """One slice in one round. A slice is a list of parts; `lengths` are their numbers of elements."""

    def __init__(
        self,
        *,
        lengths: Sequence[int],
        senders: Collection[str],
        codec: PartCodec,
        max_weight: float,
        carried: Sequence[Vector] | None = None,
    ) -> None:
        """`carried`: what encoding left out of the earlier averages of these parts, times their weight."""
        self._lengths, self._codec, self._max_weight, self._carried = lengths, codec, max_weight, carried
        self._sums: dict[int, Vector] = {}
        self._own: Sequence[Vector] | None = None
        self._own_weight = 0.0
        self._delivered = dict.fromkeys(senders, 0)
        self._weights: dict[str, float] = {}
        self.banned: dict[str, str] = {}
        self.residual: list[Vector] | None = [] if codec.is_biased else None
        """What encoding left out of each finished average, times its weight: the next round's `carried`."""
        self.finished: list[bytes] = []
        """Encoded averages, in order."""

    @property
    def num_parts(self) -> int:
        return len(self._lengths)

    @property
    def is_complete(self) -> bool:
        return len(self.finished) == self.num_parts

    @property
    def quorum(self) -> int:
        """Contributions that every part needs: half of the promised ones, rounded up."""
        return max(1, -(-len(self._delivered) // 2))

    def contribute(self, peer: str, parts: Sequence[Vector], weight: float) -> None:
        """The reducer's own parts, as they are; each is added when it is first touched."""
        assert [len(part) for part in parts] == list(self._lengths)
        self._own, self._own_weight = parts, weight
        self._weights[peer], self._delivered[peer] = weight, self.num_parts

    def admit(self, peer: str, weight: float) -> str:
        """Let a sender begin; why not, if its weight is absurd: then it is banned. Weight 0 withdraws its promise."""
        if weight == 0:
            self._delivered.pop(peer, None)
            return ""
        if peer not in self._delivered:
            return "not a sender of this group"
        if not (math.isfinite(weight) and 0 < weight <= self._max_weight):
            self.ban(peer, f"weight {weight:g}, expected at most {self._max_weight:g}")
            return self.banned[peer]
        self._weights[peer] = weight
        return ""

    def add(self, peer: str, payload: bytes) -> None:
        """Count `peer`'s next part; BadPart, and it is banned, if it is malformed. Only trusted senders are heard."""
        if peer in self.banned or peer not in self._delivered:
            return
        part = self._delivered[peer]
        try:
            if part >= self.num_parts:
                raise BadPart("more parts than the slice has")
            values = self._codec.decode(payload, self._lengths[part])
        except BadPart as exc:
            self.ban(peer, f"part {part}: {exc}")
            raise
        sums = self._sums_of(part)
        sums += values * np.float32(self._weights[peer])
        self._delivered[peer] = part + 1

    def ban(self, peer: str, reason: str) -> None:
        if peer in self._delivered and not self.has_all_of(peer):
            self.banned.setdefault(peer, reason)

    def has_all_of(self, peer: str) -> bool:
        return self._delivered.get(peer, 0) >= self.num_parts

    def delivered_by(self, peer: str) -> int:
        """Parts of `peer` that count."""
        return self._delivered.get(peer, 0)

    def incomplete(self) -> set[str]:
        """Senders who are trusted and owe something."""
        return {peer for peer in self._delivered if peer not in self.banned and not self.has_all_of(peer)}

    def awaited(self) -> set[str]:
        """Those of them without whom the next part cannot be finished."""
        return {peer for peer in self.incomplete() if self._delivered[peer] <= len(self.finished)}

    @property
    def is_ready(self) -> bool:
        """Whether `finish_next` can go on."""
        return not self.is_complete and not self.awaited()

    def finish_next(self) -> Vector:
        """Average the next part, encode it, and return its decoded copy; ReductionFailed if there is no sound one."""
        part = len(self.finished)
        contributors = [peer for peer, delivered in self._delivered.items() if delivered > part]
        if not self._delivered:
            raise ReductionFailed("zero_weight", "no member brought a weight")
        if len(contributors) < self.quorum:
            causes = "; ".join(f"{peer[-10:]}: {why}" for peer, why in sorted(self.banned.items())[:4])
            raise ReductionFailed(
                "partial", f"{len(contributors)} of {len(self._delivered)} senders counted ({causes})"
            )
        weight = np.float32(math.fsum(self._weights[peer] for peer in contributors))
        average = self._sums_of(part) / weight
        del self._sums[part]
        payload = self._codec.encode(average)
        try:
            decoded = self._codec.decode(payload, self._lengths[part])
        except BadPart as exc:
            raise ReductionFailed("non_finite", f"average of part {part}: {exc}") from exc
        if self.residual is not None:
            self.residual.append((average - decoded) * weight)
        self.finished.append(payload)
        if self.is_complete:
            self._own = self._carried = None
        return decoded

    def weights(self) -> dict[str, float]:
        """Weight of every sender whose whole contribution to this slice counts."""
        return {peer: weight for peer, weight in self._weights.items() if self.has_all_of(peer)}

    def _sums_of(self, part: int) -> Vector:
        """A part's sum so far; it begins with our own share, when the first contribution needs it."""
        if part not in self._sums:
            sums = np.zeros(self._lengths[part], dtype=np.float32)
            if self._own is not None:
                np.multiply(self._own[part], np.float32(self._own_weight), out=sums)
            if self._carried is not None:
                sums += self._carried[part]
            self._sums[part] = sums
        return self._sums[part]
