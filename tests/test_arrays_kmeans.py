"""Arrays of other libraries go into k-means, and its results come back as their kind."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import generator
from torch import Tensor

from clustops.integrations.estimator import KMeans
from clustops.kmeans import cluster_means, kmeans, kmeans_assign, kmeans_plus_plus, repair_empty_clusters


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def steps(x: Any, to: Callable[[Tensor], Any]) -> list[Any]:
    """All results of k-means and its steps; ``to`` makes arguments of the kind of ``x``."""
    labels = torch.tensor([0, 2] * 15)
    start = normal(1, 4, 3)
    model = KMeans(4).fit(x).partial_fit(x, sample_weight=to(torch.ones(30)))
    return [
        *vars(kmeans(x, 4, init=to(start), weights=to(torch.rand(30, generator=generator(2))))).values(),
        *vars(kmeans(x, 4)).values(),
        *kmeans_assign(x, to(start), top=2),
        *cluster_means(x, to(labels), 4),
        kmeans_plus_plus(x, 4),
        *repair_empty_clusters(x, to(labels), to(start), to(torch.bincount(labels, minlength=4))),
        *(model.cluster_centers_, model.labels_, model.predict(x), model.transform(x)),
    ]


def assert_same(found: list[Any], x: Any, as_numpy: Callable[[Any], Any], tensor: Tensor) -> None:
    """Results of the kind of ``x`` with the values that the same tensor gives."""
    for got, expected in zip(found, steps(tensor, lambda t: t), strict=True):
        assert type(got) is type(x)
        np.testing.assert_array_equal(as_numpy(got), expected.numpy().astype(as_numpy(got).dtype))


# --- JAX


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["rows", "transposed", "reversed"])
@pytest.mark.filterwarnings("error")
def test_jax_arrays_give_jax_arrays(dtype: str, layout: str) -> None:
    jax = pytest.importorskip("jax")
    values = normal(0, 30, 3).to(getattr(torch, dtype))
    x = jax.numpy.asarray(values.float().numpy()).astype(dtype)
    if layout == "transposed":
        x = jax.numpy.asarray(x.T).T
    elif layout == "reversed":
        x = x[::-1][::-1]
    before = np.array(x)
    assert_same(steps(x, lambda t: jax.numpy.asarray(t.numpy())), x, np.asarray, values)
    np.testing.assert_array_equal(np.asarray(x), before)


def test_jax_holds_64_bits_where_it_is_told_to() -> None:
    jax = pytest.importorskip("jax")
    values = normal(0, 30, 3, dtype=torch.float64)
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        found = kmeans(jax.numpy.asarray(values.numpy()), 4)
    finally:
        jax.config.update("jax_enable_x64", before)
    assert (found.centroids.dtype, found.labels.dtype, found.inertia.dtype) == ("float64", "int64", "float64")
    np.testing.assert_array_equal(np.asarray(found.centroids), kmeans(values, 4).centroids.numpy())


def test_no_rows_of_jax() -> None:
    jax = pytest.importorskip("jax")
    labels, distances = kmeans_assign(jax.numpy.zeros((0, 3)), jax.numpy.ones((2, 3)))
    assert labels.shape == distances.shape == (0,)
    assert isinstance(labels, jax.Array)


# --- CuPy


def test_cupy_arrays_give_cupy_arrays() -> None:
    cupy = pytest.importorskip("cupy")
    values = normal(0, 30, 3)
    assert_same(
        steps(cupy.asarray(values.numpy()), lambda t: cupy.asarray(t.numpy())),
        cupy.empty(0),
        cupy.asnumpy,
        values,
    )


class Foreign:
    """An array that gives nothing but DLPack, like that of a library which torch does not know."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **options: Any) -> Any:
        return self._tensor.__dlpack__(stream=stream, max_version=max_version, **options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()


class Old(Foreign):
    """The same before DLPack 1.0."""

    def __dlpack__(self, stream: Any = None) -> Any:  # type: ignore[override]
        return self._tensor.__dlpack__(stream=stream)


@pytest.mark.parametrize("kind", [Foreign, Old])
def test_a_library_known_by_its_name_gets_arrays_of_its_own(
    kind: type[Foreign], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = types.ModuleType("cupy")
    library.from_dlpack = lambda array: kind(torch.from_dlpack(array))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", library)
    monkeypatch.setattr(kind, "__module__", "cupy._core.core")
    values = normal(0, 30, 3)
    wide = torch.zeros(30, 6)
    wide[:, ::2] = values
    for x in (kind(values), kind(wide[:, ::2])):
        assert_same(steps(x, kind), x, lambda array: array._tensor.numpy(), values)


@pytest.mark.parametrize("kind", [Foreign, Old])
def test_a_library_that_is_not_known_gets_tensors(kind: type[Foreign]) -> None:
    found = kmeans_assign(kind(normal(0, 30, 3)), normal(1, 4, 3))
    assert all(type(part) is Tensor for part in found)


# --- memory of the caller


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_results_share_no_memory_with_arguments(metric: str) -> None:
    x, start = normal(0, 30, 3).numpy(), np.eye(3, dtype=np.float32)
    labels, counts = np.zeros(30, dtype=np.int64), np.array([30, 0, 0])
    start.setflags(write=False)
    found = kmeans(x, 3, init=start, max_iter=0, empty="keep", metric=metric).centroids
    found[0] = 7
    for policy, k in (("keep", 3), ("split", 1), ("farthest", 1)):
        found = repair_empty_clusters(x, labels, start[:k], counts[:k], policy=policy)
        found[0][0] = found[1][0] = 7
    assert start.tolist() == np.eye(3).tolist()
    assert labels.tolist() == [0] * 30


def test_bfloat16_numpy_arrays_are_read_as_such() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = normal(0, 30, 3, dtype=torch.bfloat16)
    x = values.float().numpy().astype(ml_dtypes.bfloat16)
    for array in (x, np.asfortranarray(x), x[::-1][::-1]):
        found = kmeans(array, 4)
        assert isinstance(found.labels, np.ndarray)
        np.testing.assert_array_equal(found.centroids, kmeans(values, 4).centroids.numpy())
