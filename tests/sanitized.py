"""CPU kernels outside Python, under the sanitizers of addresses, of undefined behaviour and of threads."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from simt import COMPILER, TESTS

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
SETS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
# Unoptimised: it compiles several times as fast, and the kernels see small shapes.
UNOPTIMISED = ["-O0", "-ffp-contract=off"]


def runnable(name: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return name == "baseline" or {"avx2": "avx2", "avx512": "avx512vl", "amx": "amx_bf16"}[name] in flags


RUNNABLE = [name for name in SETS if runnable(name)]
# The best one always, the others among the slow tests: compiling takes its time.
SANITIZED = [*(pytest.param(name, marks=pytest.mark.slow) for name in RUNNABLE[:-1]), RUNNABLE[-1]]


def build_for_addresses(folder: Path, program: str, instruction_set: str, *flags: str) -> Path:
    """The program of ``native/<program>.cpp``, which ends at a bad address or at undefined behaviour."""
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return _build(
        folder, program, f"-DCLUSTOPS_ISA={instruction_set}", *SETS[instruction_set], *sanitize, *flags
    )


def build_for_threads(folder: Path, program: str, *flags: str) -> Path:
    """The program of ``native/<program>.cpp``, which ends at a race."""
    return _build(
        folder, program, "-DCLUSTOPS_ISA=baseline", "-DCLUSTOPS_STD_THREADS", "-fsanitize=thread", *flags
    )


def _build(folder: Path, program: str, *flags: str) -> Path:
    sources = TESTS / "native"
    command = [str(COMPILER), "-std=c++17", "-O1", "-g1", "-w", "-pthread", f"-I{sources}", *flags]
    subprocess.run([*command, str(sources / f"{program}.cpp"), "-o", str(folder / program)], check=True)
    return folder / program
