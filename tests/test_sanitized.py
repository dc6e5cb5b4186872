"""CPU kernels outside Python under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import generator, seeds
from torch import Tensor

SOURCES = Path(__file__).parent / "native"
COMPILER = shutil.which("g++")
OTHERS = [
    str(SOURCES.parents[1] / "csrc" / "cpu" / f"kmeans_{name}.cpp")
    for name in ("nearest", "iterate", "update")
]
ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
SETS = {
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


def build(folder: Path, source: str, *flags: str) -> Path:
    program = folder / source.removesuffix(".cpp")
    command = [str(COMPILER), "-std=c++17", "-O1", "-g", "-w", "-pthread", f"-I{SOURCES}", *flags]
    subprocess.run([*command, str(SOURCES / source), "-o", str(program)], check=True)
    return program


def runnable(name: str) -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return name == "baseline" or {"avx2": "avx2", "avx512": "avx512vl", "amx": "amx_bf16"}[name] in flags


def assign(program: Path, x: Tensor, centroids: Tensor, option: int) -> tuple[Tensor, Tensor]:
    b, n, d = x.shape
    sizes = np.array([b, n, centroids.shape[1], d, option], dtype=np.int64)
    data = sizes.tobytes() + x.numpy().tobytes() + centroids.numpy().tobytes()
    run = subprocess.run([str(program)], input=data, capture_output=True, check=False)
    assert run.returncode == 0, run.stderr.decode()
    labels = np.frombuffer(run.stdout, np.int64, b * n).reshape(b, n)
    distances = np.frombuffer(run.stdout, np.float32, b * n, offset=8 * b * n).reshape(b, n)
    top = min(2, centroids.shape[1])
    nearest = np.frombuffer(run.stdout, np.int64, b * n * top, offset=12 * b * n).reshape(b, n, top)
    assert np.array_equal(nearest[..., 0], labels)
    moved = np.frombuffer(run.stdout, np.float32, centroids.numel(), offset=12 * b * n + 8 * b * n * top)
    assert np.isfinite(moved).all()
    return torch.from_numpy(labels.copy()), torch.from_numpy(distances.copy())


def check(program: Path, x: Tensor, centroids: Tensor, option: int) -> None:
    labels, distances = assign(program, x, centroids, option)
    exact = (x.double().unsqueeze(2) - centroids.double().unsqueeze(1)).square().sum(-1)
    chosen = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, exact.min(-1).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-4, atol=1e-6)


def draw(b: int, n: int, k: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(b, n, d, generator=g), torch.randn(b, k, d, generator=g)


RUNNABLE = [name for name in SETS if runnable(name)]
# The best one always, the others among the slow tests: compiling takes its time.
SANITIZED = [*(pytest.param(name, marks=pytest.mark.slow) for name in RUNNABLE[:-1]), RUNNABLE[-1]]


@pytest.fixture(scope="module", params=SANITIZED)
def cpu_kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = [f"-DCLUSTOPS_ISA={request.param}", *SETS[request.param], *ADDRESS, *OTHERS]
    return build(tmp_path_factory.mktemp(request.param), "kmeans.cpp", *flags)


@settings(max_examples=12)
@given(
    b=st.integers(0, 3),
    n=st.sampled_from([1, 7, 8, 9, 131, 515]),
    k=st.sampled_from([1, 15, 17, 48, 49, 97]),
    d=st.sampled_from([0, 1, 15, 16, 17, 33]),
    seed=seeds,
)
def test_the_cpu_kernel_stays_in_bounds(cpu_kernel: Path, b: int, n: int, k: int, d: int, seed: int) -> None:
    check(cpu_kernel, *draw(b, n, k, d, seed), 1)


def test_threads_do_not_race(tmp_path: Path) -> None:
    flags = ["-fsanitize=thread", "-DCLUSTOPS_STD_THREADS", "-DCLUSTOPS_ISA=baseline", *OTHERS]
    program = build(tmp_path, "kmeans.cpp", *flags)
    check(program, *draw(2, 1100, 70, 9, 0), 4)
