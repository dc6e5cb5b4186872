"""The guarantees of k-means as properties, and the traps that other implementations fall into."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans as ScikitKMeans
from support import RTOL, assert_close, generator, odd_sizes, seeds, small_sizes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clustops import kmeans_source, native, reference
from clustops.checks import ClustopsWarning
from clustops.kmeans import KMeansProgress, KMeansResult, kmeans, kmeans_assign
from clustops.reference.kmeans_ops import unit_rows

SETS = native.extension.instruction_sets() if native.extension else []


@pytest.fixture(params=[*SETS, pytest.param("cuda", marks=pytest.mark.cuda)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every kernel: each set of CPU instructions, and the GPU."""
    if request.param == "cuda":
        for function in (kmeans, kmeans_assign):
            monkeypatch.setattr(f"{__name__}.{function.__name__}", on_gpu(function))
        yield
        return
    before = native.extension.instruction_set()
    native.extension.use_instruction_set(request.param)
    yield
    native.extension.use_instruction_set(before)


everywhere = pytest.mark.usefixtures(*(["path"] if native.extension else []))


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with tensors moved to the GPU and its results moved back."""

    def moved(*args: Any, **options: Any) -> Any:
        there = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in options.items()}
        found = function(*(v.cuda() if isinstance(v, Tensor) else v for v in args), **there)
        if isinstance(found, KMeansResult):
            return KMeansResult(**{name: v.cpu() for name, v in vars(found).items()})
        return tuple(v.cpu() for v in found)

    return moved


metrics = st.sampled_from(["l2", "cosine"])
repairing = st.sampled_from(["split", "farthest", "random"])
policies = st.sampled_from(["split", "farthest", "random", "keep"])
starts = st.sampled_from(["k-means++", "random", "tensor"])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def grid(seed: int, *shape: int, high: int = 3) -> Tensor:
    """Small integers: many equal rows, zero rows, opposite rows and exact ties."""
    return torch.randint(-1, high, shape, generator=generator(seed)).float()


def start_of(kind: str, x: Tensor, k: int, seed: int) -> str | Tensor:
    """A named start, or one with equal and far-off centroids, most of which stay empty."""
    if kind != "tensor":
        return kind
    chosen = x[..., :1, :].expand(*x.shape[:-2], k, -1).clone()
    chosen[..., k // 2 :, :] += 100 * normal(seed, 1, x.shape[-1])
    return chosen


def quiet_kmeans(*args: Any, **options: Any) -> KMeansResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ClustopsWarning)
        return kmeans(*args, **options)


def distinct_rows(x: Tensor, metric: str) -> int:
    return torch.unique(unit_rows(x) if metric == "cosine" else x, dim=0).shape[0]


def assert_same(a: KMeansResult, b: KMeansResult) -> None:
    """Every field is equal, bit for bit."""
    for name in vars(a):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def pick(result: KMeansResult, b: int, n: int) -> KMeansResult:
    """The result of problem ``b`` alone, without padding."""
    return KMeansResult(**{f: v[b][:n] if f == "labels" else v[b] for f, v in vars(result).items()})


# --- what comes back belongs together


@everywhere
@given(seeds, odd_sizes, small_sizes, st.integers(0, 3), metrics, policies, starts, st.booleans())
def test_labels_counts_and_inertia_belong_to_the_returned_centroids(
    seed: int, n: int, d: int, max_iter: int, metric: str, empty: str, start: str, ties: bool
) -> None:
    x = grid(seed, n, d) if ties else normal(seed, n, d)
    k = 1 + seed % min(n, 9)
    init = start_of(start, x, k, seed)
    found = quiet_kmeans(x, k, metric=metric, empty=empty, init=init, max_iter=max_iter, seed=seed)
    rows = unit_rows(x) if metric == "cosine" else x
    distances = (rows.unsqueeze(1) - found.centroids).square().sum(-1)
    chosen = distances.gather(1, found.labels.unsqueeze(1)).squeeze(1)
    assert_close(chosen, distances.amin(1), torch.float32)
    if ties and metric == "l2" and max_iter == 0:  # small integers: distances are exact
        assert torch.equal(found.labels, distances.argmin(1))
    assert torch.equal(found.labels, kmeans_assign(x, found.centroids, metric=metric)[0])
    assert torch.equal(found.counts, torch.bincount(found.labels, minlength=k))
    direct = (rows.double() - found.centroids.double()[found.labels]).square().sum()
    assert found.inertia.dtype == torch.float64
    assert_close(found.inertia, direct, torch.float32)
    assert int(found.n_empty) == int((found.counts == 0).sum())
    assert torch.isfinite(found.centroids).all()


@everywhere
@pytest.mark.parametrize("max_iter", [0, 1, 2])
def test_labels_are_not_stale_when_max_iter_ends_the_run(max_iter: int) -> None:
    x = normal(3, 300, 2)
    found = kmeans(x, 12, init=x[:12], max_iter=max_iter, tol=0.0)
    assert not bool(found.converged)
    assert torch.equal(found.labels, kmeans_assign(x, found.centroids)[0])


@everywhere
def test_rows_close_together_in_groups_far_apart_each_find_their_centroid() -> None:
    x = 0.05 * normal(0, 40, 8)
    x[:20] += 1e4
    x[20:] -= 1e4
    assert kmeans_assign(x, x)[0].tolist() == list(range(40))
    assert quiet_kmeans(x, 40).counts.tolist() == [1] * 40


# --- empty clusters


@everywhere
@given(seeds, odd_sizes, st.integers(1, 3), metrics, repairing, starts, st.integers(0, 3))
def test_no_cluster_is_empty_beyond_the_surplus_over_distinct_rows(
    seed: int, n: int, d: int, metric: str, empty: str, start: str, max_iter: int
) -> None:
    x = grid(seed, n, d)
    k = 1 + seed % n
    distinct = distinct_rows(x, metric)
    init = start_of(start, x, k, seed)
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        found = kmeans(x, k, metric=metric, empty=empty, init=init, max_iter=max_iter, seed=seed)
    assert int(found.n_empty) == max(0, k - distinct)
    assert torch.isfinite(found.centroids).all()
    assert len(raised) == (distinct < k)
    for warning in raised:
        assert issubclass(warning.category, ClustopsWarning)
        assert f"{distinct} distinct rows" in str(warning.message)
        assert f"k = {k}" in str(warning.message)


@everywhere
@given(seeds, repairing, starts)
def test_every_distinct_row_has_its_cluster_when_k_is_n(seed: int, empty: str, start: str) -> None:
    x = normal(seed, 17, 3)
    found = kmeans(x, 17, empty=empty, init=start_of(start, x, 17, seed), seed=seed)
    assert found.counts.tolist() == [1] * 17
    assert float(found.inertia) == 0


@everywhere
@given(seeds, repairing, starts)
def test_clusters_are_found_among_eighty_percent_duplicates(seed: int, empty: str, start: str) -> None:
    x = normal(seed, 100, 2)
    x[:80] = x[0]
    found = kmeans(x, 15, empty=empty, init=start_of(start, x, 15, seed), seed=seed)
    assert int(found.counts.min()) >= 1


@everywhere
@pytest.mark.parametrize("empty", ["split", "farthest", "random"])
@pytest.mark.parametrize("max_iter", [0, 1, 25])
def test_a_symmetric_pair_around_its_centroid_is_split(empty: str, max_iter: int) -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    found = kmeans(x, 2, init=torch.ones(2, 2), empty=empty, max_iter=max_iter)
    assert found.counts.tolist() == [1, 1]


@everywhere
@pytest.mark.parametrize("empty", ["split", "farthest", "random"])
@pytest.mark.parametrize("max_iter", [0, 1, 25])
def test_a_zero_centroid_is_split(empty: str, max_iter: int) -> None:
    x = torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.0, -3.0], [0.0, 3.0]])
    found = kmeans(x, 4, init=torch.zeros(4, 2), empty=empty, max_iter=max_iter)
    assert found.counts.tolist() == [1] * 4


@everywhere
@pytest.mark.parametrize("offset", [0.0, 1000.0, 1e6])
def test_clusters_one_rounding_apart_are_separated(offset: float) -> None:
    x = torch.tensor([[offset]]).repeat(4, 1)
    for i in range(1, 4):
        x[i] = torch.nextafter(x[i - 1], torch.tensor(torch.inf)) if offset else x[i - 1] + 1e-10
    found = kmeans(x, 4, init=x[:1].expand(4, 1))
    assert found.counts.tolist() == [1] * 4


@everywhere
def test_equal_rows_leave_the_surplus_empty_and_say_so_once() -> None:
    x = torch.full((2, 10, 3), 0.1)
    with pytest.warns(
        ClustopsWarning, match="problem 0 of x, the first of 2 .* 1 distinct rows for k = 4: 3 clusters"
    ) as raised:
        found = kmeans(x, 4, max_iter=1000)
    assert len(raised) == 1
    assert found.n_empty.tolist() == [3, 3]
    assert found.converged.all()


@everywhere
def test_keep_reports_the_empty_cluster_at_its_old_centroid() -> None:
    x = normal(0, 20, 2)
    init = torch.tensor([[0.0, 0.0], [50.0, 50.0]])
    found = kmeans(x, 2, init=init, empty="keep")
    assert found.counts.tolist() == [20, 0]
    assert int(found.n_empty) == 1
    assert int(found.n_repaired) == 0
    assert torch.equal(found.centroids[1], init[1])


# --- progress


@everywhere
@given(seeds, odd_sizes, small_sizes, metrics, repairing, starts)
def test_inertia_rises_only_in_an_iteration_that_repaired(
    seed: int, n: int, d: int, metric: str, empty: str, start: str
) -> None:
    x = normal(seed, n, d)
    k = 1 + seed % min(n, 9)
    seen: list[KMeansProgress] = []
    init = start_of(start, x, k, seed)
    # In one dimension all rows of a sign are one point of the sphere.
    found = quiet_kmeans(x, k, metric=metric, empty=empty, init=init, seed=seed, callback=seen.append)
    for before, after in pairwise(seen):
        if int(before.n_repaired) == 0:
            assert float(after.inertia) <= float(before.inertia) * (1 + RTOL[torch.float32]) + 1e-6
    assert [p.iteration for p in seen] == list(range(int(found.n_iter)))
    assert sum(int(p.n_repaired) for p in seen) <= int(found.n_repaired)


def test_progress_has_one_entry_for_each_problem_and_shows_the_leading_restart() -> None:
    seen: list[KMeansProgress] = []
    found = kmeans(normal(0, 3, 40, 2), 4, n_init=5, max_iter=30, tol=0.0, callback=seen.append)
    assert len(seen) == 30
    assert seen[-1].inertia.shape == seen[-1].shift.shape == seen[-1].n_empty.shape == (3,)
    torch.testing.assert_close(seen[-1].inertia, found.inertia)


def test_progress_shows_a_bar_and_nothing_prints_without_it(capfd: pytest.CaptureFixture[str]) -> None:
    kmeans(normal(0, 20, 2), 2, max_iter=3)
    assert capfd.readouterr() == ("", "")
    kmeans(normal(0, 20, 2), 2, max_iter=3, progress=True)
    assert "inertia" in capfd.readouterr().err


def test_progress_without_tqdm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"clustops\[demo\]"):
        kmeans(normal(0, 20, 2), 2, progress=True)


# --- one problem is the same alone, in a batch, padded, with weights


@everywhere
@given(
    seeds,
    st.integers(1, 4),
    odd_sizes,
    small_sizes,
    metrics,
    policies,
    starts,
    st.integers(1, 2),
    st.sampled_from([0.0, 1e-4, 0.3]),
)
def test_a_batch_equals_single_calls(
    seed: int, b: int, n: int, d: int, metric: str, empty: str, start: str, n_init: int, tol: float
) -> None:
    x = normal(seed, b, n, d)
    k = 1 + seed % min(n, 9)
    init = start_of(start, x, k, seed)
    options: dict[str, Any] = {
        "metric": metric,
        "empty": empty,
        "seed": seed,
        "n_init": n_init,
        "max_iter": 8,
        "tol": tol,
    }
    batch = quiet_kmeans(x, k, init=init, **options)
    for i in range(b):
        one = quiet_kmeans(x[i], k, init=init if isinstance(init, str) else init[i], **options)
        assert_same(pick(batch, i, n), one)


def test_a_converged_problem_moves_no_more_while_others_go_on() -> None:
    x = normal(0, 6, 60, 2)
    batch = kmeans(x, 6, tol=0.05)
    assert batch.n_iter.unique().numel() > 1
    for i in range(6):
        assert_same(pick(batch, i, 60), kmeans(x[i], 6, tol=0.05))


@everywhere
@given(seeds, small_sizes, metrics, policies, starts)
def test_a_ragged_batch_equals_separate_calls(seed: int, d: int, metric: str, empty: str, start: str) -> None:
    x = normal(seed, 3, 40, d)
    lengths = torch.tensor([40, 7 + seed % 20, 7])
    k = 1 + seed % 7
    for i, n in enumerate(lengths.tolist()):
        x[i, n:] = float("nan")
    init = start_of(start, x, k, seed)
    ragged = quiet_kmeans(x, k, lengths=lengths, metric=metric, empty=empty, init=init, seed=seed)
    for i, n in enumerate(lengths.tolist()):
        alone_init = init if isinstance(init, str) else init[i]
        alone = quiet_kmeans(x[i, :n], k, metric=metric, empty=empty, init=alone_init, seed=seed)
        assert_same(pick(ragged, i, n), alone)
        assert (ragged.labels[i, n:] == -1).all()


@everywhere
@given(seeds, small_sizes, metrics, policies, starts)
def test_weight_zero_equals_a_removed_row(seed: int, d: int, metric: str, empty: str, start: str) -> None:
    x = normal(seed, 60, d)
    present = torch.rand(60, generator=generator(seed)) < 0.6
    present[:9] = True
    k = 1 + seed % 9
    init = start_of(start, x, k, seed)
    options: dict[str, Any] = {"metric": metric, "empty": empty, "init": init, "seed": seed}
    weighted = quiet_kmeans(x, k, weights=present.float(), **options)
    removed = quiet_kmeans(x[present], k, **options)
    assert torch.equal(weighted.centroids, removed.centroids)
    assert torch.equal(weighted.labels[present], removed.labels)
    assert torch.equal(weighted.inertia, removed.inertia)
    assert torch.equal(weighted.n_empty, removed.n_empty)
    assert torch.equal(weighted.labels, kmeans_assign(x, weighted.centroids, metric=metric)[0])


@everywhere
@given(seeds, small_sizes, metrics, st.sampled_from(["k-means++", "tensor"]))
def test_weight_two_equals_a_duplicated_row(seed: int, d: int, metric: str, start: str) -> None:
    x = normal(seed, 50, d)
    twice = torch.rand(50, generator=generator(seed)) < 0.5
    k = 1 + seed % 5
    init = x[:k] if start == "tensor" else start
    repeats = 1 + twice.long()
    # Cosine in one dimension has two points at most, so empty clusters and random draws by count.
    options: dict[str, Any] = {"metric": metric if d > 1 else "l2", "init": init, "seed": seed}
    weighted = kmeans(x, k, weights=repeats.float(), **options)
    duplicated = kmeans(x.repeat_interleave(repeats, 0), k, **options)
    assert torch.equal(weighted.labels.repeat_interleave(repeats), duplicated.labels)
    assert_close(weighted.centroids, duplicated.centroids, torch.float32)
    assert_close(weighted.inertia, duplicated.inertia, torch.float32)


@everywhere
def test_a_cluster_of_weightless_rows_is_empty() -> None:
    x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    with pytest.warns(ClustopsWarning, match="2 distinct rows for k = 3"):
        found = kmeans(x, 3, weights=torch.tensor([1.0, 1.0, 0.0, 0.0]), init=x[:3])
    assert int(found.n_empty) == 1
    assert torch.equal(found.counts, torch.bincount(found.labels, minlength=3))


# --- same seed, same bits


@given(seeds, metrics, policies)
def test_chunks_change_no_bit(seed: int, metric: str, empty: str) -> None:
    x = normal(seed, 2, 97, 5).bfloat16()
    whole = kmeans(x, 6, metric=metric, empty=empty, n_init=2, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans_source, "_CHUNK", 2 * 2 * 5 * 10)
        chunked = kmeans(x, 6, metric=metric, empty=empty, n_init=2, seed=seed)
    assert_same(whole, chunked)


def test_the_number_of_threads_changes_no_bit() -> None:
    x = normal(0, 3000, 16)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(kmeans(x, 10, seed=3, max_iter=3))
    torch.set_num_threads(before)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@everywhere
def test_the_seed_decides_the_result_and_the_global_generator_is_left_alone() -> None:
    x = normal(0, 200, 3)
    state = torch.get_rng_state()
    assert_same(kmeans(x, 9, seed=5), kmeans(x, 9, seed=5))
    assert not torch.equal(kmeans(x, 9, seed=5).centroids, kmeans(x, 9, seed=6).centroids)
    assert torch.equal(state, torch.get_rng_state())


@given(seeds, st.sampled_from(["transposed", "sliced", "expanded", "offset"]))
def test_strides_change_no_bit_and_inputs_are_not_written(seed: int, layout: str) -> None:
    x = {
        "transposed": normal(seed, 5, 40).T,
        "sliced": normal(seed, 40, 11)[:, 1:10:2],
        "expanded": normal(seed, 40, 1).expand(40, 5),
        "offset": normal(seed, 201)[1:].view(40, 5),
    }[layout]
    weights = torch.rand(40, generator=generator(seed))
    init = x[:4]
    before = x.clone(), weights.clone()
    strided = kmeans(x, 4, weights=weights, init=init)
    assert torch.equal(x, before[0])
    assert torch.equal(weights, before[1])
    assert_same(strided, kmeans(x.contiguous(), 4, weights=weights, init=init.contiguous()))


# --- the reference and other judges


@everywhere
@given(seeds, odd_sizes, small_sizes, metrics, policies, starts, st.booleans())
def test_it_equals_the_reference(
    seed: int, n: int, d: int, metric: str, empty: str, start: str, weighted: bool
) -> None:
    x = normal(seed, n, d, dtype=torch.float64)
    k = 1 + seed % min(n, 9)
    weights = 0.5 + torch.rand(n, generator=generator(seed)) if weighted else None
    options: dict[str, Any] = {
        "metric": metric if d > 1 else "l2",
        "empty": empty,
        "init": start_of(start, x, k, seed),
        "weights": weights,
        "seed": seed,
        "max_iter": 5,
    }
    found, oracle = kmeans(x, k, **options), reference.kmeans(x, k, **options)
    assert torch.equal(found.labels, oracle.labels)
    assert_close(found.centroids, oracle.centroids, torch.float64)
    assert_close(found.inertia, oracle.inertia, torch.float64)
    for name in ("counts", "n_iter", "converged", "n_repaired", "n_empty"):
        assert torch.equal(getattr(found, name), getattr(oracle, name)), name


@given(seeds, small_sizes, st.integers(1, 6), st.booleans())
def test_it_equals_scikit_learn_from_the_same_start(seed: int, d: int, max_iter: int, weighted: bool) -> None:
    x = normal(seed, 120, d, dtype=torch.float64)
    weights = 0.5 + torch.rand(120, generator=generator(seed), dtype=torch.float64) if weighted else None
    judge = ScikitKMeans(7, init=x[:7].numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=max_iter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge.fit(x.numpy(), sample_weight=None if weights is None else weights.numpy())
    found = kmeans(x, 7, weights=weights, init=x[:7], tol=0.0, max_iter=max_iter, empty="farthest")
    assert found.labels.tolist() == judge.labels_.tolist()
    assert_close(found.centroids, torch.from_numpy(judge.cluster_centers_), torch.float64, scale=100)
    assert float(found.inertia) == pytest.approx(judge.inertia_, rel=1e-10)


@given(seeds, small_sizes)
def test_farthest_moves_an_empty_cluster_where_scikit_learn_does(seed: int, d: int) -> None:
    x = normal(seed, 60, d, dtype=torch.float64)
    init = torch.cat([x[:4], torch.full((1, d), 1e3, dtype=torch.float64)])
    judge = ScikitKMeans(5, init=init.numpy(), n_init=1, algorithm="lloyd", tol=0, max_iter=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        judge.fit(x.numpy())
    found = kmeans(x, 5, init=init, tol=0.0, max_iter=1, empty="farthest")
    assert_close(found.centroids, torch.from_numpy(judge.cluster_centers_), torch.float64, scale=100)
    assert int(found.n_repaired) == 1


@pytest.mark.parametrize("tol", [3e-2, 1e-2, 1e-3])
def test_tol_stops_where_scikit_learn_stops(tol: float) -> None:
    x = normal(1, 2000, 6, dtype=torch.float64) * torch.arange(1, 7) + 5
    judge = ScikitKMeans(15, init=x[:15].numpy(), n_init=1, algorithm="lloyd", tol=tol).fit(x.numpy())
    found = kmeans(x, 15, init=x[:15], tol=tol, max_iter=300)
    assert int(found.n_iter) == judge.n_iter_
    assert bool(found.converged)
    assert found.labels.tolist() == judge.labels_.tolist()


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_the_restart_with_the_lowest_inertia_wins_for_each_problem(init: str) -> None:
    x = normal(0, 3, 80, 2)
    best = kmeans(x, 8, n_init=6, init=init, max_iter=4)
    first = kmeans(x, 8, n_init=1, init=init, max_iter=4)
    five = kmeans(x, 8, n_init=5, init=init, max_iter=4)
    assert (best.inertia <= five.inertia).all()
    assert (five.inertia <= first.inertia).all()
    assert (five.inertia < first.inertia).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_results_are_float32_or_float64(dtype: torch.dtype) -> None:
    x = normal(0, 50, 3, dtype=dtype)
    found = kmeans(x, 3)
    assert found.centroids.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(found, kmeans(x.to(found.centroids.dtype), 3))
    assert found.labels.dtype == found.counts.dtype == torch.int64


@pytest.mark.parametrize("precision", [None, "highest", "high", "medium"])
def test_labels_are_exact_at_every_precision(precision: str | None) -> None:
    x = normal(0, 50, 3)
    assert_same(kmeans(x, 3, precision=precision), kmeans(x, 3))


def test_cosine_ignores_the_length_of_rows_and_gives_unit_centroids() -> None:
    x = normal(0, 100, 4, dtype=torch.float64)
    scaled = x * (1 + torch.rand(100, 1, generator=generator(0), dtype=torch.float64))
    a, b = kmeans(x, 5, metric="cosine"), kmeans(scaled, 5, metric="cosine")
    assert torch.equal(a.labels, b.labels)
    assert_close(a.centroids.norm(dim=1), torch.ones(5), torch.float64)


def test_zero_rows_and_opposite_rows_are_finite_under_cosine() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    found = kmeans(x, 1, metric="cosine", init=torch.tensor([[0.0, 3.0]]))
    assert found.centroids.tolist() == [[0.0, 1.0]]  # the mean has no direction: the old one stays
    assert float(found.inertia) == pytest.approx(6)


@everywhere
def test_max_iter_zero_assigns_to_the_start() -> None:
    x = normal(0, 30, 2)
    found = kmeans(x, 3, init=x[:3], max_iter=0)
    assert torch.equal(found.centroids, x[:3])
    assert int(found.n_iter) == 0
    assert not bool(found.converged)


def test_numpy_in_numpy_out_without_writing_to_read_only_memory() -> None:
    x = normal(0, 40, 3).numpy()
    x.setflags(write=False)
    found = kmeans(x, 4, weights=np.ones(40, dtype=np.float32), init=x[:4])
    for name, value in vars(found).items():
        assert isinstance(value, np.ndarray), name
    assert_same(
        kmeans(torch.tensor(x), 4, init=torch.tensor(x[:4])),
        KMeansResult(**{f: torch.as_tensor(v) for f, v in vars(found).items()}),
    )


# --- scale


def test_a_memory_map_is_clustered_as_in_memory(tmp_path: Any) -> None:
    values = normal(0, 1000, 8).numpy()
    values.tofile(tmp_path / "x.bin")
    x = np.memmap(tmp_path / "x.bin", dtype=np.float32, mode="r", shape=(1000, 8))
    mapped = kmeans(x, 6, device="cpu", metric="cosine")
    memory = kmeans(values, 6, metric="cosine")
    assert isinstance(mapped.labels, np.ndarray)
    assert np.array_equal(mapped.labels, memory.labels)
    assert np.array_equal(mapped.centroids, memory.centroids)


class _LargestResult(TorchDispatchMode):
    """Remembers the largest tensor that an op allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for t in result if isinstance(result, tuple) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize(
    ("metric", "dtype"), [("l2", torch.float32), ("cosine", torch.float32), ("l2", torch.half)]
)
def test_no_copy_of_x_and_nothing_of_size_n_times_k_is_made(
    metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kmeans_source, "_CHUNK", 1 << 14)
    monkeypatch.setattr("clustops.reference.kmeans_ops._ELEMENTS", 1 << 14)
    n, d, k = 20000, 32, 16
    x = normal(0, n, d).to(dtype)
    with _LargestResult() as largest:
        kmeans(x, k, metric=metric, max_iter=2, init=x[:k])
    assert largest.bytes <= 2 * 8 * n  # int64 labels, and the folded distances of the inertia
    assert largest.bytes < n * k * 4


@pytest.mark.slow
def test_two_to_the_24_plus_one_rows_in_a_cluster_are_counted_and_averaged_exactly() -> None:
    many = 2**24 + 1
    x = torch.ones(many + 3, 1)
    x[many:] = 4.0
    found = kmeans(x, 2, init=torch.tensor([[0.5], [3.0]]), max_iter=2)
    assert found.counts.tolist() == [many, 3]
    assert found.centroids.flatten().tolist() == [1.0, 4.0]
    assert float(found.inertia) == 0


@pytest.mark.slow
def test_many_problems_at_once() -> None:
    x = normal(0, 65537, 2, 1)
    found = kmeans(x, 2, max_iter=1)
    assert found.centroids.sort(1).values.equal(x.sort(1).values)


@pytest.mark.slow
def test_all_of_this_holds_on_the_reference_path() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = {**os.environ, "CLUSTOPS_DISABLE_NATIVE": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:]


@pytest.mark.parametrize(
    "module",
    [
        "kmeans",
        "kmeans_steps",
        "kmeans_init",
        "kmeans_lloyd",
        "kmeans_repair",
        "kmeans_rows",
        "kmeans_source",
    ],
)
def test_examples_in_docstrings_are_true(module: str) -> None:
    assert doctest.testmod(importlib.import_module(f"clustops.{module}")).failed == 0
