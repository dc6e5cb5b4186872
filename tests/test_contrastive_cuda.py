"""Class losses on a GPU: results of the reference, graphs, streams, no waits, memory, sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_close, generator, no_waits, odd_sizes, seeds
from torch import Tensor
from torch.nn.functional import normalize

from clustops.contrastive import ccssl_loss, info_nce_loss, supcon_loss
from clustops.reference import contrastive_rows as reference

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")]

kernels = torch.ops.clustops
few = settings(max_examples=25)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
WIDTHS = [1, 7, 16, 64, 65, 128, 130, 256, 300]
Options = tuple[Any, ...]
PLAIN: Options = (0.1, 0.5, True, False, False)
INSIDE: Options = (0.2, 0.5, True, True, True)  # normalised, own views weighted by confidence


@pytest.fixture(params=["highest", "high"], autouse=True)
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def tolerance(dtype: torch.dtype) -> torch.dtype:
    """TF32 has as many bits as fp16."""
    rounded = torch.get_float32_matmul_precision() != "highest"
    return torch.float16 if dtype == torch.float32 and rounded else dtype


def draw(n: int, views: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    features = normalize(torch.randn(n, views, d, generator=generator(seed)), dim=-1).to(dtype)
    labels = torch.randint(-1, max(2, n // 8), (n,), generator=generator(seed + 1))
    return features, labels, torch.rand(n, generator=generator(seed + 2))


def assert_is_the_reference(
    given: tuple[Tensor, ...],
    options: Options = PLAIN,
    anchors: tuple[int, int] | None = None,
    scale: float = 5,
) -> None:
    """Kernels on the GPU against the reference in fp64, forward and backward."""
    features, labels, confidence = (x.cuda() for x in given)
    first, count = anchors or (0, len(labels))
    exact = (features.double(), labels, confidence)
    right = reference.contrastive_rows(*exact, first, count, *options)
    found = kernels.contrastive_rows(features, labels, confidence, first, count, *options)
    dtype = tolerance(features.dtype)
    for got, expected in zip(found, right, strict=True):
        assert_close(got, expected, dtype, scale)
    lse = reference.contrastive_rows(*exact, 0, len(labels), *options)[1]
    upstream = torch.randn(lse.shape, generator=generator(9)).cuda()
    expected = reference.contrastive_rows_backward(upstream.double(), *exact, lse, first, count, *options)
    real = found[0].dtype
    got = kernels.contrastive_rows_backward(
        upstream.to(real), features, labels, confidence, lse.to(real), first, count, *options
    )
    assert got.dtype == features.dtype
    size = float(upstream.abs().max()) / options[0]
    assert_close(got.double() / size, expected / size, dtype, scale)


@few
@given(
    n=odd_sizes,
    views=st.sampled_from([1, 2, 3]),
    d=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    inside=st.booleans(),
    seed=seeds,
)
def test_losses_and_gradients_are_the_reference_s(
    n: int, views: int, d: int, dtype: torch.dtype, inside: bool, seed: int
) -> None:
    if n * views > 1:
        assert_is_the_reference(draw(n, views, d, dtype, seed), INSIDE if inside else PLAIN)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("n", [2000, 2100, 4099])
def test_many_rows_are_the_reference_s(n: int, d: int, dtype: torch.dtype) -> None:
    assert_is_the_reference(draw(n, 2, d, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("anchors", [(0, 1), (100, 250), (400, 0), (399, 1)])
def test_some_anchors_are_the_reference_s(anchors: tuple[int, int], dtype: torch.dtype) -> None:
    assert_is_the_reference(draw(400, 2, 64, dtype), anchors=anchors)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_cold_and_long_rows_are_the_reference_s(dtype: torch.dtype) -> None:
    features, labels, confidence = draw(300, 2, 32, dtype)
    if tolerance(dtype) == dtype:  # a cold softmax of rounded operands is another one
        assert_is_the_reference((features, labels, confidence), (0.01, 0.5, True, False, False), scale=20)
        assert_is_the_reference((features * 8, labels, confidence), (1.0, 0.5, True, False, False), scale=20)


def test_labels_beyond_32_bits_are_told_apart() -> None:
    features, labels, confidence = draw(500, 2, 32)
    assert_is_the_reference((features, labels.remainder(5) * 2**32 + 3, confidence))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_make_losses_nan(value: float) -> None:
    features, labels, confidence = (x.cuda() for x in draw(300, 2, 32))
    features[299, 1, 31] = value
    loss, _, _, norms = kernels.contrastive_rows(features, labels, confidence, 0, 300, *PLAIN)
    assert bool(loss.isnan().all())
    assert bool(norms.isnan().all())


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: list[Loss] = [
    lambda z, labels, p: ccssl_loss(z, labels, p, threshold=0.3, reduction="none"),
    lambda z, labels, p: supcon_loss(z, labels, normalize=True),
    lambda z, labels, p: info_nce_loss(z, weights=p),
]
SHAPES = [(112, 2, 64), (512, 2, 128), (3000, 2, 96)]


def both_ways(loss: Loss, *given: Tensor) -> tuple[Tensor, Tensor]:
    leaf = given[0].detach().requires_grad_()
    result = loss(leaf, *given[1:])
    (gradient,) = torch.autograd.grad(result, leaf, torch.ones_like(result))
    return result.detach(), gradient


def on_gpu(
    n: int, views: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, ...]:
    return tuple(x.cuda() for x in draw(n, views, d, dtype, seed))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_waits_for_the_host(loss: Loss, shape: tuple[int, int, int]) -> None:
    given = on_gpu(*shape)
    both_ways(loss, *given)
    with no_waits():
        both_ways(loss, *given)


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", SHAPES)
def test_runs_agree_bit_for_bit(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    given = on_gpu(*shape, dtype=dtype)
    first = both_ways(LOSSES[0], *given)
    for _ in range(5):
        for got, right in zip(both_ways(LOSSES[0], *given), first, strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_captured_graph_computes_again_on_new_features(loss: Loss, shape: tuple[int, int, int]) -> None:
    given = on_gpu(*shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_ways(loss, *given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(loss, *given)
    for seed in (1, 2):
        for tensor, new in zip(given, draw(*shape, seed=seed), strict=True):
            tensor.copy_(new)
        graph.replay()
        for got, right in zip(captured, both_ways(loss, *given), strict=True):
            assert torch.equal(got, right)


@pytest.mark.parametrize("loss", LOSSES)
def test_work_is_on_the_current_stream(loss: Loss) -> None:
    first, last = on_gpu(512, 2, 128), on_gpu(512, 2, 128, seed=5)
    right = both_ways(loss, *last)
    features, stream = first[0].clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        features.copy_(last[0])
        found = both_ways(loss, features, *last[1:])
    stream.synchronize()
    for got, expected in zip(found, right, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_the_rows(dtype: torch.dtype) -> None:
    given = on_gpu(16384, 2, 128, dtype=dtype)
    features = given[0].requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = ccssl_loss(features, *given[1:])
    assert torch.cuda.memory_allocated() - before < features.nbytes / 10
    loss.backward()
    # The gradient, prepared rows, and partial sums of as many rows in fp32 for each part of the columns.
    assert torch.cuda.max_memory_allocated() - before < 2.5 * features.nbytes + 3 * features.numel() * 4


@pytest.mark.slow
def test_scores_beyond_2_31_are_those_of_a_reference_of_few_anchors() -> None:
    features, labels, confidence = on_gpu(25_000, 2, 64, dtype=torch.bfloat16)
    found = kernels.contrastive_rows(features, labels, confidence, 0, 25_000, *PLAIN)[0]
    right = reference.contrastive_rows(features.double(), labels, confidence, 24_000, 1000, *PLAIN)[0]
    assert_close(found[24_000:], right, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_features_is_used() -> None:
    given = draw(100, 2, 64)
    here, there = (both_ways(LOSSES[0], *(x.to(device) for x in given)) for device in ("cuda:0", "cuda:1"))
    for got, right in zip(there, here, strict=True):
        assert got.device == torch.device("cuda:1")
        assert torch.equal(got.cpu(), right.cpu())
