"""The assignment of k-means on a CPU, under the sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sanitized import SANITIZED, build_for_addresses, build_for_threads
from simt import CUDA, Results, needs_compiler
from support import generator, seeds
from torch import Tensor

OTHERS = [str(CUDA.parent / "cpu" / f"kmeans_{name}.cpp") for name in ("nearest", "iterate", "update")]

pytestmark = needs_compiler


def assign(program: Path, x: Tensor, centroids: Tensor, option: int) -> tuple[Tensor, Tensor]:
    b, n, d = x.shape
    k = centroids.shape[1]
    top = min(2, k)
    found = Results(program, [], [b, n, k, d, option], x, centroids)
    labels, distances = found.take(torch.int64, b, n), found.take(torch.float32, b, n)
    assert torch.equal(found.take(torch.int64, b, n, top)[..., 0], labels)
    assert found.take(torch.float32, *centroids.shape).isfinite().all()
    return labels, distances


def check(program: Path, x: Tensor, centroids: Tensor, option: int) -> None:
    labels, distances = assign(program, x, centroids, option)
    exact = (x.double().unsqueeze(2) - centroids.double().unsqueeze(1)).square().sum(-1)
    chosen = exact.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(chosen, exact.min(-1).values, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distances.double(), chosen, rtol=1e-4, atol=1e-6)


def draw(b: int, n: int, k: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    return torch.randn(b, n, d, generator=g), torch.randn(b, k, d, generator=g)


@pytest.fixture(scope="module", params=SANITIZED)
def cpu_kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_for_addresses(tmp_path_factory.mktemp("build"), "kmeans", request.param, *OTHERS)


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
    program = build_for_threads(tmp_path, "kmeans", *OTHERS)
    check(program, *draw(2, 1100, 70, 9, 0), 4)
