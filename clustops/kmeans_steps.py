"""The steps of k-means as functions of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import arrays
from . import kmeans_arguments as arguments
from .checks import check_choice, check_count, check_finite, check_same_device, reject, shape_of
from .kmeans_init import plus_plus
from .kmeans_repair import relocate, relocation_scores, split_rounds
from .kmeans_rows import Rows, counts_of
from .kmeans_source import Reader, Source
from .native import kmeans as _native  # noqa: F401  (registers the ops)
from .reference.kmeans_ops import unit_rows
from .reference.kmeans_split import replace


def kmeans_assign(
    x: Any, centroids: Any, *, metric: str = "l2", precision: str | None = None, top: int = 1
) -> tuple[Any, Any]:
    """The nearest centroids of each row and the squared distances to them.

    ``labels_n = argmin_k ||x_n - c_k||^2``, ties to the lowest index; ``"cosine"`` normalises rows and
    centroids first, where the squared distance is ``2 - 2 cos``. A label depends on nothing but its row and
    the centroids.

    Args:
        x: ``[N, D]`` or ``[B, N, D]``, fp32, fp64, bf16 or fp16; ``N`` may be 0. Also what ``kmeans`` reads
            by slices; it is used on the device of ``centroids``.
        centroids: ``[K, D]`` or ``[B, K, D]``.
        metric: ``"l2"`` or ``"cosine"``.
        precision: of the products on a GPU: ``"highest"``, fp32 (labels are those of exact distances but for
            fp32 rounding); ``"high"``, each operand in two bf16 parts, as good as TF32; ``"medium"``, bf16
            (labels may be those of centroids a little farther away); ``None`` follows
            ``torch.get_float32_matmul_precision()``. fp64 input, and everything on a CPU, is exact at each.
        top: how many of the nearest to return, in ``[1, K]``.

    Returns:
        labels int64 and distances, fp32 (fp64 for fp64 ``x``), ``[.., N]``, or ``[.., N, top]`` with the
        nearest first for ``top > 1``; the kind of array that ``x`` is. They carry no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above, or has a NaN or an infinity.

    Cost: ``N K D`` multiply-adds. Memory: the results and a copy of the centroids; ``"cosine"`` adds a
    normalised copy of ``x``.

    >>> kmeans_assign(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [5.0]]))
    (tensor([0, 1]), tensor([1., 1.]))

    Source: Lloyd 1982.
    """
    kind = arrays.like(x)
    rows = arguments.rows_of(x)
    centres = arguments.centroids_of(centroids, rows)
    arguments.check_metric(metric)
    arguments.check_precision(precision)
    check_count(top, "top", 1, "ask for the nearest centroid, 1, or more")
    if top > centres.shape[-2]:
        reject("top", f"at most the number of centroids, {centres.shape[-2]}", top, "ask for fewer")
    if metric == "cosine":
        centres = unit_rows(centres)
    if isinstance(rows, Reader):
        found = assign_chunks(Source(rows, metric=metric, device=centres.device), centres, top, precision)
    else:
        check_finite(rows, "x")
        check_same_device(centres, "centroids", rows, "x")
        found = torch.ops.clustops.kmeans_assign(
            arguments.batched(unit_rows(rows) if metric == "cosine" else rows, 3),
            arguments.batched(centres, 3),
            top,
            precision,
        )
    labels, distances = (_unbatched(t.squeeze(-1) if top == 1 else t, rows) for t in found)
    return kind(labels), kind(distances)


def assign_chunks(
    source: Source, centroids: Tensor, top: int, precision: str | None
) -> tuple[Tensor, Tensor]:
    """The op ``kmeans_assign`` chunk by chunk for one problem: labels and distances ``[1, N, top]``."""
    centroids = centroids.unsqueeze(0).to(source.device)
    parts = [
        torch.ops.clustops.kmeans_assign(chunk, centroids, top, precision)
        for _, chunk in source.checked_chunks(top)
    ]
    labels, distances = (torch.cat(list(found), dim=1) for found in zip(*parts, strict=True))
    return labels, distances


def cluster_means(x: Any, labels: Any, k: int, *, weights: Any = None) -> tuple[Any, Any]:
    """The mean of the rows of each label and the number of rows with it.

    ``means_k = sum_n w_n x_n / sum_n w_n`` over the rows with label ``k``; zeros where there is none of
    positive weight. Sums are the same bits in any order of the rows and more exact than fp32; counts are
    integers.

    Args:
        x: ``[N, D]`` or ``[B, N, D]``, fp32, fp64, bf16 or fp16; ``N`` may be 0. Also what ``kmeans`` reads
            by slices.
        labels: ``[.., N]`` integers in ``[0, k)``, or -1 for a row to leave out.
        k: number of clusters.
        weights: ``[.., N]``, at least 0.

    Returns:
        means ``[.., k, D]``, fp32 (fp64 for fp64 ``x``), and counts ``[.., k]`` int64, ``bincount(labels)``;
        the kind of array that ``x`` is. They carry no gradient.

    Raises:
        TypeError, ValueError: an argument is not as above, or has a NaN or an infinity.

    Cost: two passes over ``x``. Memory: O(k D).

    >>> cluster_means(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 2]), 3)
    (tensor([[1.],
            [0.],
            [5.]]), tensor([2, 0, 1]))

    Source: Lloyd 1982.
    """
    kind = arrays.like(x)
    rows = arguments.rows_of(x)
    check_count(k, "k", 1, "ask for one cluster or more")
    index = arguments.labels_of(labels, rows, k)
    given = arguments.weights_of(weights, rows, some=False)
    if given is None:
        given = torch.ones((), dtype=torch.float64, device=rows.device).expand(index.shape)
    check_same_device(given, "weights", rows, "x")
    index, given = arguments.batched(index, 2), arguments.batched(given.double(), 2)
    if isinstance(rows, Reader):
        found = _means_of_chunks(rows, index, given, k)
    else:
        check_finite(rows, "x")
        found = torch.ops.clustops.cluster_means(arguments.batched(rows, 3), index, given, k)
    means, counts = (_unbatched(t, rows) for t in found)
    return kind(means), kind(counts)


def _means_of_chunks(reader: Reader, labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = Rows(reader, weights, None)
    zeros = torch.zeros((1, k, rows.d), dtype=rows.dtype, device=rows.device)
    means, _ = torch.ops.clustops.kmeans_means(rows.sum_labels(labels, k), zeros)
    return means, counts_of(labels, k)


def kmeans_plus_plus(x: Any, k: int, *, weights: Any = None, seed: int = 0) -> Any:
    """``k`` rows of ``x`` to start k-means from, by greedy k-means++.

    The first is drawn with probability proportional to its weight. Each further step draws ``2 + log k`` rows
    with probability proportional to ``w_n min_c ||x_n - c||^2`` and keeps the one that leaves the lowest sum
    of these. With fewer than ``k`` distinct rows the first one fills up.

    Args:
        x: ``[N, D]`` or ``[B, N, D]``, fp32, fp64, bf16 or fp16. Also what ``kmeans`` reads by slices.
        k: in ``[1, N]``.
        weights: ``[.., N]``, at least 0; a row of weight 0 is never drawn.
        seed: of the draws; all problems of a batch use the same numbers, as single calls would.

    Returns:
        ``[.., k, D]``, fp32 (fp64 for fp64 ``x``), the kind of array that ``x`` is.

    Raises:
        TypeError, ValueError: an argument is not as above, or has a NaN or an infinity.

    Cost: ``N k D (2 + log k)`` multiply-adds; ``x`` is read about ``k`` times, ``2 k`` times where it comes
    in chunks. Memory: O(N + k D).

    >>> kmeans_plus_plus(torch.tensor([[0.0], [0.0], [9.0]]), 2).sort(0).values
    tensor([[0.],
            [9.]])

    Source: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007.
    """
    kind = arrays.like(x)
    data = arguments.rows_of(x)
    arguments.check_k(k, data.shape[-2])
    arguments.check_seed(seed)
    given = arguments.weights_of(weights, data)
    if given is not None:
        check_same_device(given, "weights", data, "x")
        given = arguments.batched(given, 2)
    rows = Rows(data, given, None)
    return kind(_unbatched(plus_plus(rows, k, seed=seed, restarts=1), data))


def repair_empty_clusters(
    x: Any, labels: Any, centroids: Any, counts: Any, *, policy: str = "split", seed: int = 0
) -> tuple[Any, Any, Any, Any]:
    """Labels, centroids and counts in which clusters that were empty have rows.

    ``"split"``: each empty cluster draws a donor with probability proportional to ``count - 1``. With ``m``
    the mean and ``f`` the farthest row of the donor, the donor moves to ``m - (f - m) / 32`` and the child to
    ``m + (f - m) / 32``, and the donor's rows go to the nearer of the two. A donor has one child a round and
    keeps a row; rounds go on until no cluster is empty or no cluster has two distinct rows.
    ``"farthest"``: the rows farthest from their centroids, the farthest first, become clusters of one row,
    never the last row of a cluster nor a row at distance 0. ``"random"``: the same with random rows.
    ``"keep"``: nothing.

    Args:
        x: ``[N, D]`` or ``[B, N, D]``, fp32, fp64, bf16 or fp16. Also what ``kmeans`` reads by slices.
        labels: ``[.., N]`` integers in ``[0, K)``, or -1 for a row to leave out.
        centroids: ``[.., K, D]``.
        counts: ``[.., K]`` integers, ``bincount(labels)``.
        policy: ``"split"``, ``"farthest"``, ``"random"`` or ``"keep"``.
        seed: of the draws.

    Returns:
        labels int64, centroids in fp32 (fp64 for fp64 ``x``), counts int64 and ``[..]`` int64 how many
        clusters were repaired; the kind of array that ``x`` is. Inputs are not written.

    Raises:
        TypeError, ValueError: an argument is not as above, or has a NaN or an infinity.

    Cost: a few passes over ``x`` for each round of ``"split"`` (rounds double the clusters a donor has
    become), one and a sort of the rows for the others. Memory: O(N + K D).

    >>> x = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
    >>> repair_empty_clusters(x, torch.tensor([0, 0]), torch.ones(2, 2), torch.tensor([2, 0]))[0]
    tensor([1, 0])

    Source: Caron et al., "Deep Clustering", ECCV 2018, section 3.3; ``"farthest"`` after scikit-learn.
    """
    kind = arrays.like(x)
    data = arguments.rows_of(x)
    check_choice(policy, "policy", arguments.POLICIES)
    arguments.check_seed(seed)
    centres = arguments.centroids_of(centroids, data)
    check_same_device(centres, "centroids", data, "x")
    k = centres.shape[-2]
    index = arguments.labels_of(labels, data, k)
    _check_counts(counts, index, k)
    index = arguments.batched(index, 2).clone()
    rows = Rows(data, (index >= 0).double(), None)
    centres = arguments.batched(centres, 3).to(rows.dtype, copy=True)
    present = rows.count(index, k)
    if policy == "keep":
        found = index, centres, present, torch.zeros_like(present[:, 0])
    elif policy == "split":
        found = split_rounds(rows, index, centres, present, seed)
    else:
        own = rows.own_distances(index, centres)
        score = relocation_scores(rows, own, policy, seed, 0)
        cluster, taken, index = relocate(rows, index, own, present, score)
        centres = replace(centres, cluster, rows.take(taken))
        found = index, centres, rows.count(index, k), (taken >= 0).sum(1)
    a, b, c, d = (kind(_unbatched(t, data)) for t in found)
    return a, b, c, d


def _check_counts(counts: Any, labels: Tensor, k: int) -> None:
    given = arrays.to_tensor(counts, "counts")
    if given.is_floating_point() or given.dtype == torch.bool:
        reject("counts", "an integer tensor", given.dtype, "pass torch.bincount of the labels", TypeError)
    expected = [*labels.shape[:-1], k]
    if list(given.shape) != expected:
        reject(
            "counts",
            f"{expected}, one for each centroid",
            shape_of(given),
            "pass torch.bincount of the labels",
        )
    check_same_device(given, "counts", labels, "labels")
    if given.device.type == "cpu" and not torch.equal(
        given.to(torch.int64), counts_of(arguments.batched(labels, 2), k).view(given.shape)
    ):
        reject("counts", "bincount(labels)", "other numbers", "pass the counts that belong to these labels")


def _unbatched(tensor: Tensor, like: Tensor | Reader) -> Tensor:
    return tensor if like.ndim == 3 else tensor.squeeze(0)
