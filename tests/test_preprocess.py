from __future__ import annotations

import doctest
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DEVICES, assert_close, assert_message, generator, odd_sizes, seeds, small_sizes

from clustops import preprocess
from clustops.preprocess import pca_whiten
from clustops.reference import preprocess as reference
from clustops.reference import preprocess_ops as ops

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Correlated rows away from the origin, each direction with a variance of its own."""
    g = generator(seed)
    d = shape[-1]
    spread = torch.arange(1, d + 1, dtype=torch.float64) ** 0.5
    mixing, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    rows = torch.randn(shape, generator=g, dtype=torch.float64) * spread
    x: torch.Tensor = rows @ mixing + torch.randn(d, generator=g, dtype=torch.float64)
    return x.to(dtype)


@given(odd_sizes, small_sizes, st.data(), seeds)
def test_blocks_of_covariance_equal_one_svd(n: int, d: int, data: st.DataObject, seed: int) -> None:
    dim = data.draw(st.integers(1, d))
    x = features(n, d, seed=seed)
    assert_close(pca_whiten(x, dim), reference.pca_whiten(x, dim), torch.float64, scale=1e4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_result_is_rounded_to_the_input_dtype(device: str, dtype: torch.dtype) -> None:
    x = features(97, 7, dtype=dtype).to(device)
    out = pca_whiten(x, 5)
    assert out.dtype == dtype
    assert out.device == x.device
    torch.testing.assert_close(out, pca_whiten(x.double(), 5).to(dtype), rtol=0, atol=1e-6)


@given(odd_sizes, small_sizes, seeds)
def test_covariance_is_the_identity_before_the_l2_step(n: int, d: int, seed: int) -> None:
    x = features(2, n + 3 * d, d, seed=seed) * 1e3
    shift, scale, mean, matrix = ops.whitening(x, d, 1e-12)
    rows = ((x - shift) / scale - mean) @ matrix
    eye = torch.eye(d, dtype=torch.float64).expand(2, d, d)
    torch.testing.assert_close(rows.mT @ rows / x.shape[1], eye, rtol=0, atol=1e-9)
    torch.testing.assert_close(rows.mean(1), torch.zeros(2, d, dtype=torch.float64), rtol=0, atol=1e-9)


def test_rows_have_norm_one() -> None:
    norm = pca_whiten(features(131, 7), 4).norm(dim=-1)
    torch.testing.assert_close(norm, torch.ones_like(norm))


def test_faiss_agrees_up_to_the_signs_of_directions() -> None:
    faiss = pytest.importorskip("faiss")
    x = features(127, 7, dtype=torch.float32)
    matrix = faiss.PCAMatrix(7, 4, -0.5)
    matrix.train(x.numpy())
    theirs = torch.nn.functional.normalize(torch.from_numpy(matrix.apply(x.numpy())))
    torch.testing.assert_close(pca_whiten(x, 4).abs(), theirs.abs(), rtol=0, atol=1e-4)


def test_a_row_at_the_mean_is_zero_and_not_nan() -> None:
    half = features(16, 5)
    centre = torch.full((1, 5), 3.0, dtype=torch.float64)
    out = pca_whiten(torch.cat([centre + half, centre - half, centre]), 3)
    assert torch.isfinite(out).all()
    assert (out[-1] == 0).all()
    assert (out[:-1].norm(dim=-1) > 0.99).all()


@given(odd_sizes, small_sizes, st.sampled_from([0.0, 0.1, -7.3e9, 1e-40]), st.sampled_from(DTYPES[:2]))
def test_constant_data_gives_zeros(n: int, d: int, value: float, dtype: torch.dtype) -> None:
    x = torch.full((n, d), value, dtype=dtype)
    assert (pca_whiten(x, d) == 0).all()
    assert all(torch.isfinite(part).all() for part in ops.whitening(x.unsqueeze(0), d, 1e-5))
    assert (reference.pca_whiten(x, d) == 0).all()


@given(small_sizes, small_sizes, seeds)
def test_directions_beyond_the_rank_are_zero_and_not_nan(n: int, rank: int, seed: int) -> None:
    flat = features(n, rank, seed=seed)
    x = torch.cat([flat, flat.flip(-1), torch.ones(n, 3, dtype=torch.float64)], dim=-1)
    out = pca_whiten(x, x.shape[-1])
    assert torch.isfinite(out).all()
    assert out[:, min(rank, n - 1) :].abs().max() < 1e-7
    assert ((out.norm(dim=-1) - 1).abs() < 1e-6).all() or n == 1


def test_more_features_than_rows() -> None:
    out = pca_whiten(features(5, 64), 64)
    assert torch.isfinite(out).all()
    assert out[:, 4:].abs().max() < 1e-7


def test_a_direction_below_eps_is_not_blown_up() -> None:
    g = generator(0)
    x = torch.randn(1000, 2, generator=g, dtype=torch.float64) * torch.tensor(
        [1.0, 1e-4], dtype=torch.float64
    )
    assert pca_whiten(x, 2, eps=1e-5)[:, 1].std() < 0.2
    assert pca_whiten(x, 2, eps=1e-12)[:, 1].std() > 0.5


@given(st.integers(1, 4), odd_sizes, small_sizes, seeds)
def test_a_batch_equals_single_problems(b: int, n: int, d: int, seed: int) -> None:
    x = features(b, n, d, seed=seed)
    singles = torch.stack([pca_whiten(problem, d) for problem in x])
    assert_close(pca_whiten(x, d), singles, torch.float64, scale=1e4)


def test_problems_of_a_batch_have_scales_of_their_own() -> None:
    x = features(33, 4)
    out = pca_whiten(torch.stack([x * 1e-200, x, x * 1e30, torch.zeros_like(x)]), 4)
    assert_close(out[0], out[1], torch.float64, scale=1e4)
    assert_close(out[2], out[1], torch.float64, scale=1e4)
    assert (out[3] == 0).all()


@pytest.mark.parametrize("factor", [1e-160, 1e160, 1e307])
def test_squares_that_leave_the_range_of_fp64(factor: float) -> None:
    x = features(33, 4)
    x = x / x.abs().max()
    assert_close(pca_whiten(x * factor, 4), pca_whiten(x, 4), torch.float64, scale=1e4)


def test_rows_far_from_the_origin_keep_their_directions() -> None:
    x = features(127, 5)
    assert_close(pca_whiten(x + 1e6, 5), pca_whiten(x, 5), torch.float64, scale=1e6)


def test_the_number_of_blocks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = features(2, 131, 5)
    whole = pca_whiten(x, 3)
    monkeypatch.setattr(ops, "_BLOCK", 7)
    assert_close(pca_whiten(x, 3), whole, torch.float64, scale=1e4)


@given(small_sizes, seeds)
def test_the_largest_entry_of_each_direction_is_positive(d: int, seed: int) -> None:
    _, _, _, matrix = ops.whitening(features(1, 4 * d + 3, d, seed=seed), d, 1e-12)
    largest = matrix.gather(1, matrix.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


@pytest.mark.parametrize("noise", [0.0, 1e-13, -1e-13])
def test_rounding_does_not_choose_the_sign_of_equal_entries(noise: float) -> None:
    x = torch.tensor([[1.0, -1.0], [-1.0, 1.0 + noise], [2.0 + noise, -2.0]], dtype=torch.float64)
    assert (pca_whiten(x, 1)[:, 0] * torch.tensor([1.0, -1.0, 1.0]) > 0.99).all()


def test_numpy_in_numpy_out_and_never_written() -> None:
    x = features(33, 5, dtype=torch.float32).numpy()
    before = x.copy()
    out = pca_whiten(x, 3)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, pca_whiten(torch.from_numpy(x), 3).numpy())
    np.testing.assert_array_equal(x, before)


def test_a_read_only_memory_map_is_read(tmp_path: Path) -> None:
    x = features(33, 5, dtype=torch.float32).numpy()
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    np.testing.assert_array_equal(pca_whiten(mapped, 3), pca_whiten(x, 3))


def test_layouts_do_not_matter() -> None:
    x = features(33, 6)
    wide = torch.zeros(33 * 2, 6 * 3 + 1, dtype=torch.float64)
    wide[::2, 1::3] = x
    for view in (wide[::2, 1::3], x.t().contiguous().t()):
        assert_close(pca_whiten(view, 4), pca_whiten(x, 4), torch.float64, scale=1e4)
    same = x[:1].expand(5, 6)
    assert (pca_whiten(same, 4) == 0).all()


def test_the_result_carries_no_gradient() -> None:
    assert not pca_whiten(features(9, 3).requires_grad_(), 2).requires_grad


def test_same_input_same_bits() -> None:
    x = features(127, 13, dtype=torch.float32)
    assert torch.equal(pca_whiten(x, 9), pca_whiten(x.clone(), 9))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 4), (1, 5000, 3)])
def test_op_registration(shape: tuple[int, ...]) -> None:
    torch.library.opcheck(torch.ops.clustops.pca_whiten.default, (features(*shape), min(2, shape[-1]), 1e-5))


def test_compiles_to_one_graph_for_all_sizes() -> None:
    compiled = torch.compile(lambda x: pca_whiten(x, 3), fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n, d in [(10, 5), (20, 6), (4097, 9), (7, 4)]:
            x = features(n, d)
            torch.testing.assert_close(compiled(x), pca_whiten(x, 3))


X = torch.randn(6, 4, generator=generator(0))


@pytest.mark.parametrize(
    ("x", "dim", "eps", "error", "parts"),
    [
        ("text", 2, 1e-5, TypeError, ("x must be", "got str")),
        (X.long(), 2, 1e-5, TypeError, ("x must be float32", "got torch.int64", "to float32")),
        (X[0], 2, 1e-5, ValueError, ("x must be [N, D] or [B, N, D]", "got [4]")),
        (X[:0], 2, 1e-5, ValueError, ("x must be at least one row", "got [0, 4]")),
        (X[:, :0], 1, 1e-5, ValueError, ("x must be at least one row", "got [6, 0]")),
        (X, 0, 1e-5, ValueError, ("dim must be at least 1", "got 0")),
        (X, 2.0, 1e-5, TypeError, ("dim must be an integer", "got 2.0")),
        (X, True, 1e-5, TypeError, ("dim must be an integer", "got True")),
        (X, 5, 1e-5, ValueError, ("dim must be at most the 4 features", "got 5", "lower dim")),
        (X, 2, 0.0, ValueError, ("eps must be finite and above 0", "got 0.0")),
        (X, 2, -1.0, ValueError, ("eps must be finite and above 0", "got -1.0")),
        (X, 2, float("nan"), ValueError, ("eps must be finite and above 0", "got nan")),
        (X, 2, "small", TypeError, ("eps must be a number", "got str")),
        (X.where(X < 1, torch.nan), 2, 1e-5, ValueError, ("x must be finite", "NaN or infinite")),
        (X.where(X < 1, torch.inf), 2, 1e-5, ValueError, ("x must be finite", "NaN or infinite")),
    ],
)
def test_bad_input_says_what_and_how_to_cure_it(
    x: object, dim: int, eps: float, error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as raised:
        pca_whiten(x, dim, eps=eps)
    assert_message(raised.value, *parts)


def test_examples_in_docstrings() -> None:
    assert doctest.testmod(preprocess).failed == 0


def test_a_failed_decomposition_is_an_error_about_x(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(ValueError, match="x must be features") as caught:
        pca_whiten(torch.randn(5, 3), 2)
    assert_message(caught.value, "values up to", "diverged")
