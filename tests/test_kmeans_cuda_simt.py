"""The CUDA kernels of the k-means assignment on the CPU, thread by thread (native/simt.h), under the address and
undefined-behaviour sanitizers, in three orders of the threads of a block; tensor cores are native twins."""

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

from clustops.reference.kmeans_ops import accumulator, assign_l2

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
SOURCES = ["common/kmeans_cuda.cpp", "cuda/kmeans.cu", "cuda/kmeans_pack.cu", "cuda/kmeans_score.cu"]
COMPILER = shutil.which("g++")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
PRECISIONS = {"medium": 0, "high": 1, "highest": 2}
ROOM = 160 << 10  # of shared memory: the rows of a unit stay there
LITTLE = 70 << 10  # not with two parts and more than one chunk of features

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")
orders = st.integers(0, 2)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("simt") / "kmeans_cuda"
    flags = ["-std=c++17", "-O1", "-g", "-w", "-DCLUSTOPS_SIMT", f"-I{TESTS / 'native'}"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [TESTS / "native" / "kmeans_cuda.cpp", *(CSRC / name for name in SOURCES)]
    subprocess.run([str(COMPILER), *flags, *sanitize, "-x", "c++", *map(str, sources), "-o", str(built)], check=True)
    return built


def assign(
    program: Path,
    x: Tensor,
    centroids: Tensor,
    order: int,
    top: int = 1,
    precision: str = "highest",
    padding: int = 0,
    shared: int = ROOM,
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, distances, and how many rows of each problem were too close to call."""
    b, n, d = x.shape
    stride = d + padding
    sizes = [b, n, centroids.shape[1], d, top, DTYPES[x.dtype], PRECISIONS[precision], stride, order, shared]
    rows = torch.cat([x, x.new_full((b, n, padding), torch.nan)], -1).contiguous()
    data = b"".join(t.view(torch.uint8).numpy().tobytes() for t in (rows, centroids.contiguous()) if t.numel())
    run = subprocess.run(
        [str(program)], input=np.array(sizes, dtype=np.int64).tobytes() + data, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr.decode()
    exact = accumulator(x.dtype)
    out = torch.frombuffer(bytearray(run.stdout), dtype=torch.uint8)
    count, size = b * n * top, torch.finfo(exact).bits // 8
    labels, distances, close = out.split([8 * count, size * count, len(out) - (8 + size) * count])
    return (
        labels.clone().view(torch.int64).view(b, n, top),
        distances.clone().view(exact).view(b, n, top),
        close.clone().view(torch.int32),
    )


def draw(b: int, n: int, k: int, d: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    x, centroids = torch.randn(b, n, d, generator=g), torch.randn(b, k, d, generator=g)
    return x.to(dtype), centroids.to(accumulator(dtype))


def squared(x: Tensor, centroids: Tensor) -> Tensor:
    return (x.double().unsqueeze(2) - centroids.double().unsqueeze(1)).square().sum(-1)


def check(x: Tensor, centroids: Tensor, labels: Tensor, distances: Tensor, slack: float = 2e-6) -> None:
    exact = squared(x, centroids)
    chosen = exact.gather(-1, labels)
    torch.testing.assert_close(chosen, exact.min(-1, keepdim=True).values, rtol=slack, atol=1e-30)
    torch.testing.assert_close(distances.double(), chosen, rtol=2e-6, atol=1e-30)
