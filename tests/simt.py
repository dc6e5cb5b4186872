"""CUDA kernels on the CPU, thread by thread (native/simt.h), under two sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).parent
CUDA = TESTS.parent / "csrc" / "cuda"
COMPILER = shutil.which("g++")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def build(folder: Path, program: str, *kernels: str, optimize: str = "-O1") -> Path:
    """The program of ``native/<program>.cpp`` with the kernels of ``csrc/cuda/<name>``."""
    built = folder / program
    flags = ["-std=c++17", optimize, "-g1", "-w", "-DCLUSTOPS_SIMT", f"-I{TESTS / 'native'}"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [TESTS / "native" / f"{program}.cpp", *(CUDA / name for name in kernels)]
    subprocess.run(
        [str(COMPILER), *flags, *sanitize, "-x", "c++", *map(str, sources), "-o", str(built)], check=True
    )
    return built


def bytes_of(given: Tensor | list[int]) -> bytes:
    if isinstance(given, Tensor):
        return bytes(given.contiguous().view(torch.uint8).numpy().tobytes()) if given.numel() else b""
    return np.array(given, np.int64).tobytes()


class Results:
    """The results of one run with these arguments and inputs, taken from its output in order."""

    def __init__(self, program: Path, arguments: list[object], *inputs: Tensor | list[int]):
        command = [str(program), *map(str, arguments)]
        run = subprocess.run(command, input=b"".join(map(bytes_of, inputs)), capture_output=True, check=False)
        assert run.returncode == 0, run.stderr.decode()
        self.left = run.stdout

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        room = torch.empty(shape, dtype=dtype)
        size = room.numel() * room.element_size()
        taken, self.left = self.left[:size], self.left[size:]
        assert len(taken) == size
        return (
            torch.from_numpy(np.frombuffer(taken, np.uint8).copy()).view(dtype).view(shape) if size else room
        )
