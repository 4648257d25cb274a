"""Renders run folders to one HTML file that needs nothing but a browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gossamer.core.errors import StateError
from gossamer.report import charts, saved, table
from gossamer.report.numbers import as_fact, as_percent, as_seconds, is_number
from gossamer.report.profile import profiles
from gossamer.report.scatter import accuracy_latency
from gossamer.report.scoring import metric_of
from gossamer.report.source import RunData, image_uri, read_run

__all__ = ["build_report", "render"]


def _asset(name: str) -> str:
    return resources.files("gossamer.report").joinpath(name).read_text(encoding="utf-8")


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested JSON as (dotted name, text) pairs."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list | tuple):
        return [(prefix.replace("_", " "), ", ".join(str(v) for v in value))] if value else []
    name = prefix.rpartition(".")[2]
    return [] if value is None else [(prefix.replace("_", " "), as_fact(name, value))]


def _scatter(rows: Sequence[saved.Row], prefix: str) -> dict[str, Any] | None:
    pictures = []
    names: list[str] = []
    for batch in table.batches(rows):
        found, names = table.points(rows, batch, prefix)
        if found:
            name = metric_of(rows)["name"]
            label = f"{name} against median latency at batch {batch}; the table below holds the same figures"
            pictures.append((batch, accuracy_latency(found, label)))
    return {"pictures": pictures, "series": names} if pictures else None


def _results(rows: Sequence[saved.Row], prefix: str) -> dict[str, Any] | None:
    if not rows:
        return None
    heads = table.columns(rows)
    scatter = _scatter(rows, prefix)
    return {"columns": heads, "rows": table.rows(rows, heads, prefix), "scatter": scatter, "metric": metric_of(rows)}


def _grid(block: Any, index: int, photo: Mapping[str, Any]) -> dict[str, Any]:
    grid = block.get("grid", block.get("groups")) if isinstance(block, Mapping) else block
    name = str(block.get("block", index)) if isinstance(block, Mapping) else str(index)
    flat = [int(v) for row in grid for v in (row if isinstance(row, list | tuple) else [row])] if grid else []
    rows = len(grid) if grid and isinstance(grid[0], list | tuple) else round(len(flat) ** 0.5)
    if not flat or rows * (len(flat) // max(rows, 1)) != len(flat):
        raise StateError(
            f"photo {photo.get('name')!r}, block {name}: {len(flat)} patches form no grid; "
            f"expected rows of group ids, or a square number of them"
        )
    return {"name": name, "cols": len(flat) // rows, "ids": flat}


def _photos(data: RunData, folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "name": str(p.get("name", "")),
            "label": str(p.get("label") or ""),
            "dense": p.get("dense"),
            "finished": p.get("finished"),
            "uri": image_uri(str(p["image"]), folder),
            "grids": [_grid(b, i, p) for i, b in enumerate(p.get("blocks") or [])],
        }
        for p in data.get("photos") or []
        if p.get("image")
    ]


def _gallery(data: RunData, folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "name": str(group.get("name", "")),
            "note": str(group.get("note") or ""),
            "pictures": [
                {"title": str(p["title"]), "note": str(p.get("note") or ""), "uri": image_uri(str(p["image"]), folder)}
                for p in group.get("pictures") or []
            ],
        }
        for group in data.get("gallery") or []
    ]


def _methods(data: RunData) -> list[dict[str, Any]]:
    out = []
    for name, about in (data.get("methods") or {}).items():
        tables = []
        for t in about.get("tables") or []:
            rows = t.get("rows") or []
            heads = t.get("columns") or (list(rows[0]) if rows and isinstance(rows[0], Mapping) else [])
            cells = [[r.get(h, "") for h in heads] if isinstance(r, Mapping) else r for r in rows]
            text = [[f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in cells]
            if text:
                tables.append({"title": t.get("title", ""), "columns": heads, "rows": text})
        facts = _flat(about.get("facts") or {})
        if tables or facts:
            out.append({"name": name, "facts": facts, "tables": tables})
    return out


def _curves(data: RunData) -> list[tuple[str, list[tuple[str, Markup]]]]:
    phases: dict[str, list[tuple[str, Markup]]] = {}
    for row in data.get("curves") or []:
        drawn = charts.curve(row)
        if drawn:
            phases.setdefault(str(row.get("phase", "fit")), []).append((str(row.get("term", "loss")), drawn))
    return list(phases.items())


def _phases(data: RunData) -> list[dict[str, str]]:
    """Return every phase with its steps and what it took of the clock and of the processor."""
    rows = [r for r in data.get("phases") or [] if is_number(r.get("seconds"))]
    total = sum(r["seconds"] for r in rows)
    return [
        {
            "phase": str(r["phase"]),
            "steps": str(r.get("steps", "")),
            "wall": as_seconds(r["seconds"]),
            "cpu": as_seconds(r["cpu_seconds"]) if is_number(r.get("cpu_seconds")) else "\N{EN DASH}",
            "share": as_percent(r["seconds"] / total if total else 0.0),
        }
        for r in rows
    ]


def _tokens(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the token counts as the chart reads them, from counts per block or ``{in, after_prune, after_merge}``."""
    if "after_merge" not in data:
        return dict(data)
    kept, pruned = data["after_merge"], data.get("after_prune") or data["after_merge"]
    entering = [data["in"], *kept[:-1]]
    return {
        "kept": kept,
        "dense": data["in"],
        "pruned": [n - p for n, p in zip(entering, pruned, strict=True)],
        "merged": [p - k for p, k in zip(pruned, kept, strict=True)],
        "schedule": f"after pruning  {pruned}\nafter merging  {kept}",
    }


def _quantization(data: RunData) -> list[dict[str, Any]]:
    """Return the quantized layers: as given, else from the methods' tables whose rows have layer and bits ("8x8")."""
    if data.get("quantization"):
        return data["quantization"]
    tables = [t for about in (data.get("methods") or {}).values() for t in about.get("tables") or []]
    rows = []
    for row in (
        r for t in tables for r in t.get("rows") or [] if isinstance(r, Mapping) and {"layer", "bits"} <= set(r)
    ):
        widths = [int(b) for b in str(row["bits"]).split("x") if b.isdigit()]
        errors = {
            "error": row.get("error", row.get("relative error")),
            "gamma": row.get("gamma", row.get("correlation")),
        }
        if widths:
            rows.append({"layer": row["layer"], "bits_w": widths[0], "bits_a": widths[-1], **errors})
    return rows


def _run(data: RunData, folder: Path, prefix: str) -> dict[str, Any]:
    rows = data.get("table") or []
    tokens = _tokens(data.get("tokens") or {})
    layers = _quantization(data)
    return {
        "id": prefix,
        "title": data["title"],
        "folder": data["folder"],
        "sentence": saved.sentence(rows),
        "figures": saved.figures(rows),
        "facts": [
            (k.replace("_", " "), as_fact(k, v)) for k, v in (data.get("summary") or {}).items() if v is not None
        ],
        "results": _results(rows, prefix),
        "tokens": charts.tokens(tokens),
        "schedule": tokens.get("schedule") or "",
        "photos": _photos(data, folder),
        "gallery": _gallery(data, folder),
        "layers": charts.layers(layers),
        "layer_rows": layers,
        "phases": _phases(data),
        "curves": _curves(data),
        "profiles": profiles(data.get("profile")),
        "methods": _methods(data),
        "failed": data.get("failed") or [],
        "environment": _flat(data.get("environment") or {}),
        "recipe": data.get("recipe") or "",
    }


def _compared(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Return the joint table of several runs: every row, with the name of its run."""
    if len(runs) < 2:
        return None
    names = [str(r["title"]) for r in runs]
    if len(set(names)) < len(names):
        names = [f"{n} ({r['folder']})" for n, r in zip(names, runs, strict=True)]
    named = zip(names, runs, strict=True)
    return _results([{**row, "run": n} for n, r in named for row in r.get("table") or []], "all")


def render(runs: Sequence[tuple[RunData, Path]]) -> str:
    """Return the page of one or several runs given as (data, run folder)."""
    strict = jinja2.StrictUndefined
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=strict)
    parts = [_run(data, folder, f"r{i}") for i, (data, folder) in enumerate(runs)]
    pictures = {r["id"]: [p["grids"] for p in r["photos"]] for r in parts}
    title = parts[0]["title"] if len(parts) == 1 else f"{len(parts)} runs compared"
    return environment.from_string(_asset("page.html")).render(
        title=title,
        runs=parts,
        compared=_compared([data for data, _ in runs]),
        pictures=pictures,
        style=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        version=metadata.version("gossamer"),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def build_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Write one self-contained HTML page about one or several runs.

    Args:
        run_dirs: Run folders; several are compared.
        out: The HTML file to write.

    Returns:
        ``out``.

    Raises:
        StateError: No folder was given, or one holds nothing to report.
    """
    if not run_dirs:
        raise StateError("report: got no run folder; pass at least one")
    folders = [Path(d) for d in run_dirs]
    html = render([(read_run(folder), folder) for folder in folders])
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(html, encoding="utf-8")
    return out
