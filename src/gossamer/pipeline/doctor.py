"""What this installation can do, and what is missing."""

from __future__ import annotations

import importlib.util
import sys
from importlib import metadata
from typing import Any

from gossamer import kernels
from gossamer.runtimes.device import device_report

__all__ = ["doctor"]

_OPTIONAL = {
    "pyarrow": ("parquet data", "pip install 'gossamer[parquet]'"),
    "datasets": ("Hugging Face data", "pip install 'gossamer[hf]'"),
    "nncf": ("the int8 peer in benchmarks", "pip install 'gossamer[peers]'"),
}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def doctor() -> dict[str, Any]:
    """Return versions, device facts, kernels and a list of what is missing with its remedy."""
    import torch

    packages = ("gossamer", "torch", "torchvision", "timm", "accelerate", "onnx", "onnxruntime", "openvino")
    missing = [
        {"what": what, "package": name, "remedy": remedy}
        for name, (what, remedy) in _OPTIONAL.items()
        if importlib.util.find_spec(name) is None
    ]
    missing += [
        {"what": f"runtime {name}", "package": name, "remedy": f"pip install {name}"}
        for name in ("openvino", "onnxruntime")
        if importlib.util.find_spec(name) is None
    ]
    return {
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in packages},
        "device": device_report(),
        "kernels": kernels.report(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "missing": missing,
    }
