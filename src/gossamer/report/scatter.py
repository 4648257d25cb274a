"""The accuracy-against-latency picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from gossamer.report.numbers import as_ms, nice_ticks
from gossamer.report.scoring import as_score, metric_of
from gossamer.report.svg import Frame, Scale, el, svg, text

__all__ = ["Point", "accuracy_latency", "frontier"]

GLYPH = 6.4
"""Mean width of a 12-pixel label character."""


@dataclass(frozen=True)
class Point:
    """One measured model.

    Attributes:
        key: Identifier of its table row.
        label: Short name.
        series: Index of its colour and marker.
        group: Name of the series.
        latency_ms: Median latency in ms.
        score: The task's figure, in its unit.
        interval: Its interval, or None.
        trusted: Whether the meter trusts the latency.
        metric: Name, unit and direction of the figure.
    """

    key: str
    label: str
    series: int
    group: str
    latency_ms: float
    score: float
    interval: tuple[float, float] | None = None
    trusted: bool = True
    metric: Mapping[str, Any] = field(default_factory=lambda: metric_of([]), compare=False)

    @property
    def gain(self) -> float:
        """The figure, turned so that more is better."""
        return self.score if self.metric["higher"] else -self.score

    @property
    def tip(self) -> str:
        """Text of the tooltip."""
        ends = [as_score(v, self.metric, unit=False) for v in self.interval or ()]
        span = f" ({' to '.join(ends)})" if ends else ""
        doubt = "" if self.trusted else "\nThe meter does not trust this latency."
        shown = as_score(self.score, self.metric)
        return f"{self.label}, {self.group}\n{shown}{span}\n{as_ms(self.latency_ms)} ms{doubt}"


def frontier(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other beats in both latency and accuracy, fastest first."""
    best: list[Point] = []
    for p in sorted(points, key=lambda p: (p.latency_ms, -p.gain)):
        if not best or p.gain > best[-1].gain:
            best.append(p)
    return best


def _marker(series: int, x: float, y: float) -> Markup:
    r = 6.0
    if series % 3 == 1:
        return el("rect", x=x - r + 0.7, y=y - r + 0.7, width=2 * r - 1.4, height=2 * r - 1.4, rx=1.5, cls="dot")
    if series % 3 == 2:
        return el("path", d=f"M{x:.1f} {y - r - 1:.1f}l{r + 1} {r + 1}l-{r + 1} {r + 1}l-{r + 1} -{r + 1}z", cls="dot")
    return el("circle", cx=x, cy=y, r=r, cls="dot")


Box = tuple[float, float, float, float]


def _place(label: str, x: float, y: float, taken: list[Box], frame: Frame) -> tuple[float, float, str] | None:
    """Return a position for a label that covers nothing drawn before, or None."""
    width = GLYPH * len(label)
    spots = [(11, 4, "start"), (-11, 4, "end"), (0, -12, "middle"), (0, 21, "middle")]
    spots += [(9, -8, "start"), (9, 17, "start"), (-9, -8, "end"), (-9, 17, "end")]
    for dx, dy, anchor in spots:
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left - 2, y + dy - 11, left + width + 2, y + dy + 4)
        inside = box[0] >= frame.left and box[2] <= frame.width and box[1] >= 2 and box[3] < frame.height - frame.bottom
        if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
            taken.append(box)
            return x + dx, y + dy, anchor
    return None


def _points(points: Sequence[Point], x: Scale, y: Scale, frame: Frame) -> Markup:
    bars = labels = dots = Markup("")
    taken: list[Box] = [(x(p.latency_ms) - 7, y(p.score) - 7, x(p.latency_ms) + 7, y(p.score) + 7) for p in points]
    for p in points:
        px, py = x(p.latency_ms), y(p.score)
        css = f"s{p.series % 6}"
        if p.interval:
            bars += el("line", x1=px, x2=px, y1=y(p.interval[0]), y2=y(p.interval[1]), cls=f"whisker {css}")
        spot = _place(p.label, px, py, taken, frame)
        if spot:
            labels += text(spot[0], spot[1], p.label, "label", spot[2])
        mark = el("circle", cx=px, cy=py, r=15, cls="hit") + _marker(p.series, px, py)
        dots += el(
            "g", mark, cls=f"point {css}" + ("" if p.trusted else " doubt"), tabindex=0, role="button",
            aria_label=p.tip.replace("\n", ", "), data_tip=p.tip, data_row=p.key,
        )  # fmt: skip
    return bars + labels + dots


def _draw(points: Sequence[Point], width: int, height: int, cls: str, label: str) -> Markup:
    frame = Frame(width, height, left=44, top=30, bottom=46)
    lows = [p.interval[0] if p.interval else p.score for p in points]
    highs = [p.interval[1] if p.interval else p.score for p in points]
    metric = points[0].metric
    share = metric["unit"] == "%"
    pad = max(1.0 if share else 0.1, 0.06 * (max(highs) - min(lows)))
    y_ticks = nice_ticks(min(lows) - pad, max(highs) + pad, 5)
    y = frame.y(y_ticks[0], min(y_ticks[-1], 104.0) if share else y_ticks[-1])
    x_ticks = nice_ticks(0.0, 1.06 * max(p.latency_ms for p in points), 4 if width < 500 else 7)
    x = frame.x(0.0, x_ticks[-1])
    form = "g" if x_ticks[-1] < 10000 else ".0f"
    body = frame.y_axis(y, "g") + frame.x_axis(x, form, 4 if width < 500 else 7)
    body += text(0, 14, f"{metric['name']}, {metric['unit']}".rstrip(", "), "axis-name")
    body += text(width - frame.right, height - 6, "Median latency, ms per batch", "axis-name", "end")
    edge = frontier(points)
    if len(edge) > 1:
        path = " ".join(f"{'L' if i else 'M'}{x(p.latency_ms):.1f} {y(p.score):.1f}" for i, p in enumerate(edge))
        body += el("path", d=path, cls="frontier")
    return svg(width, height, body + _points(points, x, y, frame), label, cls)


def accuracy_latency(points: Sequence[Point], label: str) -> Markup:
    """Return the picture for wide and for narrow columns (the style sheet shows one).

    Args:
        points: At least one measured model; latencies in ms, figures in their unit.
        label: What the picture shows, for readers that do not see it.
    """
    return _draw(points, 880, 440, "wide", label) + _draw(points, 360, 360, "narrow", label)
