"""The steps of greedy k-means++, on every instruction set that this CPU runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import DEVICES, generator, odd_sizes, seeds, small_sizes
from torch import Tensor

from clustops import kmeans_rows as _registered  # noqa: F401
from clustops import native
from clustops.kmeans import kmeans_plus_plus
from clustops.reference import kmeans_ops
from clustops.reference import kmeans_seeding as reference

needs_extension = pytest.mark.skipif(native.extension is None, reason=f"no extension: {native.why_not}")
ops = torch.ops.clustops

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
dtypes = st.sampled_from(FLOATING)
trial_counts = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17, 32])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference without the root that ``cdist`` takes: exact where rows are small integers."""

    def direct(x: Tensor, centroids: Tensor) -> Tensor:
        return (x.unsqueeze(2) - centroids.unsqueeze(1)).square().sum(-1)

    monkeypatch.setattr(reference, "squared_distances", direct)


def integers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose squared distances are exact in any order, many of them equal."""
    return torch.randint(-3, 4, shape, generator=generator(seed)).to(dtype)


def weights_of(seed: int, e: int, n: int, weighted: bool) -> Tensor:
    if not weighted:
        return torch.ones((), dtype=torch.float64).expand(e, n)
    g = generator(seed)
    return torch.rand(e, n, generator=g, dtype=torch.float64) * (torch.rand(e, n, generator=g) < 0.7)


def uniforms(seed: int, e: int, count: int) -> Tensor:
    return torch.rand(e, count, generator=generator(seed), dtype=torch.float64)


@needs_extension
@given(
    seed=seeds,
    b=st.integers(1, 2),
    restarts=st.integers(1, 3),
    n=odd_sizes,
    d=odd_sizes,
    k=small_sizes,
    trials=st.integers(1, 9),
    dtype=dtypes,
    weighted=st.booleans(),
)
@pytest.mark.usefixtures("instruction_set", "exact_reference")
def test_the_rows_chosen_are_the_reference_s(
    seed: int, b: int, restarts: int, n: int, d: int, k: int, trials: int, dtype: torch.dtype, weighted: bool
) -> None:
    x, weights = integers(seed, b, n, d, dtype=dtype), weights_of(seed, b, n, weighted)
    weights = (
        weights + torch.zeros(n, dtype=torch.float64).index_fill(0, torch.tensor([n // 2]), 1) * weighted
    )
    uniform = uniforms(seed, b * restarts, k * trials)
    assert torch.equal(ops.kmeans_seed(x, weights, uniform, k), reference.seed(x, weights, uniform, k))


@needs_extension
@given(
    seed=seeds,
    b=st.integers(1, 2),
    restarts=st.integers(1, 2),
    n=odd_sizes,
    d=odd_sizes,
    trials=trial_counts,
    dtype=dtypes,
    weighted=st.booleans(),
)
@pytest.mark.usefixtures("instruction_set", "exact_reference")
def test_potentials_and_the_rows_that_improve_are_the_reference_s(
    seed: int, b: int, restarts: int, n: int, d: int, trials: int, dtype: torch.dtype, weighted: bool
) -> None:
    e = b * restarts
    x, candidates = integers(seed, b, n, d, dtype=dtype), integers(seed + 1, e, trials, d, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    closest = torch.randint(0, 12 * d, (e, n), generator=generator(seed)).to(wide)
    weights, scale = weights_of(seed, e, n, weighted), torch.full((e,), 2.0**30, dtype=torch.float64)
    found = ops.kmeans_potentials(x, candidates.to(wide), closest, weights, scale)
    expected = reference.potentials(x, candidates, closest, weights, scale)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    chosen = torch.arange(e) % trials
    best = candidates[torch.arange(e), chosen].unsqueeze(1).to(wide)
    for mask in ((None, None), (found[1], chosen)):
        lowered, oracle = closest.clone(), closest.clone()
        ops.kmeans_closest_(lowered, x, best, *mask)
        reference.closest_(oracle, x, best, *mask)
        assert torch.equal(lowered, oracle)


@needs_extension
@given(seed=seeds, n=odd_sizes, d=odd_sizes, trials=trial_counts, dtype=dtypes)
@pytest.mark.usefixtures("instruction_set")
def test_a_distance_does_not_depend_on_what_is_computed_beside_it(
    seed: int, n: int, d: int, trials: int, dtype: torch.dtype
) -> None:
    x = torch.randn(1, n, d, generator=generator(seed)).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    candidates = torch.randn(1, trials, d, generator=generator(seed + 1)).to(wide)
    weights, scale = weights_of(0, 1, n, False), torch.full((1,), 2.0**40, dtype=torch.float64)
    closest = torch.full((1, n), torch.inf, dtype=wide)
    ops.kmeans_closest_(closest, x, candidates[:, -1:])
    _, improves = ops.kmeans_potentials(x, candidates, closest, weights, scale)
    assert not (improves >> (trials - 1) & 1).any()
    _, improves = ops.kmeans_potentials(
        x, candidates, closest.nextafter(torch.tensor(torch.inf)), weights, scale
    )
    assert (improves >> (trials - 1) & 1).all()


@needs_extension
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "shifted", "batch slice"])
def test_any_layout_gives_the_same_rows(layout: str, dtype: torch.dtype) -> None:
    dense = torch.randn(2, 37, 24, generator=generator(0)).to(dtype)
    x = {
        "transposed": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "sliced": torch.cat([dense, dense], dim=-1)[..., :24],
        "expanded": dense[:, :1].expand(2, 37, 24),
        "shifted": torch.cat([dense.new_zeros(1), dense.flatten()])[1:].view_as(dense),
        "batch slice": torch.stack([dense, dense], dim=1)[:, 1],
    }[layout]
    before, weights, uniform = x.clone(), weights_of(1, 2, 37, True), uniforms(0, 4, 5 * 3)
    assert torch.equal(ops.kmeans_seed(x, weights, uniform, 5), ops.kmeans_seed(before, weights, uniform, 5))
    assert torch.equal(x, before)


@needs_extension
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("b", [1, 3])
def test_rows_chosen_do_not_depend_on_threads_or_on_other_problems(b: int) -> None:
    x, weights = torch.randn(b, 5000, 7, generator=generator(0)), weights_of(0, b, 5000, True)
    uniform = uniforms(0, 2 * b, 9 * 4)
    found = []
    for count in (1, 2, 5, 16):
        torch.set_num_threads(count)
        found.append(ops.kmeans_seed(x, weights, uniform, 9))
    alone = [
        ops.kmeans_seed(x[i // 2][None], weights[i // 2][None], uniform[i : i + 1], 9) for i in range(2 * b)
    ]
    for other in (*found[1:], torch.cat(alone)):
        assert torch.equal(other, found[0])


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_rows_of_weight_0_are_not_chosen_even_with_nan() -> None:
    x = torch.randn(1, 40, 3, generator=generator(0))
    x[0, 7], x[0, 30, 1] = torch.nan, torch.inf
    weights = torch.ones(1, 40, dtype=torch.float64)
    weights[0, [7, 30]] = 0
    chosen = ops.kmeans_seed(x, weights, uniforms(0, 1, 38 * 5), 38)
    assert sorted(chosen[0].tolist()) == [i for i in range(40) if i not in (7, 30)]


@needs_extension
@pytest.mark.usefixtures("instruction_set")
def test_the_first_row_fills_up_where_rows_are_equal() -> None:
    x = torch.tensor([[[1.0], [1.0], [4.0], [1.0]]])
    chosen = ops.kmeans_seed(x, weights_of(0, 1, 4, False), uniforms(1, 1, 4 * 3), 4)[0].tolist()
    assert len({float(x[0, i]) for i in chosen[:2]}) == 2
    assert chosen[2:] == [chosen[0]] * 2


@needs_extension
@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize(
    ("b", "e", "n", "d", "k"), [(0, 0, 3, 2, 2), (2, 2, 3, 0, 2), (1, 0, 3, 2, 2), (1, 1, 1, 1, 1)]
)
def test_empty_and_single_sizes(b: int, e: int, n: int, d: int, k: int) -> None:
    x, weights = torch.ones(b, n, d), weights_of(0, b, n, False)
    assert ops.kmeans_seed(x, weights, uniforms(0, e, k * 2), k).shape == (e, k)


@pytest.mark.parametrize("apart", [0, 1, 10, 1e3])
@pytest.mark.parametrize("dtype", FLOATING)
def test_rows_left_out_by_the_triangle_inequality_change_nothing(
    apart: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks every row is compared with every candidate."""
    g = generator(0)
    groups = apart * torch.randn(2, 9, 5, generator=g)
    x = (groups.repeat(1, 70, 1) + torch.randn(2, 630, 5, generator=g)).to(dtype)
    expected = kmeans_plus_plus(x, 40)
    monkeypatch.setattr("clustops.kmeans_rows.Rows.at_once", lambda rows: None)
    assert torch.equal(kmeans_plus_plus(x, 40), expected)


@needs_extension
@given(
    seed=st.integers(-(2**63), 2**63 - 1),
    use=st.integers(0, 3),
    restarts=st.integers(1, 3),
    iteration=st.integers(0, 2**31 - 1),
    n=odd_sizes,
)
@pytest.mark.usefixtures("instruction_set")
def test_draws_are_the_reference_s(seed: int, use: int, restarts: int, iteration: int, n: int) -> None:
    position = torch.randint(0, 2**62, (2, n), generator=generator(n))
    expected = kmeans_ops.draws(position, seed, use, restarts, iteration)
    assert torch.equal(ops.kmeans_draws(position, seed, use, restarts, iteration), expected)


def samples(device: str) -> dict[str, tuple[Tensor | int | None, ...]]:
    x = integers(0, 2, 9, 3).to(device)
    weights = torch.ones((), dtype=torch.float64, device=device).expand(4, 9)
    closest = torch.full((4, 9), 2.0, device=device)
    improves = torch.full((4, 9), 3, dtype=torch.int32, device=device)
    candidates = x.repeat_interleave(2, 0)[:, :2]
    scale = torch.full((4,), 2.0**50, dtype=torch.float64, device=device)
    chosen = torch.tensor([0, 1, 0, 1], device=device)
    return {
        "kmeans_draws": (torch.arange(6, device=device).view(2, 3), -1, 1, 2, 5),
        "kmeans_seed": (x, weights[:2], uniforms(0, 4, 6).to(device), 3),
        "kmeans_potentials": (x, candidates, closest, weights, scale),
        "kmeans_closest_": (closest, x, candidates[:, :1], improves, chosen),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", samples("cpu"))
def test_registration_passes_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, samples(device)[name])


@needs_extension
def test_a_mistake_behind_the_checks_is_an_exception() -> None:
    view, kernel = native.view, native.extension.kmeans_seed
    x, weights, uniform = torch.ones(1, 4, 3), weights_of(0, 1, 4, True), uniforms(0, 1, 4)
    chosen = torch.empty(1, 2, dtype=torch.int64)
    workspace = chosen.new_empty(native.extension.kmeans_seed_workspace_cpu(view(x), view(uniform), 2, 1))
    good = {"x": x, "weights": weights, "uniform": uniform, "chosen": chosen, "workspace": workspace}
    bad = {
        "x": x[0],
        "weights": weights.float(),
        "uniform": uniform[:, ::2],
        "chosen": chosen.int(),
        "workspace": workspace[1:],
    }
    kernel(*(view(t) for t in good.values()), 1)
    for name, tensor in bad.items():
        with pytest.raises(ValueError, match=name):
            kernel(*(view(t) for t in {**good, name: tensor}.values()), 1)
