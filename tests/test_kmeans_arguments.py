"""Bad input to the k-means functions: a message names the argument, the expected, the got and the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import assert_message

from clustops.kmeans import cluster_means, kmeans, kmeans_assign, kmeans_plus_plus, repair_empty_clusters

X = torch.arange(20.0).view(10, 2)
LABELS = torch.arange(10) % 3
COUNTS = torch.bincount(LABELS, minlength=3)
NAN = torch.full((10, 2), float("nan"))
INF = torch.where(X == 3, torch.inf, X)
Case = tuple[Callable[[], Any], type[Exception], tuple[str, ...]]


def of_rows(call: Callable[[Any], Any]) -> list[Case]:
    """What every function says of a bad ``x``."""
    return [
        (lambda: call("rows"), TypeError, ("x must be", "str", "convert")),
        (lambda: call(X.long()), TypeError, ("x must be float32", "torch.int64", "to float32")),
        (lambda: call(X[0]), ValueError, ("x must be [N, D] or [B, N, D]", "[2]", "reshape")),
        (lambda: call(X[:, :0]), ValueError, ("x must be", "[10, 0]", "skip")),
        (lambda: call(torch.empty(0, 10, 2)), ValueError, ("x must be", "[0, 10, 2]", "empty batch")),
        (lambda: call(X.to_sparse()), TypeError, ("x must be a dense tensor", "sparse_coo", "x.to_dense()")),
        (lambda: call(NAN), ValueError, ("x must be finite", "NaN", "remove or mask")),
        (lambda: call(INF), ValueError, ("x must be finite", "infinite", "remove or mask")),
    ]


def of_k(call: Callable[[Any], Any]) -> list[Case]:
    return [
        (lambda: call(0), ValueError, ("k must be at least 1", "got 0", "one cluster")),
        (lambda: call(2.5), TypeError, ("k must be an integer", "2.5", "one cluster")),
        (lambda: call(True), TypeError, ("k must be an integer", "True", "one cluster")),
    ]


def of_weights(call: Callable[[Any], Any]) -> list[Case]:
    return [
        (lambda: call(torch.ones(9)), ValueError, ("weights must be [10]", "[9]", "one weight a row")),
        (
            lambda: call(torch.ones(10).long()),
            TypeError,
            ("weights must be float32", "int64", "to float32"),
        ),
        (lambda: call(-torch.ones(10)), ValueError, ("weights must be at least 0", "-1.0", "drop rows")),
        (lambda: call(torch.zeros(10)), ValueError, ("weights must be above 0", "all 0", "a weight")),
        (lambda: call(NAN[:, 0]), ValueError, ("weights must be finite", "NaN", "remove")),
        (
            lambda: call(torch.ones(10, device="meta")),
            ValueError,
            ("weights must be on the device", "meta", "move"),
        ),
    ]


def of_centroids(name: str, call: Callable[[Any], Any]) -> list[Case]:
    return [
        (lambda: call(X[:3, :1]), ValueError, (f"{name} must be", "to fit x [10, 2]", "[3, 1]", "centroids")),
        (lambda: call(X[:3].unsqueeze(0)), ValueError, (f"{name} must be", "[1, 3, 2]", "centroids")),
        (lambda: call(X[:0]), ValueError, (f"{name} must be", "[0, 2]", "K >= 1")),
        (lambda: call(X[:3].long()), TypeError, (f"{name} must be float32", "int64", "to float32")),
        (lambda: call(NAN[:3]), ValueError, (f"{name} must be finite", "6 NaN", "remove")),
        (lambda: call(X[:3].to("meta")), ValueError, (f"{name} must be on the device of x", "meta", "move")),
    ]


def of_labels(call: Callable[[Any], Any]) -> list[Case]:
    return [
        (
            lambda: call(LABELS.float()),
            TypeError,
            ("labels must be an integer tensor", "float32", "to int64"),
        ),
        (lambda: call(LABELS[:4]), ValueError, ("labels must be [10]", "[4]", "one label a row")),
        (lambda: call(torch.eye(10)), ValueError, ("labels must be [10]", "[10, 10]", "labels.argmax(-1)")),
        (lambda: call(LABELS - 2), ValueError, ("labels must be in [0, 3)", "[-2, 0]", "count")),
        (lambda: call(LABELS + 1), ValueError, ("labels must be in [0, 3)", "[1, 3]", "count")),
        (lambda: call(LABELS.to("meta")), ValueError, ("labels must be on the device", "meta", "move")),
    ]


def seed_case(call: Callable[[Any], Any]) -> Case:
    return (lambda: call(0.5), TypeError, ("seed must be an integer", "0.5", "plain integer"))


def repair(
    labels: Any = LABELS, counts: Any = COUNTS, centroids: Any = X[:3], x: Any = X, **options: Any
) -> Any:
    return repair_empty_clusters(x, labels, centroids, counts, **options)


def option(name: str, value: object, error: type[Exception], *parts: str) -> Case:
    return (lambda: kmeans(X, 3, **{name: value}), error, (f"{name} must be", *parts))


CASES: dict[str, list[Case]] = {
    "kmeans": [
        *of_rows(lambda x: kmeans(x, 3)),
        *of_k(lambda k: kmeans(X, k)),
        *of_weights(lambda w: kmeans(X, 3, weights=w)),
        *of_centroids("init", lambda c: kmeans(X, 3, init=c)),
        (lambda: kmeans(X, 11), ValueError, ("k must be at most the number of rows, 10", "got 11", "fewer")),
        (
            lambda: kmeans(X[:0], 1),
            ValueError,
            ("k must be at most the number of rows, 0", "got 1", "more rows"),
        ),
        (lambda: kmeans(X, 4, init=X[:3]), ValueError, ("init must be [4, 2]", "[3, 2]", "centroids")),
        option("metric", "l1", ValueError, "'l2', 'cosine'", "'l1'", "pick"),
        option("init", "kmeans++", ValueError, "'k-means++', 'random'", "'kmeans++'", "pick"),
        option("empty", "drop", ValueError, "'split', 'farthest', 'random', 'keep'", "'drop'", "pick"),
        option("empty", "faiss", ValueError, "'faiss'", "pick"),
        option("precision", "tf32", ValueError, "'highest', 'high', 'medium'", "'tf32'", "pick"),
        option("n_init", 0, ValueError, "at least 1", "got 0", "one start"),
        option("max_iter", -1, ValueError, "at least 0", "got -1", "only assigns"),
        option("tol", -0.1, ValueError, "at least 0", "-0.1", "all iterations"),
        option("tol", float("nan"), ValueError, "finite", "nan", "all iterations"),
        option("tol", "small", TypeError, "a number", "str", "all iterations"),
        option("group", "world", ValueError, "torch.distributed", "str", "init_process_group"),
        option("lengths", torch.tensor([4]), ValueError, "None for one problem", "[1]", "for each problem"),
        seed_case(lambda s: kmeans(X, 3, seed=s)),
        (
            lambda: kmeans(X[None], 3, lengths=torch.tensor([2])),
            ValueError,
            ("lengths", "at least k = 3", "2", "few"),
        ),
        (
            lambda: kmeans(X[None], 3, lengths=torch.tensor([11])),
            ValueError,
            ("lengths", "[0, N = 10]", "11", "count"),
        ),
        (
            lambda: kmeans(X[None], 3, lengths=torch.ones(1)),
            TypeError,
            ("lengths", "integer", "float32", "to int64"),
        ),
        (lambda: kmeans(np.array(["a"]), 1), TypeError, ("x must be", "dtype <U1", "astype")),
    ],
    "kmeans_assign": [
        *of_rows(lambda x: kmeans_assign(x, X[:3])),
        *of_centroids("centroids", lambda c: kmeans_assign(X, c)),
        (lambda: kmeans_assign(X, X[:3], top=4), ValueError, ("top must be at most", "3", "got 4", "fewer")),
        (lambda: kmeans_assign(X, X[:3], top=0), ValueError, ("top must be at least 1", "got 0", "nearest")),
        (lambda: kmeans_assign(X, X[:3], metric="ip"), ValueError, ("metric must be one of", "'ip'", "pick")),
        (
            lambda: kmeans_assign(X, X[:3], precision="low"),
            ValueError,
            ("precision must be", "'low'", "pick"),
        ),
    ],
    "cluster_means": [
        *of_rows(lambda x: cluster_means(x, LABELS, 3)),
        *of_k(lambda k: cluster_means(X, LABELS, k)),
        *of_labels(lambda labels: cluster_means(X, labels, 3)),
        *[c for c in of_weights(lambda w: cluster_means(X, LABELS, 3, weights=w)) if "all 0" not in c[2]],
    ],
    "kmeans_plus_plus": [
        *of_rows(lambda x: kmeans_plus_plus(x, 3)),
        *of_k(lambda k: kmeans_plus_plus(X, k)),
        *of_weights(lambda w: kmeans_plus_plus(X, 3, weights=w)),
        (
            lambda: kmeans_plus_plus(X, 11),
            ValueError,
            ("k must be at most the number of rows, 10", "11", "fewer"),
        ),
        seed_case(lambda s: kmeans_plus_plus(X, 3, seed=s)),
    ],
    "repair_empty_clusters": [
        *of_rows(lambda x: repair(x=x)),
        *of_labels(lambda labels: repair(labels)),
        *of_centroids("centroids", lambda c: repair(centroids=c)),
        (lambda: repair(counts=COUNTS[:2]), ValueError, ("counts must be [3]", "[2]", "bincount")),
        (
            lambda: repair(counts=COUNTS + 1),
            ValueError,
            ("counts must be bincount(labels)", "other", "belong"),
        ),
        (
            lambda: repair(counts=COUNTS.float()),
            TypeError,
            ("counts must be an integer", "float32", "bincount"),
        ),
        (lambda: repair(policy="split it"), ValueError, ("policy must be one of", "'split it'", "pick")),
        seed_case(lambda s: repair(seed=s)),
    ],
}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{name}-{i}") for name, cases in CASES.items() for i, case in enumerate(cases)],
)
def test_bad_input_is_named_with_its_cure(case: Case) -> None:
    call, error, parts = case
    with pytest.raises(error) as raised:
        call()
    assert_message(raised.value, *parts)


def test_nan_in_a_weightless_row_is_ignored_and_gets_a_label_in_range() -> None:
    x = X.clone()
    x[4] = float("nan")
    weights = torch.ones(10)
    weights[4] = 0
    found = kmeans(x, 3, weights=weights)
    assert torch.isfinite(found.centroids).all()
    assert bool(torch.isfinite(found.inertia))
    assert 0 <= int(found.labels[4]) < 3
