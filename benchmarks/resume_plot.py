"""The picture of a cold start, as SVG by hand: matplotlib would be a dependency for one drawing.

Colours are set twice, for light and for dark pages; the background is left to the page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 48, 52
EPOCHS_PER_TICK, NATS_PER_TICK = 5, 0.5

STYLE = """
text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: #1f2328 }
.small { font-size: 12px } .faint { fill: #656d76 }
line, polyline, circle { fill: none }
.grid { stroke: #d8dee4 } .axis { stroke: #1f2328 }
.mark { stroke: #656d76; stroke-dasharray: 2 4 } .cut { stroke: #1f2328; stroke-width: 1.4; stroke-dasharray: 6 4 }
.first { stroke: #0969da; stroke-width: 2.2 } .second { stroke: #bc4c00; stroke-width: 2.2 }
.dot { stroke: #1a7f37; stroke-width: 1.6 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .faint { fill: #9198a1 } .grid { stroke: #30363d } .axis, .cut { stroke: #e6edf3 }
  .mark { stroke: #9198a1 } .first { stroke: #58a6ff } .second { stroke: #f0883e } .dot { stroke: #3fb950 }
}
"""

Points = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What was measured. Losses in nats; a training loss of epoch e is drawn at e, before its step."""

    first: Points
    second: Points
    held_out: Points
    resumed_at: int
    """Epoch of the checkpoint."""
    uniform: float
    """Loss of knowing nothing."""
    unigram: float
    """Loss of knowing how frequent each token is."""


def draw(curves: Curves) -> str:
    """The whole SVG file."""
    return "\n".join(_Picture(curves).lines())


class _Picture:
    def __init__(self, curves: Curves) -> None:
        self._curves = curves
        losses = [loss for points in (curves.first, curves.second, curves.held_out) for _, loss in points]
        self._bottom = floor(min([*losses, curves.unigram]) / NATS_PER_TICK) * NATS_PER_TICK
        self._top = ceil(max([*losses, curves.uniform]) / NATS_PER_TICK) * NATS_PER_TICK
        self._last_epoch = max(epoch for epoch, _ in [*curves.second, *curves.held_out])

    def _x(self, epoch: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * epoch / self._last_epoch

    def _y(self, loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (self._top - loss) / (self._top - self._bottom)

    def lines(self) -> Iterator[str]:
        curves = self._curves
        yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        yield "<title>Loss of a run whose processes were all killed, and that went on from its checkpoint</title>"
        yield f"<style>{STYLE}</style>"
        yield from self._axes()
        yield from self._mark(curves.uniform, "knows nothing: ln(vocabulary)", offset=-5)
        yield from self._mark(curves.unigram, "knows how frequent each token is", offset=15)
        yield from self._cut()
        yield self._curve(curves.first, "first")
        yield self._curve(curves.second, "second")
        for epoch, loss in curves.held_out:
            yield f'<circle class="dot" cx="{self._x(epoch):.1f}" cy="{self._y(loss):.1f}" r="3"/>'
        yield from self._legend()
        yield "</svg>\n"

    def _axes(self) -> Iterator[str]:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for step in range(round((self._top - self._bottom) / NATS_PER_TICK) + 1):
            loss = self._bottom + step * NATS_PER_TICK
            y = self._y(loss)
            yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
            yield f'<text class="small" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{loss:.1f}</text>'
        for epoch in range(0, self._last_epoch + 1, EPOCHS_PER_TICK):
            x = self._x(epoch)
            yield f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>'
            yield f'<text class="small" x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{epoch}</text>'
        yield f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
        middle = (LEFT + right) / 2
        yield f'<text x="{middle}" y="{HEIGHT - 10}" text-anchor="middle">epoch (one global step)</text>'
        y = (TOP + bottom) / 2
        yield f'<text x="16" y="{y}" text-anchor="middle" transform="rotate(-90 16 {y})">masked-LM loss, nats</text>'

    def _mark(self, loss: float, text: str, *, offset: float) -> Iterator[str]:
        y = self._y(loss)
        yield f'<line class="mark" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>'
        yield f'<text class="small faint" x="{WIDTH - RIGHT - 4}" y="{y + offset:.1f}" text-anchor="end">{text}</text>'

    def _cut(self) -> Iterator[str]:
        x, at = self._x(self._curves.resumed_at), self._curves.resumed_at
        yield f'<line class="cut" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}"/>'
        y = self._y(self._top - 2 * NATS_PER_TICK) + 20
        yield f'<text x="{x + 8:.1f}" y="{y:.1f}">every process killed;</text>'
        yield f'<text x="{x + 8:.1f}" y="{y + 18:.1f}">cold start from the checkpoint of epoch {at}</text>'

    def _curve(self, points: Points, name: str) -> str:
        path = " ".join(f"{self._x(epoch):.1f},{self._y(loss):.1f}" for epoch, loss in points)
        return f'<polyline class="{name}" points="{path}"/>'

    def _legend(self) -> Iterator[str]:
        y = 24
        for name, x, text in (("first", LEFT, "training, before"), ("second", LEFT + 170, "training, after")):
            yield f'<line class="{name}" x1="{x}" y1="{y - 4}" x2="{x + 26}" y2="{y - 4}"/>'
            yield f'<text x="{x + 33}" y="{y}">{text}</text>'
        x = LEFT + 340
        yield f'<circle class="dot" cx="{x}" cy="{y - 4}" r="3"/>'
        yield f'<text x="{x + 11}" y="{y}">held-out text, by each checkpoint</text>'
