"""What this machine is: processor, instruction sets, memory, installed runtimes."""

from __future__ import annotations

import os
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from gossamer.core.errors import RecipeError, nearest

__all__ = [
    "FEATURES",
    "best_dense_precisions",
    "cpu_features",
    "device_key",
    "device_report",
    "isa_override",
    "num_cores",
    "tile",
    "versions",
]

FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
"""Instruction sets that change which kernel a runtime picks, weakest first (names of /proc/cpuinfo)."""
_ARM_FEATURES = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16")
_AVX512 = ("avx2", "avx_vnni", "avx512f")
_CAPS: dict[str, tuple[str, ...]] = {
    "SSE41": (),
    "AVX": (),
    "AVX2": ("avx2",),
    "AVX2_VNNI": ("avx2", "avx_vnni"),
    "AVX2_VNNI_2": ("avx2", "avx_vnni"),
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": (*_AVX512, "avx512_vnni"),
    "AVX512_CORE_BF16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": FEATURES[:6],
    "AVX10_1_512": FEATURES[:6],
}
_PACKAGES = ("gossamer", "torch", "torchvision", "timm", "onnx", "onnxruntime", "openvino", "nncf", "numpy")
_HALF_TILE, _TILE = 8, 16
_DENSE_RUNTIMES = ("openvino", "onnxruntime", "torch")


@cache
def _cpuinfo() -> dict[str, str]:
    """Return the first processor's block of /proc/cpuinfo, ``{}`` where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    block = text.split("\n\n", 1)[0]
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}


def isa_override() -> str | None:
    """Return the instruction-set cap set in ``ONEDNN_MAX_CPU_ISA``, in capitals, or ``None``.

    torch's and OpenVINO's oneDNN honour it; ONNX Runtime's own kernels do not.
    """
    value = os.environ.get("ONEDNN_MAX_CPU_ISA", "").strip().upper()
    return value if value not in ("", "DEFAULT", "ALL") else None


def cpu_features(*, capped: bool = True) -> tuple[str, ...]:
    """Return the instruction sets that matter here and that the processor has.

    Args:
        capped: Leave out what ``ONEDNN_MAX_CPU_ISA`` switches off.

    Returns:
        Names as in /proc/cpuinfo, weakest first; empty where the system does not tell.
    """
    info = _cpuinfo()
    flags = set(info.get("flags", info.get("Features", "")).split())
    known = FEATURES if "flags" in info else _ARM_FEATURES
    found = tuple(name for name in known if name in flags)
    cap = isa_override()
    if not capped or cap is None or "AMX" in cap or cap not in _CAPS:
        return found
    return tuple(name for name in found if name in _CAPS[cap])


def num_cores() -> int:
    """Return the number of processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)


def best_dense_precisions(runtime: str) -> tuple[str, ...]:
    """Return the dense precisions that ``runtime`` runs natively here; the best is one of these.

    ``"bf16"`` is listed where the processor has bf16 products and the runtime uses them; elsewhere
    it is emulated and many times slower than ``"f32"``.

    Raises:
        RecipeError: Unknown runtime.
    """
    if runtime not in _DENSE_RUNTIMES:
        hint = nearest(runtime, _DENSE_RUNTIMES)
        raise RecipeError(f"runtime {runtime!r}; allowed are {', '.join(_DENSE_RUNTIMES)}{hint}")
    native = {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_features())
    return ("f32", "bf16") if native and runtime != "onnxruntime" else ("f32",)


def tile() -> int:
    """Return the multiple to which token and channel counts are best rounded on this machine.

    16: rows of an AMX tile and floats of a 512-bit register; 8 where registers hold 8 floats.
    """
    features = cpu_features()
    return _HALF_TILE if features and "avx2" in features and "avx512f" not in features else _TILE


def _brand() -> str:
    info = _cpuinfo()
    return info.get("model name") or info.get("Model") or platform.processor() or platform.machine() or "unknown"


def device_key() -> str:
    """Return a short stable name of this kind of machine, ``"amd-epyc-avx512_bf16-2c"``.

    Figures measured under different keys are not comparable.
    """
    brand = re.sub(r"\((r|tm)\)|\bcpu\b|\bprocessor\b|@.*", " ", _brand().lower())
    slug = re.sub(r"[^a-z0-9]+", "-", brand).strip("-")
    features = cpu_features()
    return f"{slug}-{features[-1] if features else platform.machine()}-{num_cores()}c"


def versions() -> dict[str, str | None]:
    """Return the installed version of every package that shapes a measurement, ``None`` if absent."""
    found: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_report() -> dict[str, Any]:
    """Return what a report says about the machine, as plain JSON; memory in MiB."""
    memory = psutil.virtual_memory()
    return {
        "key": device_key(),
        "cpu": _brand(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "cores": num_cores(),
        "physical_cores": psutil.cpu_count(logical=False),
        "features": list(cpu_features(capped=False)),
        "features_in_use": list(cpu_features()),
        "isa_override": isa_override(),
        "memory_mib": memory.total // 2**20,
        "memory_free_mib": memory.available // 2**20,
        "tile": tile(),
        "precisions": {name: list(best_dense_precisions(name)) for name in _DENSE_RUNTIMES},
        "versions": versions(),
    }
