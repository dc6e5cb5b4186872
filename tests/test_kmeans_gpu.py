"""The steps of k-means on a GPU against the reference, in a captured graph, without waits, at large sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DEVICES, generator, no_waits, odd_sizes, seeds, small_sizes
from torch import Tensor

import clustops
from clustops.kmeans_rows import Rows
from clustops.native import kmeans_iterate as whole
from clustops.reference import kmeans_ops as ops
from clustops.reference import kmeans_seeding as seeding
from clustops.reference import kmeans_split as splitting
from clustops.reference.kmeans_iterate import iterate

kernels = torch.ops.clustops
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
few = settings(max_examples=15)


def draw(b: int, n: int, d: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    x = torch.randn(b, n, d, generator=g) * 10.0 ** -torch.randint(0, 8, (b, n, d), generator=g)
    weights = torch.rand(b, n, generator=g, dtype=torch.float64) * torch.randint(0, 3, (b, n), generator=g)
    weights[:, -1] = 1
    return x.to(dtype), weights


def labels_of(b: int, n: int, k: int, seed: int) -> Tensor:
    return torch.randint(-1, k, (b, n), generator=generator(seed))


def assert_bits(found: Any, expected: Any) -> None:
    found, expected = (t if isinstance(t, (tuple, list)) else (t,) for t in (found, expected))
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.cpu(), right.cpu(), rtol=0, atol=0, equal_nan=True)


def on_gpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.cuda() for t in tensors)


def samples(device: str = "cpu") -> list[tuple[Any, tuple[Any, ...]]]:
    x, weights = (t.to(device) for t in draw(2, 9, 4, torch.float32, 0))
    grid = ops.units(ops.bounds(x, weights), (weights > 0).sum(1))
    labels, score = labels_of(2, 9, 3, 0).to(device), torch.rand(2, 9, device=device)
    best, means = splitting.highest(score, labels, weights, 3), x[:, :3].clone()
    counts = torch.tensor([[0, 4, 2], [3, 0, 0]], device=device)
    return [
        (kernels.kmeans_iterate, (x, means, weights, grid, 2, False, "split", 0)),
        (kernels.kmeans_highest, (score, labels, weights, 3)),
        (kernels.kmeans_places, (score, labels, weights, best, 5, True)),
        (kernels.kmeans_split, (means, x[:, 3:6], counts, 0, 1, 2)),
    ]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(4))
def test_ops_pass_opcheck(index: int, device: str) -> None:
    op, sample = samples(device)[index]
    torch.library.opcheck(op.default, sample)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_16_bits_are_used_as_they_lie_with_the_result_of_32(device: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 90, 12, generator=generator(0)).to(dtype).to(device)
    chunk = Rows(x, None, None).at_once()
    assert chunk is not None
    assert chunk.data_ptr() == x.data_ptr()
    narrow, wide = (clustops.kmeans(rows, 7, max_iter=5) for rows in (x, x.float()))
    assert_bits(list(vars(narrow).values()), list(vars(wide).values()))


@pytest.mark.cuda
@few
@given(b=st.integers(0, 3), n=odd_sizes, d=odd_sizes, k=small_sizes, dtype=dtypes, seed=seeds)
def test_small_shapes_of_the_update_are_the_reference_s_bit_for_bit(
    b: int, n: int, d: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    x, weights = draw(b, n, d, dtype, seed)
    labels, before = labels_of(b, n, k, seed), labels_of(b, n, k, seed + 1)
    gx, gw, gl, gb = on_gpu(x, weights, labels, before)
    bound = ops.bounds(x, weights)
    assert_bits(kernels.kmeans_bounds(gx, gw), bound)
    grid = ops.units(bound, (weights > 0).sum(1))
    right = torch.zeros(b, 2, k, d + 1, dtype=torch.float64), torch.zeros(b, k, dtype=torch.int64)
    found = on_gpu(*right)
    for now, then in ((before, None), (labels, before)):
        ops.sums_(*right, x, now, weights, grid, then)
        kernels.kmeans_sums_(*found, gx, now.cuda(), gw, grid.cuda(), None if then is None else gb)
        assert_bits(found, right)
    previous = torch.randn(b, k, d, generator=generator(seed)).to(ops.accumulator(dtype))
    means, shift = kernels.kmeans_means(found[0], previous.cuda())
    assert_bits(means, ops.means(right[0], previous)[0])
    torch.testing.assert_close(shift.cpu(), ops.means(right[0], previous)[1], rtol=1e-12, atol=0)
    assert_bits(kernels.kmeans_counts(gl, gw, k), ops.counts(labels, weights, k))
    assert_bits(kernels.cluster_means(gx, gl, gw, k), ops.cluster_means(x, labels, weights, k))


@pytest.mark.cuda
@few
@given(b=st.integers(1, 2), restarts=st.integers(1, 2), n=odd_sizes, d=small_sizes, dtype=dtypes, seed=seeds)
def test_small_shapes_of_the_start_are_the_reference_s(
    b: int, restarts: int, n: int, d: int, dtype: torch.dtype, seed: int
) -> None:
    g, k, t = generator(seed), min(n, 6), 3
    x = torch.randn(b, n, d, generator=g).to(dtype)
    weights = torch.rand(b, n, generator=g, dtype=torch.float64) + 0.1
    uniform = torch.rand(b * restarts, k * t, generator=g, dtype=torch.float64)
    assert_bits(kernels.kmeans_seed(*on_gpu(x, weights, uniform), k), seeding.seed(x, weights, uniform, k))


@pytest.mark.cuda
@few
@given(
    n=odd_sizes,
    d=odd_sizes,
    k=small_sizes,
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    empty=st.sampled_from(["split", "keep"]),
    seed=seeds,
)
def test_small_shapes_of_whole_iterations_are_the_reference_s_bit_for_bit(
    n: int, d: int, k: int, dtype: torch.dtype, empty: str, seed: int
) -> None:
    g = generator(seed)
    x, weights = torch.randn(3, n, d, generator=g).to(dtype), torch.ones(3, n, dtype=torch.float64)
    weights[:, 1:] = torch.randint(0, 3, (3, n - 1), generator=g) / 2
    grid = ops.units(ops.bounds(x, weights), (weights > 0).sum(1))
    rows = torch.randint(0, n, (3, k, 1), generator=g).expand(-1, -1, d)
    centroids = x.gather(1, rows).float()
    assert whole.fits(*on_gpu(x, centroids), False)
    found = kernels.kmeans_iterate(*on_gpu(x, centroids, weights, grid), 4, False, empty, seed)
    assert_bits(found, iterate(x, centroids, weights, grid, 4, False, empty, seed))


@pytest.mark.cuda
def test_small_problems_and_the_composed_path_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 200, 24, generator=generator(0)).cuda()
    whole_result = clustops.kmeans(x, 20, init=x[:, :20], tol=0, max_iter=8)
    monkeypatch.setattr("clustops.kmeans_lloyd.fits", lambda x, k: False)
    composed = clustops.kmeans(x, 20, init=x[:, :20], tol=0, max_iter=8)
    assert_bits(list(vars(whole_result).values()), list(vars(composed).values()))


@pytest.mark.cuda
@given(n=odd_sizes, k=small_sizes, dtype=st.sampled_from([torch.float32, torch.float64]), seed=seeds)
def test_small_shapes_of_splits_are_the_reference_s_bit_for_bit(
    n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    g = generator(seed)
    labels, weights = labels_of(2, n, k, seed), torch.randint(0, 2, (2, n), generator=g).double()
    score = torch.randint(-3, 4, (2, n), generator=g).to(dtype) / 3
    best = splitting.highest(score, labels, weights, k)
    assert_bits(kernels.kmeans_highest(*on_gpu(score, labels, weights), k), best)
    for last in (True, False):
        places = kernels.kmeans_places(*on_gpu(score, labels, weights, best), 7, last)
        assert_bits(places, splitting.places(score, labels, weights, best, 7, last))
    means, farthest = torch.randn(2, 2, k, 5, generator=g, dtype=dtype)
    counts = torch.randint(0, 4, (2, k), generator=g)
    found = kernels.kmeans_split(*on_gpu(means, farthest, counts), seed, 1, 3)
    assert_bits(found, splitting.split(means, farthest, counts, seed, 1, 3))


SHAPES = {"in shared memory": (4, 100, 8, 5), "composed": (2, 3000, 40, 70)}


@pytest.mark.cuda
@pytest.mark.parametrize("empty", ["split", "keep"])
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_whole_call_is_captured_and_replayed(shape: tuple[int, ...], metric: str, empty: str) -> None:
    b, n, d, k = shape
    x = torch.randn(b, n, d, generator=generator(1)).cuda()
    other = torch.randn(b, n, d, generator=generator(2)).cuda()

    def run(rows: Tensor) -> Any:
        return clustops.kmeans(rows, k, init=rows[:, :k], tol=0, max_iter=5, empty=empty, metric=metric)

    expected = run(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    x.copy_(other)
    graph.replay()
    assert_bits((captured.centroids, captured.labels), (expected.centroids, expected.labels))


@pytest.mark.cuda
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_no_iteration_waits_for_the_host(shape: tuple[int, ...], weighted: bool, metric: str) -> None:
    b, n, d, k = shape
    x = torch.randn(b, n, d, generator=generator(0)).cuda()
    weights = torch.rand(b, n, generator=generator(1)).cuda() if weighted else None
    start = x[:, :k].clone()
    clustops.kmeans(x, k, init=start, weights=weights, tol=0, max_iter=2, empty="keep", metric=metric)
    with no_waits():
        clustops.kmeans(x, k, init=start, weights=weights, tol=0, max_iter=5, empty="keep", metric=metric)


@pytest.mark.cuda
@pytest.mark.parametrize("empty", ["split", "farthest", "random", "keep"])
def test_no_repair_within_iterations_waits_for_the_host(empty: str) -> None:
    from clustops.kmeans_lloyd import lloyd

    x = torch.randn(2, 3000, 40, generator=generator(0)).cuda()
    start = x[:, :1].expand(-1, 70, -1).clone()  # all equal: 69 of 70 are empty
    options: dict[str, Any] = {"tolerance": None, "seed": 0, "look": False, "report": None}
    lloyd(Rows(x, None, None), start, max_iter=1, empty=empty, **options)
    with no_waits():
        fit = lloyd(Rows(x, None, None), start, max_iter=8, empty=empty, **options)
    assert (int(fit.n_repaired.min()) > 0) == (empty != "keep")


@pytest.mark.cuda
def test_no_start_waits_for_the_host() -> None:
    x = torch.randn(2, 3000, 20, generator=generator(0)).cuda()
    weights = torch.ones(2, 3000, dtype=torch.float64, device="cuda")
    uniform = torch.rand(4, 30, dtype=torch.float64, device="cuda")
    kernels.kmeans_seed(x, weights, uniform, 10)
    with no_waits():
        kernels.kmeans_seed(x, weights, uniform, 10)


@pytest.mark.cuda
def test_kernels_run_on_the_current_stream() -> None:
    x = torch.randn(1, 20_000, 32, generator=generator(0)).cuda()
    expected = clustops.kmeans(x, 50, init=x[:, :50], tol=0, max_iter=5)
    torch.cuda.synchronize()
    late = torch.zeros_like(x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what runs elsewhere sees zeros
        late.copy_(x)
        found = clustops.kmeans(late, 50, init=late[:, :50], tol=0, max_iter=5)
    side.synchronize()
    assert_bits((found.centroids, found.labels), (expected.centroids, expected.labels))


@pytest.mark.cuda
def test_more_problems_than_a_grid_has_rows() -> None:
    x = torch.randn(70_001, 6, 3, generator=generator(0))
    found = clustops.kmeans(x.cuda(), 2, init=x[:, :2].cuda(), tol=0, max_iter=3)
    expected = clustops.kmeans(x, 2, init=x[:, :2], tol=0, max_iter=3)
    assert_bits((found.centroids, found.labels), (expected.centroids, expected.labels))


@pytest.mark.cuda
def test_more_than_two_to_the_31_elements() -> None:
    n, d, k = 2**31 // 256 + 1000, 256, 3
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of GPU memory")
    x = torch.zeros(1, n, d, dtype=torch.bfloat16, device="cuda")
    x[0, -5:] = 2.0
    labels = torch.zeros(1, n, dtype=torch.int64, device="cuda")
    labels[0, -5:] = 1
    weights = torch.ones((), dtype=torch.float64, device="cuda").expand(1, n)
    means, counts = kernels.cluster_means(x, labels, weights, k)
    assert counts.tolist() == [[n - 5, 5, 0]]
    assert means[0].mean(-1).tolist() == [0, 2, 0]
    assert kernels.kmeans_bounds(x, weights)[0].tolist() == [2.0] * d + [1.0]
    start = kernels.kmeans_seed(x, weights, torch.full((1, 4), 0.5, dtype=torch.float64, device="cuda"), 2)
    assert int(start[0, 1]) >= n - 5
