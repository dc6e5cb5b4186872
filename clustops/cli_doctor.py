"""``clustops doctor``: what is installed, and which code serves which op."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import pkgutil
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import native
from .recipes.demo import missing_extras


def run(options: argparse.Namespace) -> int:
    """Print the report."""
    print("\n".join(["clustops doctor", "", *_versions(), "", *_kernels(), "", *_ops()]))
    return 0


def _versions() -> list[str]:
    rows = [
        ("clustops", f"{version('clustops')}  ({Path(__file__).parent})"),
        ("torch", torch.__version__),
        ("numpy", np.__version__),
        ("python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("system", platform.platform()),
        ("processor", f"{_processor()}, {torch.get_num_threads()} threads"),
        ("GPU", _gpu()),
        ("demo extras", _extras()),
    ]
    return [f"  {name:<15}{value}" for name, value in rows]


def version(package: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed (running from source files)"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str:
    if torch.version.cuda is None:
        return "none (this torch is built without CUDA)"
    if not torch.cuda.is_available():
        return f"none visible (torch is built for CUDA {torch.version.cuda})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _extras() -> str:
    missing = missing_extras()
    return f'{", ".join(missing)} missing: pip install "clustops[demo]"' if missing else "complete"


def _kernels() -> list[str]:
    build = _build_info()
    if native.extension is None:
        lines = [("kernels", "none: all ops run as plain PyTorch"), ("reason", native.why_not or "unknown")]
        lines += [("build", str(build["reason"]))] if build.get("reason") else []
    else:
        lines = [("CPU kernels", f"built; this processor runs {_ask('instruction_set', 'unnamed')}")]
        if _ask("cuda_built", build.get("cuda", False)):
            lines.append(("CUDA kernels", f"built for {_ask('cuda_archs', build.get('cuda_archs', '?'))}"))
        else:
            lines.append(("CUDA kernels", f"not built: {build.get('reason') or 'the build left no reason'}"))
    return [f"  {name:<15}{value}" for name, value in lines]


def _ask(question: str, default: Any) -> Any:
    """What the extension answers, or ``default`` where it was built before it knew the question."""
    answer = getattr(native.extension, question, None)
    return default if answer is None else answer()


def _build_info() -> dict[str, Any]:
    path = Path(native.__file__).parent / "build_info.json"
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _ops() -> list[str]:
    """A table: op by device, ``kernel`` where one is registered, else ``reference``."""
    for module in pkgutil.iter_modules(native.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{native.__name__}.{module.name}")
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("clustops::"))
    devices = {"CPU": "CPU", "CUDA": "CUDA", "others": None}
    width = max([len(n) for n in names], default=0) - len("clustops::") + 3
    lines = ["  " + "op".ljust(width) + "".join(d.ljust(12) for d in devices)]
    for name in names:
        served = "".join(_server(name, key).ljust(12) for key in devices.values())
        lines.append("  " + name.removeprefix("clustops::").ljust(width) + served)
    return [line.rstrip() for line in lines]


def _server(op: str, key: str | None) -> str:
    registered = key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(op, key)
    return "kernel" if registered else "reference"
