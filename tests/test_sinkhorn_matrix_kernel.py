"""The compiled projection of small matrices against its reference, on every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_close, generator, seeds
from torch import Tensor

from clustops import native
from clustops import sinkhorn_matrix as _registered  # noqa: F401
from clustops.reference import sinkhorn_ops as reference

pytestmark = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")
ops = torch.ops.clustops

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Neighbours of what lies in the lanes of one block.
numbers = st.sampled_from([0, 1, 3, 15, 17, 31, 63, 64, 65, 131])
sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 31, 32])
iterations = st.sampled_from([0, 1, 2, 5, 20])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(
    seed: int, p: int, n: int, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Matrices and an upstream gradient."""
    g = generator(seed)
    m, upstream = (torch.randn(p, n, n, generator=g, dtype=torch.float64) for _ in range(2))
    return (m * spread).to(dtype), upstream.to(dtype)


def both(m: Tensor, upstream: Tensor, n_iters: int) -> tuple[Tensor, Tensor]:
    return ops.sinkhorn_matrix(m, n_iters), ops.sinkhorn_matrix_backward(upstream, m, n_iters)


def both_by_reference(m: Tensor, upstream: Tensor, n_iters: int) -> tuple[Tensor, Tensor]:
    return reference.sinkhorn_matrix(m, n_iters), reference.sinkhorn_matrix_backward(upstream, m, n_iters)


def check_against_fp64(m: Tensor, upstream: Tensor, n_iters: int) -> None:
    oracles = both_by_reference(m.double(), upstream.double(), n_iters)
    for found, oracle in zip(both(m, upstream, n_iters), oracles, strict=True):
        assert found.dtype == m.dtype
        assert_close(found, oracle, m.dtype)


def assert_bits(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


@given(seed=seeds, p=numbers, n=sizes, n_iters=iterations, dtype=st.sampled_from(FLOATING))
@pytest.mark.usefixtures("instruction_set")
def test_projection_and_gradient_are_those_of_the_reference(
    seed: int, p: int, n: int, n_iters: int, dtype: torch.dtype
) -> None:
    check_against_fp64(*draw(seed, p, n, dtype), n_iters)


@given(
    seed=seeds,
    n=sizes,
    n_iters=iterations,
    spread=st.sampled_from([5.0, 8.0, 30.0, 300.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@pytest.mark.usefixtures("instruction_set")
def test_numbers_far_apart(seed: int, n: int, n_iters: int, spread: float, dtype: torch.dtype) -> None:
    """Some of the matrices of a block leave the range of the exponentials."""
    m, upstream = draw(seed, 33, n, torch.float32, spread)
    m[::3] /= spread
    check_against_fp64(m.to(dtype), upstream.to(dtype), n_iters)


@pytest.mark.parametrize("spread", [0.1, 2.0, 6.0, 50.0])
@pytest.mark.parametrize("n", [4, 17])
@pytest.mark.usefixtures("instruction_set")
def test_errors_are_at_most_twice_those_of_pytorch(n: int, spread: float) -> None:
    m, upstream = draw(0, 200, n, torch.float32, spread)
    oracles = both_by_reference(m.double(), upstream.double(), 20)
    for ours, theirs, oracle in zip(
        both(m, upstream, 20), both_by_reference(m, upstream, 20), oracles, strict=True
    ):
        error, allowed = ((x.double() - oracle).norm() / oracle.norm() for x in (ours, theirs))
        assert error <= 2 * allowed + 1e-7


@given(seed=seeds, n=sizes, n_iters=iterations)
@pytest.mark.usefixtures("instruction_set")
def test_rows_sum_to_one(seed: int, n: int, n_iters: int) -> None:
    m, _ = draw(seed, 40, n, spread=3.0)
    torch.testing.assert_close(ops.sinkhorn_matrix(m, n_iters).sum(-1), torch.ones(40, n))


@pytest.mark.parametrize("shift", ["columns", "rows"])
@pytest.mark.usefixtures("instruction_set")
def test_large_numbers_common_to_columns_or_rows_change_nothing(shift: str) -> None:
    m, upstream = draw(0, 40, 5, torch.float64)
    offset = torch.linspace(-400, 400, 5, dtype=torch.float64)
    moved = m + (offset if shift == "columns" else offset.unsqueeze(1))
    for found, expected in zip(both(moved, upstream, 60), both(m, upstream, 60), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_iters", [0, 3])
@pytest.mark.usefixtures("instruction_set")
def test_what_is_not_finite_stays_in_its_matrix(n_iters: int, value: float) -> None:
    m, upstream = draw(0, 40, 4)
    flawed = m.clone()
    flawed[7, 2, 1] = value
    others = torch.arange(40) != 7
    found, expected = both(flawed, upstream, n_iters), both(m, upstream, n_iters)
    assert_bits(tuple(t[others] for t in found), tuple(t[others] for t in expected))
    oracle = both_by_reference(flawed.double(), upstream.double(), n_iters)
    for one, right in zip(found, oracle, strict=True):
        torch.testing.assert_close(one[7].double(), right[7], equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [4, 8, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("threads", "instruction_set")
def test_bits_depend_neither_on_threads_nor_on_the_place(n: int, dtype: torch.dtype) -> None:
    m, upstream = draw(0, 1100, n, dtype, 3.0)
    torch.set_num_threads(1)
    expected = both(m, upstream, 3)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        assert_bits(both(m, upstream, 3), expected)
    assert_bits(both(m[5:], upstream[5:], 3), tuple(t[5:] for t in expected))


@pytest.mark.parametrize("n", [1, 3, 9])
@pytest.mark.parametrize("n_iters", [0, 1, 4])
@pytest.mark.usefixtures("instruction_set")
def test_gradient_is_exact(n: int, n_iters: int) -> None:
    m, _ = draw(0, 3, n, torch.float64)
    m[1] *= 200  # by logarithms
    m[1].clamp_(-300, 300)
    assert torch.autograd.gradcheck(lambda x: ops.sinkhorn_matrix(x, n_iters), m.requires_grad_())


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "shifted"])
@pytest.mark.usefixtures("instruction_set")
def test_any_layout_gives_the_same_bits_and_is_not_written(layout: str) -> None:
    m, upstream = draw(0, 20, 6)

    def laid_out(x: Tensor) -> Tensor:
        return {
            "transposed": lambda: x.mT.contiguous().mT,
            "sliced": lambda: torch.stack([x, x], dim=-1)[..., 0],
            "expanded": lambda: x[:1, :1, :1].expand(20, 6, 6),
            "shifted": lambda: torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x),
        }[layout]()

    given, of_result = laid_out(m), laid_out(upstream)
    plain, of_plain = (t.clone(memory_format=torch.contiguous_format) for t in (given, of_result))
    assert_bits(both(given, of_result, 3), both(plain, of_plain, 3))
    assert_bits((given, of_result), (plain, of_plain))


def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    view, kernel = native.view, native.extension.sinkhorn_matrix
    m = torch.zeros(3, 4, 4)
    kernel(view(m), None, view(torch.empty_like(m)), 2, 1)
    for bad in (
        m[0],
        torch.zeros(3, 33, 33),
        torch.zeros(3, 4, 5),
        m.int(),
        torch.zeros(3, 0, 0),
        m.mT[:, 1:],
    ):
        with pytest.raises(ValueError, match="m must"):
            kernel(view(bad), None, view(torch.empty_like(bad)), 2, 1)
    with pytest.raises(ValueError, match="gradient must"):
        kernel(view(m), view(m.double()), view(torch.empty_like(m)), 2, 1)
    with pytest.raises(ValueError, match="result must"):
        kernel(view(m), None, view(m[:2]), 2, 1)
    with pytest.raises(ValueError, match="n_iters must"):
        kernel(view(m), None, view(torch.empty_like(m)), -1, 1)
