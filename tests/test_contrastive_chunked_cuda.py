"""Class losses of wide rows and losses under any weights on a GPU: results, graphs, streams, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import generator, no_waits, seeds
from torch import Tensor
from torch.nn.functional import normalize

from clustops import reference
from clustops.contrastive import ccssl_loss
from clustops.contrastive_weighted import weighted_contrastive_loss

pytestmark = pytest.mark.cuda

few = settings(max_examples=20)
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
Loss = Callable[..., Tensor]


def batch(n: int, views: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, views, d, generator=generator(seed)), dim=-1).to(dtype)


def classes(n: int) -> tuple[Tensor, Tensor]:
    return torch.arange(n) % 7 - 1, torch.rand(n, generator=generator(1))


def graph(n: int) -> tuple[Tensor]:
    w = torch.rand(n, n, generator=generator(2))
    return (torch.where(w > 0.9, w, 0).fill_diagonal_(1),)


CASES = [
    (ccssl_loss, classes, 300),
    (weighted_contrastive_loss, graph, 40),
    (weighted_contrastive_loss, graph, 512),
]
IDS = ["classes, D 300", "weights, D 40", "weights, D 512"]
cases = pytest.mark.parametrize(("loss", "others", "d"), CASES, ids=IDS)


def both_ways(loss: Loss, features: Tensor, *others: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = features.detach().requires_grad_()
    rows = loss(leaf, *others, reduction="none", **options)
    upstream = torch.linspace(-1, 1, rows.numel(), device=rows.device, dtype=rows.dtype).view(rows.shape)
    return rows.detach(), torch.autograd.grad(rows, leaf, upstream)[0]


def error(got: Tensor, exact: Tensor) -> float:
    return float((got.double().cpu() - exact).norm() / exact.norm())


def assert_is_the_reference(loss: Loss, features: Tensor, *others: Tensor, **options: Any) -> None:
    found = both_ways(loss, features.cuda(), *(x.cuda() for x in others), **options)
    exact = both_ways(getattr(reference, loss.__name__), features.double(), *others, **options)
    bound = {torch.float32: 2e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}[features.dtype]
    assert found[1].dtype == features.dtype
    assert error(found[0], exact[0]) < bound
    assert error(found[1], exact[1]) < bound


@few
@given(
    n=st.sampled_from([2, 3, 61, 64, 127, 500]),
    views=st.integers(1, 3),
    d=st.sampled_from([257, 260, 384, 512, 1000]),
    dtype=st.sampled_from(DTYPES),
    unit=st.booleans(),
    temperature=st.sampled_from([0.07, 0.2, 1e-3]),
    seed=seeds,
)
def test_class_losses_of_wide_rows_are_the_reference_s(
    n: int, views: int, d: int, dtype: torch.dtype, unit: bool, temperature: float, seed: int
) -> None:
    if dtype != torch.float32:
        temperature = max(temperature, 0.07)  # below, rounding rows to sixteen bits decides
    features = batch(n, views, d, dtype, seed)
    assert_is_the_reference(ccssl_loss, features, *classes(n), normalize=unit, temperature=temperature)


@few
@given(
    n=st.sampled_from([2, 3, 61, 64, 127, 500]),
    views=st.integers(1, 3),
    d=st.sampled_from([1, 31, 128, 300]),
    dtype=st.sampled_from(DTYPES),
    weights_dtype=st.sampled_from([*DTYPES, torch.float64]),
    seed=seeds,
)
def test_losses_under_any_weights_are_the_reference_s(
    n: int, views: int, d: int, dtype: torch.dtype, weights_dtype: torch.dtype, seed: int
) -> None:
    (w,) = graph(n)
    assert_is_the_reference(weighted_contrastive_loss, batch(n, views, d, dtype, seed), w.to(weights_dtype))


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_take_several_blocks(loss: Loss, others: Any, d: int, dtype: torch.dtype) -> None:
    assert_is_the_reference(loss, batch(4500, 2, d, dtype), *others(4500))


@cases
def test_fp64_takes_the_reference(loss: Loss, others: Any, d: int) -> None:
    features, given = batch(20, 2, d, torch.float64), others(20)
    found = both_ways(loss, features.cuda(), *(x.cuda() for x in given))
    for got, right in zip(found, both_ways(loss, features, *given), strict=True):
        torch.testing.assert_close(got.cpu(), right)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_waits_for_the_host(loss: Loss, others: Any, d: int, dtype: torch.dtype) -> None:
    given = [x.cuda() for x in (batch(300, 2, d, dtype), *others(300))]
    both_ways(loss, *given)
    with no_waits():
        both_ways(loss, *given)


@cases
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_graph_computes_again_on_new_features(
    loss: Loss, others: Any, d: int, dtype: torch.dtype
) -> None:
    features, *given = (x.cuda() for x in (batch(300, 2, d, dtype), *others(300)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_ways(loss, features, *given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_ways(loss, features, *given)
    for seed in (1, 2):
        features.copy_(batch(300, 2, d, dtype, seed))
        graph.replay()
        for got, right in zip(captured, both_ways(loss, features, *given), strict=True):
            assert torch.equal(got, right)


@cases
def test_runs_agree_bit_for_bit(loss: Loss, others: Any, d: int) -> None:
    given = [x.cuda() for x in (batch(900, 2, d, torch.bfloat16), *others(900))]
    first = both_ways(loss, *given)
    for _ in range(5):
        assert all(torch.equal(one, other) for one, other in zip(both_ways(loss, *given), first, strict=True))


@cases
def test_work_is_on_the_current_stream(loss: Loss, others: Any, d: int) -> None:
    first, last, *given = (x.cuda() for x in (batch(300, 2, d), batch(300, 2, d, seed=1), *others(300)))
    right = both_ways(loss, last, *given)
    features, stream = first.clone(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        features.copy_(last)
        found = both_ways(loss, features, *given)
    stream.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(found, right, strict=True))


def test_memory_of_wide_rows_is_that_of_a_block() -> None:
    features = batch(4096, 2, 512, torch.bfloat16).cuda().requires_grad_()
    labels, confidence = (x.cuda() for x in classes(4096))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = ccssl_loss(features, labels, confidence)
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    assert kept < 8 * 4096 * 2
    assert torch.cuda.max_memory_allocated() - before < 150e6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@cases
def test_the_device_of_the_features_is_used(loss: Loss, others: Any, d: int) -> None:
    given = (batch(300, 2, d), *others(300))
    one, other = (both_ways(loss, *(x.to(f"cuda:{i}") for x in given)) for i in (0, 1))
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))
