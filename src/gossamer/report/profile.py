"""Where the time goes: one bar per profiled graph, and its operators as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from gossamer.report.numbers import as_ms, as_percent, is_number, nice_ticks, runtime_name
from gossamer.report.svg import Frame, el, svg, text

__all__ = ["KINDS", "kind", "profiles"]

KINDS = ("8-bit products", "other products", "changing precision", "picking and moving", "everything else")
"""Kinds of work, in the order of the bars."""
_CONVERT = re.compile(r"quantize|convert|cast|reorder", re.IGNORECASE)
_MOVE = re.compile(
    r"topk|gather|scatter|slice|split|concat|transpose|reshape|permute|expand|tile|broadcast|onehot|argmax|copy|pad",
    re.IGNORECASE,
)
_ROW, _LABEL, _BAR = 46, 15, 18


def kind(op: Mapping[str, Any]) -> int:
    """Return the index into ``KINDS`` of an operator ``{type, precision, product}``."""
    name = str(op.get("type") or op.get("name") or "")
    if op.get("product"):
        return 0 if op.get("precision") == "i8" else 1
    if _CONVERT.search(name):
        return 2
    return 3 if _MOVE.search(name) else 4


def _title(entry: Mapping[str, Any]) -> str:
    return " · ".join(str(entry[k]) for k in ("stage", "precision") if entry.get(k))


def _bars(entries: Sequence[Mapping[str, Any]], longest: float) -> Markup:
    """Return stacked bars, milliseconds to the right; all runtimes share one scale."""

    def draw(width: int, cls: str) -> Markup:
        height = _ROW * len(entries) + 34
        frame = Frame(width, height, left=4, right=56, top=4, bottom=30)
        x = frame.x(0, nice_ticks(0, longest, 5)[-1])
        body = frame.x_axis(x, "g", 5 if cls == "wide" else 3)
        body += text(width - 4, height - 12, "ms", "axis-name", "end")
        for i, entry in enumerate(entries):
            top = frame.top + i * _ROW
            body += text(frame.left, top + _LABEL - 3, _title(entry), "label")
            left = 0.0
            for k, name in enumerate(KINDS):
                ms = entry["kinds"][k]
                if ms <= 0:
                    continue
                tip = f"{_title(entry)}\n{name}: {as_ms(ms)} ms, {as_percent(ms / entry['total'])}"
                bar = el("rect", x=x(left), y=top + _LABEL, width=max(0.5, x(left + ms) - x(left)), height=_BAR)
                body += el("g", bar, cls=f"work k{k}", tabindex=0, role="img", aria_label=tip, data_tip=tip)
                left += ms
            body += text(x(left) + 6, top + _LABEL + 13, as_ms(left), "value")
        return svg(width, height, body, f"Time by kind of work, {len(entries)} graphs", cls)

    return draw(880, "wide") + draw(360, "narrow")


def _read(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    ops = [o for o in entry.get("ops") or [] if is_number(o.get("ms"))]
    total = sum(o["ms"] for o in ops)
    if not total:
        return None
    kinds = [sum(o["ms"] for o in ops if kind(o) == k) for k in range(len(KINDS))]
    shown = [
        {**o, "share": o["ms"] / total, "percent": as_percent(o["ms"] / total), "ms": as_ms(o["ms"])}
        for o in sorted(ops, key=lambda o: -o["ms"])
    ]
    products = kinds[0] + kinds[1]
    int8 = entry.get("int8_share", kinds[0] / products if products else None)
    return {
        "runtime": runtime_name(entry.get("runtime")) or "measured",
        "stage": entry.get("stage"),
        "precision": entry.get("precision"),
        "batch": entry.get("batch"),
        "title": _title(entry) or "operators",
        "total": total,
        "shown_total": as_ms(total),
        "int8": as_percent(int8, 0) if is_number(int8) else "",
        "kinds": kinds,
        "ops": shown,
        "counted": any(o.get("count") for o in shown),
    }


def profiles(given: Any) -> list[dict[str, Any]]:
    """Return one group per runtime: name, batch, bars (SVG), kinds (names in use), graphs (tables, shares).

    Args:
        given: ``{runtime: [op]}`` or rows ``{runtime, stage, precision, batch, int8_share, ops: [op]}``, where
            op is ``{type, kernel, precision, product, ms, count}``.
    """
    if isinstance(given, Mapping):
        given = [{"runtime": name, "ops": ops} for name, ops in given.items()]
    entries = [e for e in map(_read, given or []) if e is not None]
    longest = max((e["total"] for e in entries), default=0.0)
    groups = []
    for runtime in dict.fromkeys(e["runtime"] for e in entries):
        mine = [e for e in entries if e["runtime"] == runtime]
        used = [(k, name) for k, name in enumerate(KINDS) if any(e["kinds"][k] > 0 for e in mine)]
        groups.append(
            {"runtime": runtime, "batch": mine[0]["batch"], "bars": _bars(mine, longest), "kinds": used, "graphs": mine}
        )
    return groups
