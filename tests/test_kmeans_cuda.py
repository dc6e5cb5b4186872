"""k-means assignment on a GPU against fp64: precisions, shapes past 2^31, streams, graphs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import generator, odd_sizes, seeds
from torch import Tensor

from clustops.native import kmeans as _registered  # noqa: F401
from clustops.reference.kmeans_ops import assign_l2

pytestmark = pytest.mark.cuda
assign = torch.ops.clustops.kmeans_assign

PRECISIONS = ["highest", "high", "medium"]
# How far a distance may be above the smallest, in units of |x| |c|.
EXCESS = {"highest": 1e-6, "high": 1e-4, "medium": 2e-2}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(
    b: int, n: int, k: int, d: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    g = generator(seed)
    x, centroids = torch.randn(b, n, d, generator=g), torch.randn(b, k, d, generator=g)
    return x.to(dtype).cuda(), centroids.cuda()


def check(x: Tensor, centroids: Tensor, precision: str) -> None:
    labels, distances = assign(x, centroids, 1, None, precision)
    wide, centres = x.double(), centroids.double()
    nearest = torch.cdist(wide, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
    assert bool(((labels >= 0) & (labels < centres.shape[1])).all())
    chosen = nearest.gather(-1, labels)
    size = wide.norm(dim=-1, keepdim=True) * centres.norm(dim=-1).amax(-1).view(-1, 1, 1)
    slack = 2e-5 * chosen + EXCESS[precision] * size * (precision != "highest") + 1e-30
    assert bool((chosen - nearest.min(-1, keepdim=True).values <= slack).all())
    torch.testing.assert_close(distances.double(), chosen, rtol=2e-5, atol=1e-30)


@settings(max_examples=60)
@given(
    b=st.sampled_from([1, 3]),
    n=st.sampled_from([1, 63, 127, 128, 129, 257, 1000]),
    k=st.sampled_from([1, 2, 63, 64, 65, 128, 129, 256, 257, 1000]),
    d=st.sampled_from([1, 3, 8, 16, 31, 48, 64, 65, 96, 128, 192, 256, 320, 384, 777]),
    dtype=st.sampled_from(DTYPES),
    precision=st.sampled_from(PRECISIONS),
    seed=seeds,
)
def test_small_shapes_give_the_nearest_centroid(
    b: int, n: int, k: int, d: int, dtype: torch.dtype, precision: str, seed: int
) -> None:
    check(*draw(b, n, k, d, seed, dtype), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("n", "k", "d"), [(70000, 1000, 128), (40000, 2500, 256), (40000, 700, 512), (200000, 64, 128)]
)
def test_many_rows_give_the_nearest_centroid(n: int, k: int, d: int, precision: str) -> None:
    check(*draw(1, n, k, d, 0), precision)


@settings(max_examples=20)
@given(n=odd_sizes, k=st.sampled_from([7, 97, 300]), d=st.sampled_from([3, 40, 64]), seed=seeds)
def test_small_shapes_that_cancel_are_decided_by_distances(n: int, k: int, d: int, seed: int) -> None:
    g = generator(seed)
    for apart in (1e2, 1e5):
        x, centroids = (
            (
                0.05 * torch.randn(2, rows, d, generator=g)
                + apart * torch.randint(-1, 2, (2, rows, 1), generator=g)
            ).cuda()
            for rows in (n, k)
        )
        check(x, centroids, "highest")


@settings(max_examples=20)
@given(n=odd_sizes, k=st.sampled_from([7, 97, 300]), d=st.sampled_from([1, 3, 40]), seed=seeds)
def test_small_shapes_give_ties_to_the_lowest_index(n: int, k: int, d: int, seed: int) -> None:
    g = generator(seed)
    x, centroids = (torch.randint(-3, 4, (1, rows, d), generator=g).float().cuda() for rows in (n, k))
    exact = (x.double().unsqueeze(2) - centroids.double().unsqueeze(1)).square().sum(-1)
    labels, distances = assign(x, centroids, 1, None, "highest")
    assert torch.equal(labels[..., 0], exact.argmin(-1))
    assert torch.equal(distances[..., 0].double(), exact.min(-1).values)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("top", [1, 2, 33, 100])
def test_the_nearest_few_are_those_of_the_reference(dtype: torch.dtype, top: int) -> None:
    g = generator(0)
    x = torch.randint(-9, 10, (2, 130, 17), generator=g).to(dtype).cuda()
    centroids = torch.randint(-9, 10, (2, 120, 17), generator=g).cuda()
    centroids = centroids.to(torch.float64 if dtype == torch.float64 else torch.float32)
    labels, distances = assign(x, centroids, top)
    expected = assign_l2(x.double(), centroids.double(), top)
    assert torch.equal(labels, expected[0])
    torch.testing.assert_close(distances.double(), expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 65, 72])
def test_rows_at_any_stride_give_the_same_labels(width: int, dtype: torch.dtype, precision: str) -> None:
    wide, centroids = draw(2, 300, 290, width, 0, dtype)
    for first in (0, 1):
        x = wide[..., first : first + 60]
        dense = assign(x.contiguous(), centroids[..., :60], 1, None, precision)
        for got, expected in zip(assign(x, centroids[..., :60], 1, None, precision), dense, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_label_depends_on_its_row_alone(precision: str) -> None:
    x, centroids = draw(1, 60000, 400, 64, 0)
    centroids[:, 200:] = centroids[:, :200] + 1e-6
    whole = assign(x, centroids, 1, None, precision)
    for rows in (slice(0, 1), slice(1000, 1300), slice(59000, 60000)):
        for got, expected in zip(assign(x[:, rows], centroids, 1, None, precision), whole, strict=True):
            assert torch.equal(got, expected[:, rows])


def test_precision_follows_the_setting_of_torch() -> None:
    x, centroids = draw(1, 5000, 300, 64, 0)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in PRECISIONS:
            torch.set_float32_matmul_precision(precision)
            assert torch.equal(assign(x, centroids, 1)[0], assign(x, centroids, 1, None, precision)[0])
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("k", [77, 300])
def test_a_graph_replays_without_waiting(k: int, precision: str) -> None:
    x, centroids = draw(2, 999, k, 64, 0)
    centroids[:, 5] = centroids[:, 3]
    expected = assign(x, centroids, 1, None, precision)
    other, other_centroids = draw(2, 999, k, 64, 1)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            captured = assign(other, other_centroids, 1, None, precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other.copy_(x)
    other_centroids.copy_(centroids)
    for _ in range(2):
        captured[0].fill_(-7)
        graph.replay()
        assert torch.equal(captured[0], expected[0])
        assert torch.equal(captured[1], expected[1])


def test_work_goes_to_the_current_stream() -> None:
    x, centroids = draw(1, 200000, 300, 64, 0)
    expected = assign(x, centroids, 1)[0]
    late = torch.zeros_like(x)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        labels = assign(late, centroids, 1)[0]
    stream.synchronize()
    assert torch.equal(labels, expected)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_with_nan_or_infinity_gets_a_label_in_range(precision: str) -> None:
    x, centroids = draw(1, 300, 300, 64, 0)
    broken = [3, 9, 11]
    x[0, 3, 2], x[0, 9, 0], x[0, 11] = torch.nan, torch.inf, 3e38
    labels, distances = assign(x, centroids, 1, None, precision)
    assert bool(((labels >= 0) & (labels < 300)).all())
    assert not bool(torch.isfinite(distances[0, broken, 0]).any())
    clean = [i for i in range(300) if i not in broken]
    assert torch.equal(labels[:, clean], assign(x[:, clean], centroids, 1, None, precision)[0])


@pytest.mark.parametrize(("n", "k", "d"), [(9_000_000, 300, 256), (40_000_000, 64, 64)])
def test_sizes_past_two_to_the_31(n: int, k: int, d: int) -> None:
    assert n * max(k, d) > 2**31
    x = torch.randn(1, n, d, device="cuda", dtype=torch.bfloat16)
    centroids = torch.randn(1, k, d, device="cuda")
    labels, distances = assign(x, centroids, 1, None, "medium")
    for rows in (slice(0, 100), slice(n - 100, n)):
        part = assign(x[:, rows], centroids, 1, None, "medium")
        assert torch.equal(labels[:, rows], part[0])
        assert torch.equal(distances[:, rows], part[1])


def test_more_problems_than_blocks_of_a_dimension() -> None:
    x, centroids = draw(70000, 2, 3, 4, 0)
    centroids[:, 1] = centroids[:, 0]
    labels, _ = assign(x, centroids, 1, None, "highest")
    assert torch.equal(labels, assign_l2(x.double(), centroids.double(), 1)[0])
