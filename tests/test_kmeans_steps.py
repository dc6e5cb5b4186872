"""The steps of k-means: assignment, means, k-means++, repair; their ops; faiss as a judge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import RTOL, assert_close, generator, odd_sizes, seeds, small_sizes
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from clustops import reference
from clustops.kmeans import cluster_means, kmeans, kmeans_assign, kmeans_plus_plus, repair_empty_clusters
from clustops.kmeans_rows import Rows
from clustops.kmeans_select import pick
from clustops.reference import kmeans_ops as ops

dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
policies = st.sampled_from(["split", "farthest", "random"])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_labels(seed: int, *shape: int, k: int) -> Tensor:
    return torch.randint(0, k, shape, generator=generator(seed))


# --- assignment


@given(
    seeds, st.integers(1, 3), odd_sizes, small_sizes, small_sizes, dtypes, st.sampled_from(["l2", "cosine"])
)
def test_assignment_equals_the_reference(
    seed: int, b: int, n: int, d: int, k: int, dtype: torch.dtype, metric: str
) -> None:
    x, centroids = normal(seed, b, n, d, dtype=dtype), normal(seed + 1, b, k, d, dtype=dtype)
    for top in {1, k}:
        labels, distances = kmeans_assign(x, centroids, metric=metric, top=top)
        oracle_labels, oracle = reference.kmeans_assign(x, centroids, metric=metric, top=top)
        assert torch.equal(labels, oracle_labels)
        assert_close(distances, oracle, distances.dtype)


@given(seeds, odd_sizes, small_sizes)
def test_a_label_does_not_depend_on_the_other_rows(seed: int, n: int, d: int) -> None:
    x, centroids = normal(seed, n, d), normal(seed + 1, 7, d)
    labels, distances = kmeans_assign(x, centroids)
    for i in range(0, n, 11):
        one_label, one_distance = kmeans_assign(x[i : i + 1], centroids)
        assert torch.equal(one_label, labels[i : i + 1])
        assert torch.equal(one_distance, distances[i : i + 1])


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.zeros(5, 2)
    centroids = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert kmeans_assign(x, centroids)[0].tolist() == [1] * 5
    assert kmeans_assign(x, centroids, top=3)[0].tolist() == [[1, 2, 3]] * 5


def test_no_rows_give_no_labels() -> None:
    labels, distances = kmeans_assign(torch.empty(0, 3), torch.ones(2, 3))
    assert labels.shape == distances.shape == (0,)
    means, counts = cluster_means(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 2)
    assert means.tolist() == [[0, 0, 0]] * 2
    assert counts.tolist() == [0, 0]


def test_a_label_without_rows_of_positive_weight_has_mean_zero() -> None:
    x, labels = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1])
    means, counts = cluster_means(x, labels, 3, weights=torch.tensor([0.0, 5.0, 0.0]))
    assert means.tolist() == [[2.0], [0.0], [0.0]]
    assert counts.tolist() == [2, 1, 0]


def test_distances_far_from_the_origin_do_not_cancel() -> None:
    centroids = torch.tensor([[10000.0, 0.0], [10001.0, 0.0]])
    labels, distances = kmeans_assign(centroids + torch.tensor([0.25, 0.0]), centroids)
    assert labels.tolist() == [0, 1]
    assert distances.tolist() == [0.0625, 0.0625]


def test_assignment_agrees_with_faiss_on_separated_clusters() -> None:
    faiss = pytest.importorskip("faiss")
    centroids = 10 * normal(0, 50, 16)
    x = centroids.repeat(20, 1) + normal(1, 1000, 16)
    index = faiss.IndexFlatL2(16)
    index.add(centroids.numpy())
    far, near = index.search(x.numpy(), 3)
    labels, distances = kmeans_assign(x, centroids, top=3)
    assert labels.tolist() == near.tolist()
    np.testing.assert_allclose(distances.numpy(), far, rtol=1e-4)


# --- means


@given(seeds, st.integers(1, 3), odd_sizes, small_sizes, small_sizes, dtypes, st.booleans())
def test_means_equal_the_reference(
    seed: int, b: int, n: int, d: int, k: int, dtype: torch.dtype, weighted: bool
) -> None:
    x, labels = normal(seed, b, n, d, dtype=dtype), random_labels(seed, b, n, k=k) - (seed % 2)
    weights = torch.rand(b, n, generator=generator(seed)).round(decimals=1) if weighted else None
    if weights is not None:
        weights[:, 0] = 1
    means, counts = cluster_means(x, labels, k, weights=weights)
    oracle, oracle_counts = reference.cluster_means(x, labels, k, weights=weights)
    assert means.dtype == oracle.dtype
    assert_close(means, oracle, means.dtype)
    assert torch.equal(counts, oracle_counts)


@given(seeds, odd_sizes, small_sizes)
def test_means_are_the_same_bits_in_any_order_of_the_rows(seed: int, n: int, d: int) -> None:
    x = normal(seed, n, d) * torch.exp(3 * normal(seed + 1, n, 1))
    labels = random_labels(seed, n, k=3)
    shuffle = torch.randperm(n, generator=generator(seed))
    assert torch.equal(cluster_means(x, labels, 3)[0], cluster_means(x[shuffle], labels[shuffle], 3)[0])


def test_means_are_exact_where_float32_sums_are_not() -> None:
    x = torch.tensor([1e8, 1.0, -1e8, 1.0]).unsqueeze(1)
    means, _ = cluster_means(x, torch.zeros(4, dtype=torch.int64), 1)
    assert means.tolist() == [[0.5]]


def test_two_to_the_24_plus_one_rows_are_counted_and_averaged() -> None:
    n = 2**24 + 1
    x = torch.tensor([[0.1]]).expand(n, 1)
    means, counts = cluster_means(x, torch.zeros(1, dtype=torch.int64).expand(n), 1)
    assert counts.tolist() == [n]
    assert torch.equal(means, x[:1])


@pytest.mark.slow
def test_offsets_past_two_to_the_31() -> None:
    n, d = 2**16 + 3, 2**15
    x = torch.ones(1, 1).expand(n, d)
    labels = torch.zeros(n, dtype=torch.int64)
    labels[-1] = 1
    means, counts = cluster_means(x, labels, 2)
    assert counts.tolist() == [n - 1, 1]
    assert bool((means == 1).all())
    rows, k = torch.zeros(2**20 + 3, 1), 2**11
    rows[-1] = k - 1
    found, _ = kmeans_assign(rows, torch.arange(k).float().unsqueeze(1))
    assert int(found[-1]) == k - 1
    assert int(found[:-1].max()) == 0


# --- k-means++


@given(seeds, st.integers(1, 3), odd_sizes, small_sizes, st.booleans())
def test_plus_plus_draws_what_the_reference_draws(seed: int, b: int, n: int, d: int, weighted: bool) -> None:
    x = normal(seed, b, n, d, dtype=torch.float64)
    k = 1 + seed % min(n, 11)
    weights = torch.rand(b, n, generator=generator(seed)) + 0.01 if weighted else None
    centroids = kmeans_plus_plus(x, k, weights=weights, seed=seed)
    assert torch.equal(centroids, reference.kmeans_plus_plus(x, k, weights=weights, seed=seed))


@given(seeds, odd_sizes)
def test_plus_plus_takes_distinct_rows_of_positive_weight(seed: int, n: int) -> None:
    x = torch.randint(0, 4, (n, 2), generator=generator(seed)).float()
    weights = (torch.rand(n, generator=generator(seed)) < 0.7).float()
    weights[0] = 1
    present = torch.unique(x[weights > 0], dim=0)
    k = 1 + seed % n
    chosen = kmeans_plus_plus(x, k, weights=weights, seed=seed)
    taken = torch.unique(chosen, dim=0)
    assert taken.shape[0] == min(k, present.shape[0])
    assert all(bool((present == row).all(1).any()) for row in taken)


def test_the_first_row_is_drawn_by_weight() -> None:
    x = torch.tensor([[0.0], [1.0]])
    weights = torch.tensor([1.0, 3.0])
    drawn = [float(kmeans_plus_plus(x, 1, weights=weights, seed=s)) for s in range(400)]
    assert abs(sum(drawn) / 400 - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 400)


def test_later_rows_are_drawn_by_squared_distance() -> None:
    # From the heavy row at 0, the rows at 1 and 2 have potentials 1 and 4. The better of two draws wins, and
    # a centroid at 2 leaves 1 where one at 1 leaves 1 as well: ties go to the first draw.
    x = torch.tensor([[0.0], [1.0], [2.0]])
    weights = torch.tensor([1e6, 1.0, 1.0])
    drawn = [float(kmeans_plus_plus(x, 2, weights=weights, seed=s)[1]) - 1 for s in range(400)]
    assert abs(sum(drawn) / 400 - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 400)


def test_plus_plus_starts_better_than_random_rows() -> None:
    x = normal(0, 40, 2).repeat(25, 1) * 30 + normal(1, 1000, 2)
    greedy = kmeans(x, 40, max_iter=0)
    random = kmeans(x, 40, init="random", max_iter=0)
    assert float(greedy.inertia) < float(random.inertia) / 2


def test_rows_without_potential_are_never_picked() -> None:
    rows = Rows(torch.zeros(1, 4, 1), None, None)
    potential = torch.tensor([[0, 1, 0, 1]])
    index, total = pick(rows, potential, torch.tensor([[0.0, 0.49, 0.5, 1 - 2.0**-53]], dtype=torch.float64))
    assert index.tolist() == [[1, 1, 3, 3]]
    assert total.tolist() == [2]
    assert pick(rows, 0 * potential, torch.zeros(1, 1).double())[0].tolist() == [[-1]]


def test_random_rows_are_distinct_and_uniform() -> None:
    x = torch.arange(10).float().unsqueeze(1)
    hits = torch.zeros(10)
    for seed in range(300):
        chosen = kmeans(x, 5, init="random", max_iter=0, seed=seed).centroids.flatten().long()
        assert chosen.unique().numel() == 5
        hits[chosen] += 1
    assert float((hits - 150).abs().max()) < 4 * math.sqrt(300 * 0.25)


# --- repair


def empty_clusters(seed: int, n: int, d: int, k: int, filled: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows in the first ``filled`` of ``k`` clusters, centroids at their means."""
    x, labels = normal(seed, n, d, dtype=torch.float64), random_labels(seed, n, k=filled)
    means, counts = reference.cluster_means(x, labels, k)
    return x, labels, means, counts


@given(seeds, odd_sizes, small_sizes, policies)
def test_repair_equals_the_reference(seed: int, n: int, d: int, policy: str) -> None:
    k = 1 + seed % n
    given_ = empty_clusters(seed, n, d, k, 1 + seed % k)
    found = repair_empty_clusters(*given_, policy=policy, seed=seed)
    for ours, oracle in zip(
        found, reference.repair_empty_clusters(*given_, policy=policy, seed=seed), strict=True
    ):
        assert_close(ours, oracle, torch.float64)


@given(seeds, odd_sizes, small_sizes, policies)
def test_repair_leaves_no_cluster_empty_and_exhausts_no_donor(seed: int, n: int, d: int, policy: str) -> None:
    k = 1 + seed % n
    x, labels, centroids, counts = empty_clusters(seed, n, d, k, 1 + seed % k)
    before = x.clone(), labels.clone(), centroids.clone(), counts.clone()
    new_labels, new_centroids, new_counts, repaired = repair_empty_clusters(
        x, labels, centroids, counts, policy=policy, seed=seed
    )
    assert int(new_counts.min()) >= 1
    assert torch.equal(new_counts, torch.bincount(new_labels, minlength=k))
    assert int(repaired) == int((counts == 0).sum())
    assert torch.isfinite(new_centroids).all()
    for old, now in zip(before, (x, labels, centroids, counts), strict=True):
        assert torch.equal(old, now)


@given(seeds, policies)
def test_repair_of_a_batch_equals_single_calls(seed: int, policy: str) -> None:
    problems = [empty_clusters(seed + b, 40, 3, 9, 1 + (seed + b) % 9) for b in range(3)]
    batch = repair_empty_clusters(
        *(torch.stack(parts) for parts in zip(*problems, strict=True)), policy=policy, seed=seed
    )
    for b, problem in enumerate(problems):
        for whole, one in zip(batch, repair_empty_clusters(*problem, policy=policy, seed=seed), strict=True):
            assert torch.equal(whole[b], one)


@given(seeds)
def test_a_split_sends_each_row_of_the_donor_to_the_nearer_half(seed: int) -> None:
    x, labels, centroids, counts = empty_clusters(seed, 60, 4, 3, 2)
    new_labels, new_centroids, _, _ = repair_empty_clusters(x, labels, centroids, counts, seed=seed)
    donor = int(labels[new_labels == 2][0])
    members = labels == donor
    halves = new_centroids[[donor, 2]]
    expected = (x[members].unsqueeze(1) - halves).square().sum(-1).argmin(1)
    assert torch.equal((new_labels[members] == 2).long(), expected)
    assert torch.equal(new_labels[~members], labels[~members])
    assert_close(halves.mean(0), centroids[donor], torch.float64)


def test_a_split_of_rows_one_rounding_apart_puts_each_on_its_centroid() -> None:
    x = torch.tensor([[1e6], [0.0]])
    x[1] = torch.nextafter(x[0], torch.tensor(torch.inf))
    new_labels, new_centroids, _, _ = repair_empty_clusters(
        x, torch.zeros(2, dtype=torch.int64), x.mean(0).expand(2, 1), torch.tensor([2, 0])
    )
    assert torch.equal(new_centroids[new_labels], x)


def test_donors_are_drawn_by_count_minus_one() -> None:
    x = torch.arange(9).float().unsqueeze(1)
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2])
    means, counts = cluster_means(x, labels, 4)
    donors = [
        int(labels[repair_empty_clusters(x, labels, means, counts, seed=s)[0] == 3][0]) for s in range(600)
    ]
    share = torch.bincount(torch.tensor(donors), minlength=3) / 600
    assert share[0] == 0
    assert abs(float(share[1]) - 1 / 6) < 4 * math.sqrt(5 / 36 / 600)


def test_rows_that_are_all_equal_are_no_donor() -> None:
    x = torch.tensor([[0.3, 0.1]] * 50 + [[5.0, 5.0], [6.0, 6.0]])
    labels = torch.tensor([0] * 50 + [1, 1])
    means, counts = cluster_means(x, labels, 5)
    _, _, new_counts, repaired = repair_empty_clusters(x, labels, means, counts)
    assert new_counts.sort().values.tolist() == [0, 0, 1, 1, 50]
    assert int(repaired) == 1


def test_farthest_takes_the_lowest_of_equally_far_rows_and_never_the_last_of_a_cluster() -> None:
    x = torch.tensor([[9.0], [0.0], [2.0], [5.0], [7.0]])
    labels = torch.tensor([2, 0, 0, 1, 1])
    centroids = torch.tensor([[1.0], [6.0], [0.0], [50.0]])
    new_labels, new_centroids, counts, _ = repair_empty_clusters(
        x, labels, centroids, torch.tensor([2, 2, 1, 0]), policy="farthest"
    )
    assert new_labels.tolist() == [2, 3, 0, 1, 1]
    assert new_centroids.tolist() == [[1.0], [6.0], [0.0], [0.0]]
    assert counts.tolist() == [1, 2, 1, 1]


def test_farthest_stops_at_distance_zero() -> None:
    x = torch.zeros(6, 2)
    _, _, counts, repaired = repair_empty_clusters(
        x, torch.zeros(6).long(), torch.zeros(3, 2), torch.tensor([6, 0, 0]), policy="farthest"
    )
    assert counts.tolist() == [6, 0, 0]
    assert int(repaired) == 0


def test_keep_changes_nothing() -> None:
    given_ = empty_clusters(0, 20, 2, 4, 2)
    found = repair_empty_clusters(*given_, policy="keep")
    for old, new in zip(given_[1:], found, strict=False):
        assert torch.equal(old, new)
    assert int(found[3]) == 0


def test_repair_of_a_ragged_batch_leaves_padding_out() -> None:
    x, labels, centroids, counts = empty_clusters(0, 30, 2, 5, 2)
    padded = torch.cat([x, torch.full((4, 2), 1e6, dtype=torch.float64)])
    with_padding = repair_empty_clusters(padded, torch.cat([labels, torch.full((4,), -1)]), centroids, counts)
    alone = repair_empty_clusters(x, labels, centroids, counts)
    assert torch.equal(with_padding[0], torch.cat([alone[0], torch.full((4,), -1)]))
    assert torch.equal(with_padding[1], alone[1])


# --- the rule of faiss


def faiss_iteration(x: Tensor, init: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What faiss returns after one iteration, and the labels of that iteration."""
    faiss = pytest.importorskip("faiss")
    n, d = x.shape
    k = init.shape[0]
    judge = faiss.Kmeans(d, k, niter=1, min_points_per_centroid=1, max_points_per_centroid=n)
    judge.train(x.numpy(), init_centroids=init.numpy())
    index = faiss.IndexFlatL2(d)
    index.add(init.numpy())
    return judge.centroids, index.search(x.numpy(), 1)[1][:, 0]


@given(seeds, st.integers(1, 9), st.integers(1, 20), st.integers(1, 6))
def test_the_faiss_rule_is_that_of_faiss_bit_for_bit(seed: int, d: int, filled: int, empty: int) -> None:
    k = filled + empty
    x = normal(seed, 40 + k, d)
    init = torch.cat([x[:filled], torch.full((empty, d), 1e4) + torch.arange(empty).unsqueeze(1)])
    init = init[torch.randperm(k, generator=generator(seed))]
    expected, labels = faiss_iteration(x, init)
    # The means as faiss forms them: rows added in order in fp32, then times the reciprocal.
    sums, counts = np.zeros((k, d), np.float32), np.bincount(labels, minlength=k)
    np.add.at(sums, labels, x.numpy())
    with np.errstate(divide="ignore"):
        factor = np.float32(1) / counts.astype(np.float32)
    means = np.where(counts[:, None] > 0, sums * np.where(counts > 0, factor, 0)[:, None], init.numpy())
    _, centroids, h, moved = reference.repair_empty_clusters(
        x, torch.from_numpy(labels), torch.from_numpy(means), torch.from_numpy(counts), policy="faiss"
    )
    assert np.array_equal(centroids.numpy(), expected)
    assert int(moved) == int((counts == 0).sum())
    assert float(h.sum()) == x.shape[0]


def test_reference_kmeans_follows_faiss_over_iterations() -> None:
    faiss = pytest.importorskip("faiss")
    x = normal(0, 400, 4) + 5
    init = torch.cat([x[:6], torch.full((2, 4), 1e4)])
    judge = faiss.Kmeans(4, 8, niter=6, min_points_per_centroid=1, max_points_per_centroid=400)
    judge.train(x.numpy(), init_centroids=init.numpy())
    found = reference.kmeans(x, 8, init=init, empty="faiss", tol=0.0, max_iter=6)
    assert_close(found.centroids, torch.from_numpy(judge.centroids), torch.float32, scale=10)


# --- ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cluster_means_passes_opcheck(dtype: torch.dtype) -> None:
    x, labels = normal(0, 2, 7, 3, dtype=dtype), random_labels(0, 2, 7, k=4)
    weights = torch.ones((), dtype=torch.float64).expand(2, 7)
    torch.library.opcheck(torch.ops.clustops.cluster_means.default, (x, labels, weights, 4))


def test_assignment_and_means_trace_once_for_all_sizes() -> None:
    def both(x: Tensor, centroids: Tensor) -> Tensor:
        labels, distances = kmeans_assign(x, centroids, metric="cosine")
        return cluster_means(x, labels, 4)[0] + distances.sum()

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(both, backend=counter, fullgraph=True, dynamic=True)
    for n in (5, 8, 33):
        x = normal(n, n, 6)
        assert_close(compiled(x, x[:4]), both(x, x[:4]), torch.float32)
    assert counter.frame_count == 1


@given(seeds, st.integers(1, 200))
def test_folded_numbers_add_up_to_the_exact_sum(seed: int, n: int) -> None:
    values = torch.exp(8 * normal(seed, 1, n, dtype=torch.float64)) * normal(
        seed + 1, 1, n, dtype=torch.float64
    )
    grid = ops.units(values.abs().amax(1), torch.tensor([n]))
    high, low = ops.fold(values, grid[:, :1], grid[:, 1:])
    shuffle = torch.randperm(n, generator=generator(seed))
    assert torch.equal(high.sum(1), high[:, shuffle].cumsum(1)[:, -1])
    assert torch.equal(low.sum(1), low[:, shuffle].cumsum(1)[:, -1])
    exact = math.fsum(values[0].tolist())
    assert float(high.sum() + low.sum()) == pytest.approx(
        exact, rel=1e-15, abs=float(values.abs().max()) * 1e-20
    )


@given(seeds, odd_sizes, small_sizes, dtypes)
def test_unit_rows_have_norm_one_and_normalising_again_changes_no_bit(
    seed: int, n: int, d: int, dtype: torch.dtype
) -> None:
    x = normal(seed, n, d, dtype=dtype)
    x[0] = 0
    once = ops.unit_rows(x)
    assert torch.equal(once, ops.unit_rows(once))
    expected = (x.double() != 0).any(1).double()
    torch.testing.assert_close(once.double().norm(dim=1), expected, rtol=RTOL[once.dtype], atol=0)
