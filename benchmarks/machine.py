"""What a reader of the numbers must know about where they were taken."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = [
    *("clustops", "torch", "triton", "numpy", "scipy", "scikit-learn", "faiss-cpu", "fastkmeans"),
    *("flash-kmeans", "flashlib", "cuml-cu12", "cuml-cu13", "POT", "pytorch-metric-learning"),
    *("inf-cl", "siglip-kernel"),
]
VECTORS = ["avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve"]


def describe() -> dict[str, Any]:
    """Processor, instruction sets, memory, GPU, versions, commit and how the extension was built."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "instruction_sets": instruction_sets(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "native": native(),
    }


def cpu_model() -> str:
    """The name that the kernel gives the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The vector and matrix extensions that matter here."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return [name for name in VECTORS if name in flags]


def versions() -> dict[str, str]:
    """Of every package in the comparison that is installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured; ``+changes`` when the tree differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def native() -> str:
    """Whether the compiled extension takes part."""
    from clustops.native import extension, why_not

    return "built" if extension is not None else f"absent ({why_not}): clustops runs its references"


def load_average() -> float:
    """Of the last minute; 0 where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cpuinfo(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()
