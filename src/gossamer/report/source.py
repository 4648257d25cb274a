"""Reads what a run left behind: ``report.json`` and, where it is silent, the other files of the run folder.

``report.json`` is one object; every key is optional and a section without data is left out of the page:

| key | value |
| --- | --- |
| ``title`` | name of the run |
| ``summary`` | facts, ``{label: text or number}`` |
| ``table`` | rows ``{stage, runtime, precision, macs, params, file_bytes, metric: {key, name, unit, higher, help}, score, score_interval: [low, high] (without a metric: top1, top1_interval), agreement, note, chosen, paired: {p_value}, latency: {batch: {median_ms, iqr_ms, ratio_torch, ratio_fp32, ratio_best_dense, best_dense, trusted, reason}}}``; shares in [0, 1] or percent |
| ``tokens`` | ``{in, after_prune, after_merge}``: counts per block; or ``{blocks, kept, pruned, merged, dense, schedule}`` |
| ``photos`` | ``{name, label, dense, finished, image, blocks: [grid or {block, grid}]}``; a grid holds one group id per patch, -1 where it was pruned |
| ``gallery`` | groups ``{name, note, pictures: [{title, image, note}]}``: pictures beside one another, such as before and after |
| ``quantization`` | rows ``{layer, bits_w, bits_a, error, gamma}``; default: the methods' tables whose rows have ``layer`` and ``bits`` |
| ``curves`` | rows ``{phase, term, steps, values}``; default: ``metrics.jsonl`` |
| ``phases`` | rows ``{phase, steps, seconds, cpu_seconds}``; default: ``metrics.jsonl`` |
| ``profile`` | ``{runtime: [op]}`` or rows ``{runtime, stage, precision, batch, int8_share, ops: [op]}``, op ``{type, kernel, precision, product, ms, count}``; default: ``profile.json`` |
| ``methods`` | ``{class name: {"facts": {...}, "tables": [{title, rows}]}}`` |
| ``failed`` | rows ``{name, reason}``: images that could not be read |
| ``environment``, ``recipe`` | object, YAML text |
"""  # noqa: E501

from __future__ import annotations

import base64
import json
import mimetypes
from pathlib import Path
from typing import Any

from gossamer.core.errors import StateError

__all__ = ["RunData", "image_uri", "read_run"]

RunData = dict[str, Any]
"""What ``report.json`` holds, plus ``folder`` (name of the run folder)."""


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as err:
        raise StateError(f"{path}: cannot be read as JSON ({err}); run the recipe again or delete the file") from None


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a ``metrics.jsonl``; a torn last line (a killed run) ends the reading."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def _curves(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one curve per phase and loss term."""
    series: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        for term, value in (row.get("terms") or {}).items():
            key = (str(row.get("phase", "fit")), term)
            curve = series.setdefault(key, {"phase": key[0], "term": term, "steps": [], "values": []})
            curve["steps"].append(row.get("step", len(curve["steps"])))
            curve["values"].append(value)
    return list(series.values())


def read_run(folder: Path) -> RunData:
    """Return the report data of a run folder.

    Raises:
        StateError: The folder is missing, holds nothing to report, or a file in it is unreadable.
    """
    if not folder.is_dir():
        raise StateError(f"{folder}: no such run folder; pass the --out folder of a finished run")
    data: RunData = {}
    if (folder / "report.json").is_file():
        data = _read_json(folder / "report.json")
        if not isinstance(data, dict):
            raise StateError(f"{folder / 'report.json'}: holds a {type(data).__name__}; expected an object")
    if not data.get("environment") and (folder / "environment.json").is_file():
        data["environment"] = _read_json(folder / "environment.json")
    if not data.get("profile") and (folder / "profile.json").is_file():
        data["profile"] = _read_json(folder / "profile.json")
    if not data.get("recipe") and (folder / "recipe.yaml").is_file():
        data["recipe"] = (folder / "recipe.yaml").read_text(encoding="utf-8")
    if (folder / "metrics.jsonl").is_file():
        rows = _metrics(folder / "metrics.jsonl")
        data["curves"] = data.get("curves") or _curves(rows)
        data["phases"] = data.get("phases") or [r for r in rows if r.get("event") == "end"]
    if not data:
        raise StateError(
            f"{folder}: holds neither report.json nor recipe.yaml, environment.json, metrics.jsonl; "
            f"pass the --out folder of a run"
        )
    data["folder"] = folder.resolve().name
    data.setdefault("title", data["folder"])
    return data


def image_uri(image: str, folder: Path) -> str:
    """Return ``image`` as a data URI; a path is looked up under ``folder`` (and ``artefacts/photos`` in it).

    Raises:
        StateError: There is no such file inside the run folder.
    """
    if image.startswith("data:image/"):
        return image
    root = folder.resolve()
    for base in (root, root / "artefacts" / "photos"):
        path = (base / image).resolve()
        if path.is_file() and path.is_relative_to(root):
            kind = mimetypes.guess_type(path.name)[0] or "image/jpeg"
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    raise StateError(f"{folder}: photo {image!r} is not in the run folder; run again or drop it from report.json")
