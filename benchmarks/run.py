"""``python -m benchmarks``: op x shape x implementation; a table, a JSON file and a picture for each op."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clustops.checks import ClustopsWarning

from . import machine, table
from .case import Case
from .contest import Setting, run_case
from .floors import Floors, measure_cpu, measure_cuda
from .measure import set_threads
from .record import CaseResult, Mode, case_json, header

OPS = ("kmeans", "sinkhorn", "contrastive", "sampler")
SUITES = ("quick", "cpu", "big", "cuda")
RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a suite: 0 when clustops was right in every case, 1 when not, 2 without the GPU that it needs."""
    options = _options(argv)
    if options.suite == "cuda" and not torch.cuda.is_available():
        print("no GPU visible: torch.cuda.is_available() is False; the cuda suite needs one", file=sys.stderr)
        return 2
    device = torch.device("cuda" if options.suite == "cuda" else "cpu")
    modes = modes_for(device, options.threads)
    setting = Setting(options.suite, device, modes, options.peers, options.seconds)
    warnings.simplefilter("ignore", ClustopsWarning)  # random scores deserve them; the numbers do not change
    floors = _floors(setting)
    facts = machine.describe()
    deadline = time.monotonic() + options.minutes * 60
    failed = False
    for op in options.op:
        cases = importlib.import_module(f"benchmarks.{op}").cases(options.suite)
        report = header(op, options.suite, facts, modes, floors)
        failed |= run_op(cases, setting, floors, report, options.out, deadline)
    return int(failed)


def run_op(
    cases: list[Case],
    setting: Setting,
    floors: dict[str, Floors],
    report: dict[str, Any],
    out: Path,
    deadline: float,
) -> bool:
    """Print and write case by case, so that a run that is stopped leaves what it has; whether one failed."""
    print(table.heading(report) if cases else f"{report['op']}: no case in this suite", flush=True)
    results: list[CaseResult] = []
    for case in cases:
        if time.monotonic() > deadline:
            print(f"{case.name}\n  not run: out of time")
            continue
        print(f"... {case.name}", file=sys.stderr, flush=True)
        results.append(run_case(case, setting))
        report["cases"].append(case_json(results[-1], setting.modes, floors, report["machine"]))
        print(table.case_lines(report["cases"][-1], report["modes"]), flush=True)
        write(report, out)
    if results:
        print(table.verdict(report) + "\n", flush=True)
        picture(report, out)
    return any(result.failed for result in results)


def modes_for(device: torch.device, threads: int) -> list[Mode]:
    """On a CPU the one-thread pass that is quoted, then all threads; on a GPU one pass."""
    if device.type == "cuda":
        return [Mode("GPU", threads, "events")]
    one = Mode("1 thread", 1, "process_time")
    return [one] if threads == 1 else [one, Mode(f"{threads} threads", threads, "wall")]


def write(report: dict[str, Any], folder: Path) -> None:
    """``SUITE-OP.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{report['suite']}-{report['op']}.json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def picture(report: dict[str, Any], folder: Path) -> None:
    """``SUITE-OP.png``, where matplotlib is installed."""
    try:
        from .plot import draw
    except ImportError as missing:
        print(f"no picture: {missing}", file=sys.stderr)
        return
    draw(report, folder / f"{report['suite']}-{report['op']}.png")


def _floors(setting: Setting) -> dict[str, Floors]:
    if setting.device.type == "cuda":
        return {setting.modes[0].name: measure_cuda()}
    floors = {}
    for mode in setting.modes:
        set_threads(mode.threads)
        floors[mode.name] = measure_cpu(mode.threads, 0.1 if setting.suite == "quick" else 1.0)
    return floors


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    suites = "quick ends in a minute; big is a billion labels, in 12 GB of memory and 5 of disk"
    add("--suite", choices=SUITES, default="quick", help=suites)
    add("--op", nargs="+", choices=OPS, default=list(OPS), help="all by default")
    add("--peers", nargs="+", metavar="NAME", default=[], help="only peers whose name contains one of these")
    add("--threads", type=int, default=cores, help="of the wall-clock pass; 1 leaves it out")
    add("--seconds", type=float, help="of timing, a case and pass: 0.3 in quick and 10 else by default")
    add("--minutes", type=float, default=600, help="no case starts after this many")
    add("--out", type=Path, default=RESULTS, help="folder of the JSON and PNG files")
    options = parser.parse_args(argv)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.seconds is None:
        options.seconds = 0.3 if options.suite == "quick" else 10.0
    return options
