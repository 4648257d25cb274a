"""Small SVG vocabulary: elements, linear scales, axes. Colours are left to the page's style sheet."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup, escape

from gossamer.report.numbers import nice_ticks

__all__ = ["Frame", "Scale", "el", "svg", "text"]


def el(tag: str, body: str | Markup = "", /, **attributes: object) -> Markup:
    """Return one element; ``cls`` becomes ``class``, underscores in names become dashes."""
    parts = []
    for name, value in attributes.items():
        if value is not None:
            shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            parts.append(f'{"class" if name == "cls" else name.replace("_", "-")}="{escape(shown)}"')
    return Markup("<{} {}>{}</{}>").format(Markup(tag), Markup(" ".join(parts)), body, Markup(tag))


def text(x: float, y: float, body: str, cls: str, anchor: str = "start") -> Markup:
    """Return a text element anchored at (x, y)."""
    return el("text", body, x=float(x), y=float(y), cls=cls, text_anchor=anchor)


def svg(width: int, height: int, body: Markup, label: str, cls: str) -> Markup:
    """Return a drawing that scales with its column; ``label`` is read aloud."""
    return el("svg", body, viewBox=f"0 0 {width} {height}", role="group", aria_label=label, cls=cls)


@dataclass(frozen=True)
class Scale:
    """Linear map from [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of ``value``."""
        span = self.high - self.low
        return self.start + (value - self.low) / (span or 1.0) * (self.end - self.start)


@dataclass(frozen=True)
class Frame:
    """Plot area inside a drawing, with margins in pixels."""

    width: int
    height: int
    left: int = 46
    right: int = 14
    top: int = 18
    bottom: int = 40

    def x(self, low: float, high: float) -> Scale:
        """Return the horizontal scale."""
        return Scale(low, high, self.left, self.width - self.right)

    def y(self, low: float, high: float) -> Scale:
        """Return the vertical scale (upwards)."""
        return Scale(low, high, self.height - self.bottom, self.top)

    def y_axis(self, scale: Scale, form: str, count: int = 5) -> Markup:
        """Return horizontal grid lines with their labels."""
        out = Markup("")
        for tick in nice_ticks(scale.low, scale.high, count):
            if scale.low - 1e-9 <= tick <= scale.high + 1e-9:
                y = scale(tick)
                out += el("line", x1=self.left, x2=self.width - self.right, y1=y, y2=y, cls="grid")
                out += text(self.left - 8, y + 4, format(tick, form), "tick", "end")
        return out

    def x_axis(self, scale: Scale, form: str, count: int = 6) -> Markup:
        """Return the base line and its labels."""
        base = self.height - self.bottom
        out = el("line", x1=self.left, x2=self.width - self.right, y1=base, y2=base, cls="axis")
        for tick in nice_ticks(scale.low, scale.high, count):
            if scale.low - 1e-9 <= tick <= scale.high + 1e-9:
                x = scale(tick)
                out += el("line", x1=x, x2=x, y1=base, y2=base + 4, cls="axis")
                out += text(x, base + 18, format(tick, form), "tick", "middle")
        return out
