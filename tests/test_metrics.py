"""Metrics against scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from support import DEVICES, assert_message, generator

from clustops import metrics

pairs = st.integers(1, 80).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 9), min_size=n, max_size=n) for _ in range(2)])
)
AGREEMENT = [metrics.nmi, metrics.ari, metrics.purity, metrics.hungarian_accuracy]


@pytest.mark.parametrize("average", ["arithmetic", "geometric", "min", "max"])
@given(labels=pairs)
def test_nmi_is_scikit_learns(average: str, labels: tuple[list[int], list[int]]) -> None:
    expected = normalized_mutual_info_score(*labels, average_method=average)
    assert metrics.nmi(*labels, average=average) == pytest.approx(expected, abs=1e-12)


@given(labels=pairs)
def test_ari_is_scikit_learns(labels: tuple[list[int], list[int]]) -> None:
    assert metrics.ari(*labels) == pytest.approx(adjusted_rand_score(*labels), abs=1e-12)


@given(labels=pairs)
def test_purity_is_the_share_of_majority_classes(labels: tuple[list[int], list[int]]) -> None:
    clusters, classes = labels
    table = contingency_matrix(classes, clusters)
    assert metrics.purity(clusters, classes) == table.max(axis=0).sum() / len(classes)


@given(labels=pairs)
def test_hungarian_accuracy_is_scipys_matching(labels: tuple[list[int], list[int]]) -> None:
    table = contingency_matrix(*labels)
    expected = table[linear_sum_assignment(table, maximize=True)].sum() / len(labels[0])
    assert metrics.hungarian_accuracy(*labels) == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (40, 40), (25, 130), (100, 101), (700, 700)])
@pytest.mark.parametrize("most", [2, 50, 2**40])
def test_assignment_costs_what_scipys_costs(shape: tuple[int, int], most: int) -> None:
    cost = torch.randint(0, most, shape, generator=generator(0)).numpy()
    match = metrics._assignment(cost)
    assert len(set(match.tolist())) == shape[0]
    assert cost[np.arange(shape[0]), match].sum() == cost[linear_sum_assignment(cost)].sum()


@given(labels=pairs)
def test_sorted_pairs_are_those_of_a_table(labels: tuple[list[int], list[int]]) -> None:
    a, b = torch.tensor(labels) * 3
    table, pairs_ = metrics._contingency(a, b), metrics._sorted_contingency(a, b)
    for one, other in zip((*table[:2], *table[2]), (*pairs_[:2], *pairs_[2]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("k", [200, 5000, 2**31 - 1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_many_clusters_in_a_narrow_dtype_are_scikit_learns(k: int, dtype: torch.dtype) -> None:
    a, b = torch.randint(0, min(k, torch.iinfo(dtype).max), (2, 20_000), generator=generator(4))
    a, b = a.to(dtype), torch.where(a % 3 > 0, a, b).to(dtype)
    assert metrics.nmi(a, b) == pytest.approx(normalized_mutual_info_score(a, b), abs=1e-12)
    assert metrics.ari(a, b) == pytest.approx(adjusted_rand_score(a, b), abs=1e-12)
    table = contingency_matrix(b, a, sparse=True)
    assert metrics.purity(a, b) == table.max(axis=0).sum() / len(a)


@pytest.mark.cuda
@pytest.mark.parametrize("metric", AGREEMENT)
def test_a_gpu_is_waited_for_a_few_times_only(metric: Any) -> None:
    a, b = torch.randint(0, 12, (2, 500), generator=generator(5)).cuda()
    metric(a, b)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            metric(a, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= 10


@pytest.mark.parametrize("metric", AGREEMENT)
def test_renamed_clusters_agree_fully(metric: Any) -> None:
    labels = torch.randint(0, 12, (500,), generator=generator(1))
    assert metric(labels, (labels * 5 + 3) % 17 * 1000) == 1.0


@pytest.mark.parametrize("metric", AGREEMENT)
def test_one_sample_and_one_cluster_agree(metric: Any) -> None:
    assert metric([3], [7]) == 1.0
    assert metric([3, 3, 3], [7, 7, 7]) == 1.0


def test_independent_labels_do_not_agree() -> None:
    a, b = torch.randint(0, 10, (2, 100_000), generator=generator(2))
    assert metrics.nmi(a, b) < 0.001
    assert abs(metrics.ari(a, b)) < 0.001
    assert metrics.nmi(a, torch.zeros_like(a)) == metrics.ari(a, torch.zeros_like(a)) == 0.0


@pytest.mark.parametrize("metric", AGREEMENT)
@pytest.mark.parametrize("device", DEVICES)
def test_tensors_arrays_and_lists_give_the_same(metric: Any, device: str) -> None:
    a, b = torch.randint(0, 5, (2, 97), generator=generator(3))
    expected = metric(a, b)
    assert isinstance(expected, float)
    assert metric(a.numpy().astype(np.int32), b.numpy()) == metric(a.tolist(), b.to(torch.uint8)) == expected
    assert metric(a.to(device), b.to(device)) == pytest.approx(expected, abs=1e-12)


def test_ari_counts_pairs_without_rounding() -> None:
    # 2e5 samples in one cluster: 2e10 pairs, whose products pass 2^63.
    a = torch.zeros(200_001, dtype=torch.int64)
    b = a.clone()
    b[0] = 1
    assert metrics.ari(a, b) == 0.0
    a[0] = 2
    assert metrics.ari(a, b) == 1.0


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_effective_clusters_is_the_exponential_of_the_entropy(counts: list[int]) -> None:
    p = [n / sum(counts) for n in counts if n]
    expected = math.exp(-sum(x * math.log(x) for x in p))
    assert metrics.effective_clusters(counts) == pytest.approx(expected, rel=1e-12)
    assert metrics.effective_clusters([7] * 13 + [0]) == pytest.approx(13)
    assert metrics.effective_clusters(torch.tensor([0.0, 0.25])) == 1.0


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=20).filter(any))
def test_cluster_sizes_are_numpys_statistics(counts: list[int]) -> None:
    sizes = metrics.cluster_sizes(torch.tensor(counts))
    n = np.array(counts)
    assert sizes[:5] == (n.min(), np.median(n), n.max(), pytest.approx(n.mean()), (n == 0).sum())
    assert sizes.effective == metrics.effective_clusters(counts)


@pytest.mark.parametrize("metric", AGREEMENT)
def test_bad_labels_are_named(metric: Any) -> None:
    one, two = ("a", "b") if metric in (metrics.nmi, metrics.ari) else ("clusters", "classes")
    for arguments, error, parts in (
        (([0, 1], [0, 1, 2]), ValueError, (two, f"{one}.shape[0] = 2", "[3]")),
        (([0, -1], [0, 1]), ValueError, (one, ">= 0", "-1", "select")),
        ((torch.zeros(0).long(), [0]), ValueError, (one, "N >= 1", "[0]")),
        (([0, 1], [[0, 1]]), ValueError, (two, "[N]", "[1, 2]")),
        (([0.5, 1.0], [0, 1]), TypeError, (one, "integers", "float64")),
        (([0, 1], torch.tensor([0, 1], device="meta")), ValueError, (two, "device", "meta")),
    ):
        with pytest.raises(error) as caught:
            metric(*arguments)
        assert_message(caught.value, *parts)


def test_bad_counts_and_averages_are_named() -> None:
    for call, error, parts in (
        (lambda: metrics.nmi([0], [0], average="mean"), ValueError, ("average", "'arithmetic'", "'mean'")),
        (lambda: metrics.effective_clusters([0, 0]), ValueError, ("counts", "above 0", "only zeros")),
        (lambda: metrics.effective_clusters([1, -1]), ValueError, ("counts", ">= 0", "-1")),
        (lambda: metrics.cluster_sizes([0.5, 1.0]), TypeError, ("counts", "integers", "float64")),
        (lambda: metrics.cluster_sizes(torch.ones(2, 2).long()), ValueError, ("counts", "[K]", "[2, 2]")),
    ):
        with pytest.raises(error) as caught:
            call()
        assert_message(caught.value, *parts)
