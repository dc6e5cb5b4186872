"""Sinkhorn losses and small matrices on a GPU: results of the reference, graphs, streams, no waits, sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_close, generator, no_waits, odd_sizes, seeds, small_sizes
from torch import Tensor

from clustops.reference import sinkhorn_ops as ops
from clustops.sinkhorn_loss import soft_cross_entropy, swapped_prediction_loss
from clustops.sinkhorn_matrix import sinkhorn_matrix

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")]

kernels = torch.ops.clustops
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
few = settings(max_examples=25)
Pairs = list[tuple[int, int]]
DINO = [(v, a) for a in range(2) for v in range(10) if v != a]


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def assert_is_the_reference(scores: Tensor, targets: Tensor, bias: Tensor, pairs: Pairs) -> None:
    """Kernels on the GPU against the reference in fp64 on the CPU, forward and backward."""
    views, of = [v for v, _ in pairs], [a for _, a in pairs]
    dtype = ops.accumulator(scores.dtype)
    s, t, c = (x.double() for x in (scores, targets, bias))
    exact = ops.soft_cross_entropy(s, t, c, views, of, 0.1, 0.05)
    inputs = [x.cuda() for x in (scores, targets, bias)]
    found = kernels.soft_cross_entropy(*inputs, views, of, 0.1, 0.05)
    for got, right in zip(found, exact, strict=True):
        assert got.dtype == dtype
        assert_close(got, right, dtype, scale=10)
    upstream = draw(*exact[0].shape, dtype=dtype, seed=1)
    right = ops.soft_cross_entropy_backward(upstream.double(), s, t, c, *exact[1:], views, of, 0.1, 0.05)
    got = kernels.soft_cross_entropy_backward(upstream.cuda(), *inputs, *found[1:], views, of, 0.1, 0.05)
    assert got.dtype == scores.dtype
    assert_close(got, right, scores.dtype, scale=10)


@few
@given(p=st.integers(1, 3), b=odd_sizes, k=odd_sizes, dtype=dtypes, target_dtype=dtypes, seed=seeds)
def test_row_with_row_is_the_reference_s(
    p: int, b: int, k: int, dtype: torch.dtype, target_dtype: torch.dtype, seed: int
) -> None:
    bias = draw(p, k, dtype=ops.accumulator(dtype), seed=seed + 2)
    scores = draw(p, b, k, dtype=dtype, seed=seed)
    assert_is_the_reference(scores, draw(p, b, k, dtype=target_dtype, seed=seed + 1), bias, [])


@few
@given(
    pairs=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 9)), min_size=1, max_size=40),
    b=small_sizes,
    k=odd_sizes,
    dtype=dtypes,
    seed=seeds,
)
def test_pairs_are_the_reference_s(pairs: Pairs, b: int, k: int, dtype: torch.dtype, seed: int) -> None:
    bias = draw(10, k, dtype=ops.accumulator(dtype), seed=seed + 2)
    scores, targets = draw(12, b, k, dtype=dtype, seed=seed), draw(10, b, k, dtype=dtype, seed=seed + 1)
    assert_is_the_reference(scores, targets, bias, pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "k"), [(64, 3000), (300, 1025), (5, 65536), (2, 262145)])
def test_large_k_is_the_reference_s(b: int, k: int, dtype: torch.dtype) -> None:
    scores = draw(10, b, k, dtype=dtype)
    assert_is_the_reference(scores, scores[:2], draw(2, k, seed=1), DINO)


def test_more_problems_than_a_grid_has_rows() -> None:
    assert_is_the_reference(draw(70001, 2, 5), draw(70001, 2, 5, seed=1), draw(70001, 5, seed=2), [])


@pytest.mark.slow
def test_more_than_2_31_scores() -> None:
    scores = torch.zeros(3, 250_000, 3000, dtype=torch.bfloat16, device="cuda")
    scores[2, -1, -1] = 20
    leaf = scores.requires_grad_()
    losses = soft_cross_entropy(leaf, scores.detach(), temperature=1, target_temperature=1, reduction="none")
    last = soft_cross_entropy(
        leaf.detach()[2:, -1:], leaf.detach()[2:, -1:], temperature=1, target_temperature=1, reduction="none"
    )
    assert torch.equal(losses[2, -1], last[0, 0])
    losses[2, -1].backward()
    assert leaf.grad is not None
    assert not bool(leaf.grad[:2].any())


def test_rows_at_any_stride_are_the_reference_s() -> None:
    room = draw(4, 50, 77)
    for scores in (room[::2, ::3, 1:40], room[:1, :1, :40].expand(2, 17, 40), room[1:3, 5:22, 4:44]):
        targets = room[2:, 20:37, 7 : 7 + scores.shape[2]]
        bias, on_gpu = draw(1, scores.shape[2]).expand(2, -1), room.cuda()
        views = [on_gpu.as_strided(t.shape, t.stride(), t.storage_offset()) for t in (scores, targets)]
        found = kernels.soft_cross_entropy(*views, bias[:1].cuda().expand(2, -1), [], [], 0.1, 0.05)
        exact = ops.soft_cross_entropy(scores.double(), targets.double(), bias.double(), [], [], 0.1, 0.05)
        for got, right in zip(found, exact, strict=True):
            assert_close(got, right, torch.float32, scale=10)


@few
@given(
    matrices=st.sampled_from([0, 1, 3, 130, 1000]),
    n=st.integers(1, 32),
    n_iters=st.sampled_from([0, 1, 3, 20, 75]),
    spread=st.sampled_from([1.0, 60.0]),
    dtype=dtypes,
    seed=seeds,
)
def test_small_matrices_are_the_reference_s(
    matrices: int, n: int, n_iters: int, spread: float, dtype: torch.dtype, seed: int
) -> None:
    m, upstream = (spread * draw(matrices, n, n, seed=seed)).to(dtype), draw(matrices, n, n, dtype=dtype)
    right = ops.sinkhorn_matrix(m.double(), n_iters)
    assert_close(kernels.sinkhorn_matrix(m.cuda(), n_iters), right, dtype, scale=4 * spread)
    right = ops.sinkhorn_matrix_backward(upstream.double(), m.double(), n_iters)
    found = kernels.sinkhorn_matrix_backward(upstream.cuda(), m.cuda(), n_iters)
    assert_close(found, right, dtype, scale=10 * spread)


def test_a_million_matrices() -> None:
    m = draw(1_000_003, 4, 4).cuda()
    found = kernels.sinkhorn_matrix(m, 20)
    assert_close(found[-1000:], ops.sinkhorn_matrix(m[-1000:].double(), 20), torch.float32)
    assert float((found.sum(-1) - 1).abs().max()) < 1e-6


def swapped(scores: Tensor) -> Tensor:
    return swapped_prediction_loss(scores, reduction="none", weights=scores[0, :, 0].detach().square())


def dino(scores: Tensor) -> Tensor:
    pairs = [(v, a) for a in range(2) for v in range(scores.shape[0]) if v != a]
    targets = scores[:2].detach()
    return soft_cross_entropy(
        scores, targets, pairs=pairs, temperature=0.1, target_temperature=0.04, reduction="none"
    )


def matrices(scores: Tensor) -> Tensor:
    return sinkhorn_matrix(scores[..., :4, :4])


FUNCTIONS: list[Callable[[Tensor], Tensor]] = [swapped, dino, matrices]


def both_ways(function: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[Tensor, Tensor]:
    leaf = scores.detach().requires_grad_()
    result = function(leaf)
    upstream = torch.linspace(-1, 1, result.numel(), device=result.device, dtype=result.dtype)
    (gradient,) = torch.autograd.grad(result, leaf, upstream.view(result.shape))
    return result.detach(), gradient


SHAPES = [(8, 37, 300), (3, 64, 9000)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_host(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    scores = draw(*shape).cuda()
    both_ways(function, scores)
    with no_waits():
        found = both_ways(function, scores)
    for got, right in zip(found, both_ways(function, scores.double().cpu()), strict=True):
        assert_close(got, right, torch.float32, scale=10)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_agree_bit_for_bit(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    scores = draw(*shape, dtype=torch.bfloat16).cuda()
    first = both_ways(function, scores)
    for _ in range(5):
        for got, right in zip(both_ways(function, scores), first, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_graph_computes_again_on_new_scores(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    scores = draw(*shape).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_ways(function, scores)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(function, scores)
    for seed in (1, 2):
        scores.copy_(draw(*shape, seed=seed))
        graph.replay()
        for got, right in zip(captured, both_ways(function, scores), strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_work_is_on_the_current_stream(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
    first, last = draw(*shape).cuda(), draw(*shape, seed=1).cuda()
    right = both_ways(function, last)
    scores, stream = first.clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        scores.copy_(last)
        found = both_ways(function, scores)
    stream.synchronize()
    for got, expected in zip(found, right, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_all_views_is_kept_or_written(dtype: torch.dtype) -> None:
    scores = draw(8, 256, 3000, dtype=dtype).cuda().requires_grad_()
    pairs = [(v, a) for a in range(2) for v in range(8) if v != a]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = soft_cross_entropy(
        scores, scores.detach()[:2], pairs=pairs, temperature=0.1, target_temperature=0.05
    )
    assert torch.cuda.max_memory_allocated() - before < scores.nbytes / 20
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 1.05 * scores.nbytes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_scores_is_used() -> None:
    scores = draw(8, 37, 300)
    for function in FUNCTIONS:
        found = both_ways(function, scores.to("cuda:1"))
        for got, right in zip(found, both_ways(function, scores.to("cuda:0")), strict=True):
            assert got.device == torch.device("cuda:1")
            assert torch.equal(got.cpu(), right.cpu())
