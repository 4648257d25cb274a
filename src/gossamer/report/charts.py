"""Charts of the insides of a run: tokens per block, quantized layers, training curves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from gossamer.report.numbers import is_number, nice_ticks
from gossamer.report.svg import Frame, Scale, el, svg, text

__all__ = ["curve", "layers", "tokens"]

Draw = Callable[[int, int, str], Markup]


def _both(draw: Draw, wide: tuple[int, int], narrow: tuple[int, int]) -> Markup:
    return draw(*wide, "wide") + draw(*narrow, "narrow")


def tokens(data: Mapping[str, Any]) -> Markup:
    """Return columns of the tokens that leave each block, over the dense count; '' without data.

    Args:
        data: ``{blocks, kept, pruned, merged, dense}``; only ``kept`` is needed.
    """
    kept: Sequence[int] = data.get("kept") or []
    if not kept:
        return Markup("")
    names = [str(b) for b in data.get("blocks") or range(len(kept))]
    dense = max([*kept, int(data.get("dense") or 0)])
    pruned, merged = data.get("pruned") or [], data.get("merged") or []

    def draw(width: int, height: int, cls: str) -> Markup:
        frame = Frame(width, height, left=40, right=4, top=36, bottom=38)
        y = frame.y(0, nice_ticks(0, dense, 4)[-1])
        step = (width - frame.left - frame.right) / len(kept)
        bar = min(46.0, step * 0.74)
        every = max(1, math.ceil((24 if cls == "wide" else 22) / step))
        body = frame.y_axis(y, "g", 4) + text(0, 12, "Tokens leaving the block", "axis-name")
        for i, count in enumerate(kept):
            left = frame.left + i * step + (step - bar) / 2
            parts = [f"block {names[i]}: {count} of {dense} tokens kept"]
            for what, gone in (("pruned", pruned), ("merged", merged)):
                if i < len(gone) and gone[i]:
                    parts.append(f"{gone[i]} {what} here")
            ghost = el("rect", x=left, y=y(dense), width=bar, height=y(0) - y(dense), rx=2, cls="ghost")
            solid = el("rect", x=left, y=y(count), width=bar, height=y(0) - y(count), rx=2, cls="bar")
            tip = "\n".join(parts)
            group = el("g", ghost + solid, tabindex=0, role="img", aria_label=tip, data_tip=tip, cls="column")
            body += group
            if i % every == 0:
                body += text(left + bar / 2, y(count) - 5, str(count), "value", "middle")
                body += text(left + bar / 2, height - 22, names[i], "tick", "middle")
        body += text(width - frame.right, height - 4, "Block", "axis-name", "end")
        return svg(width, height, body, f"Tokens per block: {', '.join(map(str, kept))}", cls)

    return _both(draw, (880, 280), (360, 240))


def _bits_panel(rows: Sequence[Mapping[str, Any]], x: Scale, bar: float, y: Scale) -> Markup:
    body = Markup("")
    radius = max(1.6, min(3.2, bar / 2))
    for bits in sorted({int(r[k]) for r in rows for k in ("bits_w", "bits_a") if is_number(r.get(k))}):
        body += el("line", x1=x.start, x2=x.end, y1=y(bits), y2=y(bits), cls="grid")
        body += text(x.start - 8, y(bits) + 4, str(bits), "tick", "end")
    for i, r in enumerate(rows):
        if is_number(r.get("bits_w")):
            body += el("rect", x=x(i), y=y(r["bits_w"]) - 7, width=bar, height=6, rx=1.5, cls="bits-w")
        if is_number(r.get("bits_a")):
            body += el("circle", cx=x(i) + bar / 2, cy=y(r["bits_a"]) + 4.5, r=radius, cls="bits-a")
    return body


def layers(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Return the bit widths above the quantization errors of every layer; '' without data.

    Args:
        rows: ``{layer, bits_w, bits_a, error, gamma}``; error is relative (0 = exact).
    """
    if not rows:
        return Markup("")
    bits = [float(r[k]) for r in rows for k in ("bits_w", "bits_a") if is_number(r.get(k))] or [8.0]
    errors = [float(r["error"]) for r in rows if is_number(r.get("error"))]

    def draw(width: int, height: int, cls: str) -> Markup:
        left, right, split = 52, 4, 96
        x = Scale(0, len(rows), left, width - right)
        bar = max(1.5, (width - left - right) / len(rows) * 0.7)
        body = text(0, 12, "Bits", "axis-name")
        body += _bits_panel(rows, x, bar, Scale(min(bits) - 1, max(bits) + 1, split - 8, 20))
        body += text(0, split + 20, "Error of the layer's output", "axis-name")
        frame = Frame(width, height, left=left, right=right, top=split + 30, bottom=26)
        top = nice_ticks(0, max(errors, default=1.0), 4)[-1] or 1.0
        y = frame.y(0, top)
        body += frame.y_axis(y, ".1e" if top < 1e-3 else "g", 4)
        for i, r in enumerate(rows):
            tip = [str(r.get("layer", i))]
            tip += [f"{n}: {r[k]:.4g}" for n, k in (("weight bits", "bits_w"), ("activation bits", "bits_a"),
                    ("error", "error"), ("correlation", "gamma")) if is_number(r.get(k))]  # fmt: skip
            hit = el("rect", x=x(i), y=20, width=(x(1) - x(0)), height=height - 46, cls="hit")
            if is_number(r.get("error")):
                h = y(0) - y(r["error"])
                hit += el("rect", x=x(i), y=y(r["error"]), width=bar, height=max(h, 0.8), rx=1, cls="bar")
            joined = "\n".join(tip)
            body += el("g", hit, cls="column", tabindex=0, role="img", aria_label=joined, data_tip=joined)
        body += el("line", x1=left, x2=width - right, y1=y(0), y2=y(0), cls="axis")
        body += text(width - right, height - 6, f"{len(rows)} layers, input to output", "axis-name", "end")
        return svg(width, height, body, f"Bit widths and errors of {len(rows)} layers", cls)

    return _both(draw, (880, 320), (360, 280))


def curve(row: Mapping[str, Any]) -> Markup:
    """Return one small curve of a loss term over steps; '' without finite values.

    Args:
        row: ``{phase, term, steps, values}``.
    """
    values = list(row.get("values") or [])
    steps = list(row.get("steps") or range(len(values)))
    pairs = [(float(s), float(v)) for s, v in zip(steps, values, strict=False) if is_number(v)]
    if not pairs:
        return Markup("")
    width, height = 280, 150
    frame = Frame(width, height, left=48, right=8, top=8, bottom=24)
    low, high = min(v for _, v in pairs), max(v for _, v in pairs)
    ticks = nice_ticks(low, high, 3)
    y, x = frame.y(ticks[0], ticks[-1]), frame.x(pairs[0][0], max(pairs[-1][0], pairs[0][0] + 1))
    points = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in pairs)
    last = pairs[-1]
    seen = f"first {pairs[0][1]:.4g}, lowest {low:.4g}, last {last[1]:.4g}"
    tip = f"{row.get('term', 'loss')}\n{seen}\n{len(pairs)} steps"
    body = frame.y_axis(y, ".4g", 3) + frame.x_axis(x, "g", 3)
    body += el("polyline", points=points, cls="curve") + el("circle", cx=x(last[0]), cy=y(last[1]), r=3, cls="end")
    body += el("rect", x=0, y=0, width=width, height=height, cls="hit", data_tip=tip, tabindex=0, role="img",
               aria_label=tip.replace("\n", ", "))  # fmt: skip
    return svg(width, height, body, str(row.get("term", "loss")), "small")
