"""Numbers as people read them: 1.26 G, 5.7 MB, 82.4 %, 2.61×."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = [
    "as_bytes",
    "as_count",
    "as_fact",
    "as_ms",
    "as_percent",
    "as_ratio",
    "as_seconds",
    "as_share",
    "is_number",
    "nice_ticks",
    "runtime_name",
]

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime", "torch": "PyTorch"}


def runtime_name(name: Any) -> str:
    """Return a runtime's name as its makers write it; unknown names pass unchanged."""
    return RUNTIMES.get(str(name or ""), str(name or ""))


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite int or float (booleans are not numbers here)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def as_count(value: float) -> str:
    """Return a count with three significant digits and a decimal prefix (``1.26 G``)."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            scaled = value / limit
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f}{unit}"
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.3g}"


def as_bytes(value: float) -> str:
    """Return a size in decimal megabytes or kilobytes."""
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def as_ms(value: float) -> str:
    """Return milliseconds with a sensible number of digits."""
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def as_seconds(value: float) -> str:
    """Return a duration: ``9.3 s``, ``361 s``, ``1 h 12 min``."""
    if value < 3600:
        return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
    return f"{value // 3600:.0f} h {value % 3600 / 60:.0f} min"


def as_ratio(value: float) -> str:
    """Return a ratio such as ``1.52×``."""
    return f"{value:.2f}{TIMES}"


def as_share(value: float) -> float:
    """Return a share in [0, 1], whether it came as one or as a percentage."""
    return value / 100 if value > 1.0 else float(value)


def as_percent(share: float, digits: int = 1) -> str:
    """Return a share in [0, 1] as a percentage with a proper minus sign."""
    return f"{100 * share:.{digits}f}".replace("-", MINUS) + "\N{NARROW NO-BREAK SPACE}%"


def as_fact(name: str, value: Any) -> str:
    """Return a named fact as text; words of the name tell its unit (``macs_dense``, ``median_ms``, ``ratio_fp32``)."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {as_fact(str(k), v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(as_fact(name, v) for v in value)
    if not is_number(value):
        return str(value)
    words = name.lower().split("_")
    forms = {"macs": as_count, "params": as_count, "bops": as_count, "bytes": as_bytes}
    if "ratio" in words:
        return as_ratio(value)
    for word in (words[0], words[-1]):
        if word in forms:
            return forms[word](value)
        if word in ("top1", "top5", "agreement", "share"):
            return as_percent(as_share(value))
        if word == "ms":
            return as_ms(value) + " ms"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about ``count`` round numbers that cover [low, high]."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]
