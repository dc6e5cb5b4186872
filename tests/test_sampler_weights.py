"""cluster_weights, balanced_quota, cluster_members."""

from __future__ import annotations

import decimal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import assert_message

from clustops.reference import sampler as reference
from clustops.sampler import balanced_quota, cluster_members, cluster_weights
from clustops.sampler_weights import draw_weights

count_lists = st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any)
SCHEMES = [("inverse", {}), ("power", {"power": 0.5}), ("effective", {"beta": 0.99})]


@pytest.mark.parametrize(("scheme", "arguments"), SCHEMES)
@given(counts=count_lists)
def test_the_mean_weight_of_a_sample_is_one(
    scheme: str, arguments: dict[str, float], counts: list[int]
) -> None:
    n = torch.tensor(counts, dtype=torch.float64)
    weights = cluster_weights(n, scheme=scheme, **arguments)
    assert float((n * weights).sum() / n.sum()) == pytest.approx(1, rel=1e-12)
    assert bool((weights[n == 0] == 0).all())
    assert bool((weights[n > 0] > 0).all())


def test_one_empty_cluster_does_not_take_all_the_weight() -> None:
    # 1 / (n + 1e-10) gives the empty cluster 1e10.
    weights = cluster_weights(torch.tensor([100, 100, 0]))
    assert weights.tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"scheme": "inverse"}, [1, 1 / 4, 1 / 9]),
        ({"scheme": "power", "power": 0.5}, [1, 1 / 2, 1 / 3]),
        ({"scheme": "power", "power": 0.0}, [1, 1, 1]),
        ({"scheme": "power", "power": -1.0}, [1, 4, 9]),
        ({"scheme": "effective", "beta": 0.5}, [1, 1 / (2 - 2**-3), 1 / (2 - 2**-8)]),
        ({"scheme": "effective", "beta": 0.0}, [1, 1, 1]),
    ],
)
def test_weights_follow_their_formula(arguments: dict[str, Any], expected: list[float]) -> None:
    weights = cluster_weights(torch.tensor([1.0, 4, 9]).double(), normalize="none", **arguments)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_effective_weights_keep_their_digits_near_beta_one() -> None:
    beta, counts = 1 - 1e-10, torch.tensor([7.0, 3000.0]).double()
    exact = [(1 - decimal.Decimal(beta)) / (1 - decimal.Decimal(beta) ** int(n)) for n in counts]
    weights = cluster_weights(counts, scheme="effective", beta=beta, normalize="none")
    assert weights.tolist() == pytest.approx([float(weight) for weight in exact], rel=1e-12)


def test_cluster_mean_normalises_over_filled_clusters() -> None:
    weights = cluster_weights(torch.tensor([2, 8, 0]), normalize="cluster_mean")
    torch.testing.assert_close(weights, torch.tensor([1.6, 0.4, 0.0]))


def test_weights_come_back_as_the_kind_they_came() -> None:
    assert isinstance(cluster_weights(np.array([1, 2])), np.ndarray)
    assert cluster_weights(torch.tensor([1, 2])).dtype == torch.float32
    assert cluster_weights(torch.tensor([1.0, 2]).double()).dtype == torch.float64
    assert isinstance(balanced_quota(np.array([1, 2]), 2), np.ndarray)
    assert isinstance(cluster_members(np.array([1, 0]), 2)[0], np.ndarray)


def water_filling(counts: list[int], total: int) -> list[int]:
    """One unit at a time, always to the least filled cluster that has more, lowest index first."""
    quota = [0] * len(counts)
    for _ in range(total):
        open_ = [c for c, n in enumerate(counts) if quota[c] < n]
        quota[min(open_, key=lambda c: (quota[c], c))] += 1
    return quota


@given(counts=st.lists(st.integers(0, 12), min_size=1, max_size=8), share=st.floats(0, 1))
def test_balanced_quota_is_water_filling(counts: list[int], share: float) -> None:
    total = int(share * sum(counts))
    assert balanced_quota(torch.tensor(counts), total).tolist() == water_filling(counts, total)


@given(counts=count_lists, share=st.floats(0, 1))
def test_balanced_quota_sums_to_the_total(counts: list[int], share: float) -> None:
    n, total = torch.tensor(counts), int(share * sum(counts))
    quota = balanced_quota(n, total)
    assert int(quota.sum()) == total
    assert bool((quota <= n).all())
    cut = quota[quota < n]
    assert cut.numel() == 0 or int(quota.max() - cut.min()) <= 1


@given(labels=st.lists(st.integers(-3, 6), max_size=50), extra=st.integers(0, 3), piece=st.integers(1, 60))
def test_members_are_the_samples_of_each_cluster_in_order(labels: list[int], extra: int, piece: int) -> None:
    k, tensor = 7 + extra, torch.tensor(labels, dtype=torch.int64)
    whole, reference._LABELS_CHUNK = reference._LABELS_CHUNK, piece
    try:
        members, offsets = cluster_members(tensor, k)
    finally:
        reference._LABELS_CHUNK = whole
    assert (members.dtype, offsets.dtype) == (torch.int32, torch.int64)
    for c in range(k):
        assert members[offsets[c] : offsets[c + 1]].tolist() == [
            i for i, label in enumerate(labels) if label == c
        ]


def test_draw_weights_are_proportional_to_their_power() -> None:
    counts = torch.tensor([0, 1, 2, 50, 50, 10**9])
    for power in (-0.5, 0.3, 0.5, 1.7):
        weights = draw_weights(counts, power).double()
        exact = torch.where(counts > 0, counts.double() ** (1 - power), 0.0)
        torch.testing.assert_close(weights / weights.sum(), exact / exact.sum(), rtol=1e-3, atol=1e-11)
    assert draw_weights(counts, 1).tolist() == [0, 1, 1, 1, 1, 1]
    assert draw_weights(counts, 0).tolist() == counts.tolist()


def test_draw_weights_do_not_depend_on_the_decimal_context_of_the_caller() -> None:
    counts = torch.tensor([1, 7, 90])
    usual = draw_weights(counts, 0.3)
    with decimal.localcontext(decimal.Context(prec=3)):
        assert torch.equal(draw_weights(counts, 0.3), usual)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"counts": [0, 0]}, ValueError, ("counts", "above 0", "only zeros")),
        ({"counts": [1, -2]}, ValueError, ("counts", ">= 0", "-2")),
        ({"counts": torch.tensor([1.0, float("nan")])}, ValueError, ("counts", "finite", "1 NaN")),
        ({"counts": torch.ones(2, 2)}, ValueError, ("counts", "[K]", "[2, 2]")),
        ({"counts": torch.tensor([True])}, TypeError, ("counts", "bool")),
        ({"counts": "ab"}, TypeError, ("counts", "str")),
        ({"scheme": "log"}, ValueError, ("scheme", "'inverse'", "'log'")),
        ({"power": 0.5}, ValueError, ("power", "1 for scheme='inverse'", "0.5")),
        ({"scheme": "power", "power": float("inf")}, ValueError, ("power", "inf")),
        ({"scheme": "effective", "beta": 1.0}, ValueError, ("beta", "[0, 1)", "1.0")),
        ({"normalize": "sum"}, ValueError, ("normalize", "'sample_mean'", "'sum'")),
        ({"empty": "one"}, ValueError, ("empty", "'zero'", "'one'")),
        ({"counts": [1, 0], "empty": "error"}, ValueError, ("counts", "1 empty of 2", "repair")),
    ],
)
def test_bad_weights_are_named(
    arguments: dict[str, Any], error: type[Exception], parts: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        cluster_weights(**{"counts": [1, 2], **arguments})
    assert_message(caught.value, *parts)


@pytest.mark.parametrize(
    ("call", "error", "parts"),
    [
        (lambda: balanced_quota([1, 2], 4), ValueError, ("total", "sum of counts, 3", "4")),
        (lambda: balanced_quota([1, 2], -1), ValueError, ("total", "at least 0", "-1")),
        (lambda: balanced_quota([1.0, 2.0], 2), TypeError, ("counts", "integers", "float64")),
        (lambda: balanced_quota([], 0), ValueError, ("counts", "K >= 1", "[0]")),
        (lambda: cluster_members([0, 3], 3), ValueError, ("labels", "below k = 3", "3")),
        (lambda: cluster_members([0, 1], 0), ValueError, ("k", "at least 1", "0")),
        (lambda: cluster_members([0.5], 1), TypeError, ("labels", "integers", "float64")),
        (lambda: cluster_members([[0]], 1), ValueError, ("labels", "[N]", "[1, 1]", "argmax")),
    ],
)
def test_bad_quotas_and_members_are_named(call: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert_message(caught.value, *parts)
