"""How well clusters agree with classes or with other clusters, and how even they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arrays import to_tensor
from .checks import check_choice, check_same_device, reject, shape_of
from .sampler_weights import check_counts, check_labels

_MEANS = ("arithmetic", "geometric", "min", "max")
_DENSE = 1 << 16  # pairs of clusters that are always counted in a table


class ClusterSizes(NamedTuple):
    """What ``cluster_sizes`` returns; minimum, median, maximum and mean are over all K, empty ones too."""

    minimum: int
    median: float
    maximum: int
    mean: float
    empty: int
    effective: float


def nmi(a: Any, b: Any, *, average: str = "arithmetic") -> float:
    r"""Normalised mutual information of two labelings, in [0, 1]; 1 where one renames the other.

    :math:`I(a; b) / \operatorname{mean}(H(a), H(b))`; 1 where both put all samples in one cluster.

    Args:
        a, b: ``[N]`` integers >= 0, N >= 1; tensors on one device, NumPy or DLPack arrays.
        average: the mean of the two entropies: "arithmetic", "geometric", "min" or "max".

    Returns:
        A float, computed in fp64.

    Raises:
        TypeError, ValueError: the labels differ in length or device, or an argument is out of its range.

    Cost: a pass over N labels, or sorts of them where there are more than N pairs of clusters; memory O(N).

    Example:
        >>> nmi(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0]))
        1.0

    Source: Strehl and Ghosh, "Cluster ensembles", JMLR 2002.
    """
    check_choice(average, "average", _MEANS)
    rows, columns, cells = _contingency(a, b)
    if rows.numel() == columns.numel() == 1:
        return 1.0
    h_a, h_b, joint = _entropies(rows, columns, cells[2])
    information = max(h_a + h_b - joint, 0.0)
    means = {
        "arithmetic": (h_a + h_b) / 2,
        "geometric": (h_a * h_b) ** 0.5,
        "min": min(h_a, h_b),
        "max": max(h_a, h_b),
    }
    return min(information / means[average], 1.0) if means[average] > 0 else 0.0


def ari(a: Any, b: Any) -> float:
    r"""Adjusted Rand index of two labelings: 1 where one renames the other, about 0 by chance, at least -0.5.

    :math:`(S - E) / (\tfrac12 (A + B) - E)` with the number of pairs of samples that share a cluster in both
    (S), in a (A), in b (B), and :math:`E = A B / \binom N2`.

    Args:
        a, b: ``[N]`` integers >= 0, N >= 1; tensors on one device, NumPy or DLPack arrays.

    Returns:
        A float; pairs are counted in integers, without rounding.

    Raises:
        TypeError, ValueError: the labels differ in length or device, or are not ``[N]`` integers >= 0.

    Cost: a pass over N labels, or sorts of them where there are more than N pairs of clusters; memory O(N).

    Example:
        >>> ari(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2]))
        0.5714285714285714

    Source: Hubert and Arabie, "Comparing partitions", 1985.
    """
    rows, columns, cells = _contingency(a, b)
    both, in_a, in_b, pairs = _pairs(cells[2], rows, columns, rows.sum(0, keepdim=True))
    # All multiplied by 2 * pairs: whole numbers up to the one division.
    top, bottom = 2 * (both * pairs - in_a * in_b), (in_a + in_b) * pairs - 2 * in_a * in_b
    return top / bottom if bottom else 1.0


def purity(clusters: Any, classes: Any) -> float:
    r"""Share of samples whose class is the most frequent one of their cluster, in (0, 1].

    :math:`\frac1N \sum_k \max_c n_{kc}`. It grows with the number of clusters: 1 with one cluster per sample.

    Args:
        clusters, classes: ``[N]`` integers >= 0, N >= 1; tensors on one device, NumPy or DLPack arrays.

    Returns:
        A float.

    Raises:
        TypeError, ValueError: the labels differ in length or device, or are not ``[N]`` integers >= 0.

    Cost: a pass over N labels, or sorts of them where there are more than N pairs of clusters; memory O(N).

    Example:
        >>> purity(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 7, 7]))
        0.75
    """
    rows, columns, (row, _, count) = _contingency(clusters, classes, ("clusters", "classes"))
    largest = torch.zeros_like(rows).scatter_reduce_(0, row, count, "amax")
    right, n = torch.stack([largest.sum(), columns.sum()]).tolist()
    return float(right / n)


def hungarian_accuracy(clusters: Any, classes: Any) -> float:
    """Accuracy under the best one-to-one matching of clusters and classes, in (0, 1].

    Where their numbers differ, the clusters or classes left over count as wrong.

    Args:
        clusters, classes: ``[N]`` integers >= 0, N >= 1; tensors on one device, NumPy or DLPack arrays.

    Returns:
        A float.

    Raises:
        TypeError, ValueError: the labels differ in length or device, or are not ``[N]`` integers >= 0.

    Cost: O(s^2 t) time at most for the s of the smaller and t of the larger side, on the CPU; O(s t) memory.

    Example:
        >>> hungarian_accuracy(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 1, 0, 0, 0]))
        0.8

    Source: Kuhn, "The Hungarian method", 1955; shortest augmenting paths as in Jonker and Volgenant, 1987.
    """
    rows, columns, (row, column, count) = _contingency(clusters, classes, ("clusters", "classes"))
    table = torch.zeros(rows.numel(), columns.numel(), dtype=torch.int64, device=rows.device)
    table[row, column] = count
    table = table if rows.numel() <= columns.numel() else table.T
    agreement = table.cpu().numpy()
    match = _assignment(agreement.max() - agreement)
    return int(agreement[np.arange(len(match)), match].sum()) / int(rows.sum())


def effective_clusters(counts: Any) -> float:
    r"""Effective number of clusters: the exponential of the entropy of their sizes, in [1, K].

    :math:`\exp(-\sum_k p_k \log p_k)`, :math:`p_k = n_k / \sum n`: K for K even clusters, 1 if one holds all.

    Args:
        counts: ``[K]`` samples of each cluster, >= 0 and not all 0; integers or floating point.

    Returns:
        A float, computed in fp64.

    Raises:
        TypeError, ValueError: ``counts`` is not as above.

    Cost: O(K).

    Example:
        >>> round(effective_clusters(torch.tensor([5, 5, 0])), 6)
        2.0
    """
    counts = check_counts(counts, "counts")
    if not bool((counts > 0).any()):
        reject("counts", "above 0 for one cluster at least", "only zeros", "count the labels again")
    return float(np.exp(_entropies(counts)[0]))


def cluster_sizes(counts: Any) -> ClusterSizes:
    """Minimum, median, maximum and mean cluster size, number of empty clusters, effective number of clusters.

    Args:
        counts: ``[K]`` integers >= 0, not all 0: ``torch.bincount(labels, minlength=k)``.

    Returns:
        ``ClusterSizes``; the median of an even K is the mean of the middle two.

    Raises:
        TypeError, ValueError: ``counts`` is not as above.

    Cost: a sort of K numbers.

    Example:
        >>> cluster_sizes(torch.tensor([4, 0, 4]))[:5]
        (0, 4.0, 4, 2.6666666666666665, 1)
    """
    sizes = check_counts(counts, "counts")
    if sizes.is_floating_point():
        reject(
            "counts", "integers", sizes.dtype, "count samples: torch.bincount(labels, minlength=k)", TypeError
        )
    effective = effective_clusters(sizes)
    ordered = torch.sort(sizes.long()).values
    k = ordered.numel()
    middle = ordered[(k - 1) // 2] + ordered[k // 2]
    least, two_medians, most, whole, empty = torch.stack(
        [ordered[0], middle, ordered[-1], ordered.sum(), (ordered == 0).sum()]
    ).tolist()
    return ClusterSizes(least, two_medians / 2, most, whole / k, empty, effective)


def _contingency(
    a: Any, b: Any, names: tuple[str, str] = ("a", "b")
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Sizes of the clusters of a and of b, and (row, column, count) of the pairs that occur."""
    one, two = _labels(a, names[0]), _labels(b, names[1])
    if one.shape != two.shape:
        expected = f"[N] with N = {names[0]}.shape[0] = {one.shape[0]}"
        reject(names[1], expected, shape_of(two), "pass two labels of each sample")
    check_same_device(two, names[1], one, names[0])
    low, high, low_two, high_two = torch.stack([*one.aminmax(), *two.aminmax()]).tolist()
    for least, name in ((low, names[0]), (low_two, names[1])):
        if least < 0:
            reject(name, ">= 0", least, "select the samples with a label first, in both arguments")
    if (high + 1) * (high_two + 1) > max(_DENSE, one.numel()):
        return _sorted_contingency(one, two)
    table = (one * (high_two + 1) + two).bincount(minlength=(high + 1) * (high_two + 1))
    table = table.view(high + 1, high_two + 1)
    table = table[table.any(1)][:, table.any(0)]
    row, column = table.nonzero(as_tuple=True)
    return table.sum(1), table.sum(0), (row, column, table[row, column])


def _sorted_contingency(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The same where a table of all pairs would be larger than the labels."""
    _, row, rows = one.unique(return_inverse=True, return_counts=True)
    _, column, columns = two.unique(return_inverse=True, return_counts=True)
    width = columns.numel()
    cell, count = (row * width + column).unique(return_counts=True)
    return rows, columns, (cell // width, cell % width, count)


def _labels(labels: Any, name: str) -> Tensor:
    tensor = check_labels(to_tensor(labels, name), name).long()
    if tensor.numel() == 0:
        reject(name, "[N] with N >= 1", shape_of(tensor), "pass one label per sample")
    return tensor


def _entropies(*counts: Tensor) -> list[float]:
    each = [torch.special.entr(n.double() / n.sum()).sum() for n in counts]
    entropies: list[float] = torch.stack(each).tolist()
    return [max(entropy, 0.0) for entropy in entropies]


def _pairs(*counts: Tensor) -> list[int]:
    # Below 2^63, as N is below 2^32.
    pairs: list[int] = torch.stack([(n * (n - 1) // 2).sum() for n in counts]).tolist()
    return pairs


def _assignment(cost: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Column of each row in the cheapest matching; ``cost`` is ``[s, t]`` integers, s <= t.

    Rows enter one by one; each finds the cheapest path over tight edges to a free column, and the potentials
    follow (Dijkstra on reduced costs, all columns at one distance in one step: counts have many ties).
    """
    s, t = cost.shape
    u, v = np.zeros(s, dtype=np.int64), np.zeros(t, dtype=np.int64)
    owner, match = np.full(t, -1), np.full(s, -1)
    for entering in range(s):
        distance, before = np.full(t, np.iinfo(np.int64).max), np.full(t, entering)
        done, rows, reach = np.zeros(t, dtype=bool), np.array([entering]), 0
        while True:
            reduced = cost[rows] - u[rows, None] - v + reach
            nearest = reduced.argmin(0)
            length = reduced[nearest, np.arange(t)]
            nearer = ~done & (length < distance)
            distance[nearer], before[nearer] = length[nearer], rows[nearest[nearer]]
            reach = distance[~done].min()
            columns = np.nonzero(~done & (distance == reach))[0]
            free = columns[owner[columns] < 0]
            if len(free):
                break
            done[columns], rows = True, owner[columns]
        slack = reach - distance[done]
        u[entering] += reach
        u[owner[done]] += slack
        v[done] -= slack
        column, row = free[0], -1
        while row != entering:
            row = before[column]
            owner[column], match[row], column = row, column, match[row]
    return match
