"""Batched k-means."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import arrays
from . import kmeans_arguments as arguments
from .checks import ClustopsWarning, check_choice, check_count, check_device, check_same_device, reject
from .distributed import Group, check_group, rank
from .kmeans_init import plus_plus, random_rows
from .kmeans_lloyd import Fit, Report, expand_tolerance, leading, lloyd
from .kmeans_repair import Settled, settle
from .kmeans_rows import Rows
from .kmeans_source import Reader, bar
from .kmeans_steps import cluster_means, kmeans_assign, kmeans_plus_plus, repair_empty_clusters
from .reference.kmeans import KMeansProgress, KMeansResult
from .reference.kmeans_ops import unit_rows

__all__ = [
    "KMeansProgress",
    "KMeansResult",
    "cluster_means",
    "kmeans",
    "kmeans_assign",
    "kmeans_plus_plus",
    "repair_empty_clusters",
]

# A captured graph cannot ask whether a cluster is empty: it makes this many rounds of final repair.
_CAPTURED_ROUNDS = 2


def kmeans(
    x: Any,
    k: int,
    *,
    weights: Any = None,
    lengths: Any = None,
    metric: str = "l2",
    init: Any = "k-means++",
    n_init: int = 1,
    max_iter: int = 25,
    tol: float = 1e-4,
    empty: str = "split",
    precision: str | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    group: Group = None,
    callback: Callable[[KMeansProgress], None] | None = None,
    progress: bool = False,
) -> KMeansResult:
    """Centroids, and the nearest of them for each row, for one or many problems at once.

    Lloyd's iteration ``labels_n = argmin_k ||x_n - c_k||^2``, ``c_k = sum_n w_n x_n / sum_n w_n`` over the
    rows of cluster ``k``, then a last assignment: labels, counts and inertia belong to the centroids
    returned. Unless ``empty="keep"``, no cluster is empty if the problem has ``k`` distinct rows.

    Args:
        x: ``[N, D]`` or ``[B, N, D]`` (B independent problems), fp32, fp64, bf16 or fp16. A tensor, a NumPy
            array, a DLPack array; or rows that need not fit in memory: a memory map, or any object with
            ``shape`` ``[N, D]`` and ``dtype`` that gives rows as an array in host memory for
            ``x[start:stop]`` (an HDF5 data set, a class around files). Slices are asked for one at a time,
            inside ``[0, N)``, those of a pass by a thread that reads one chunk ahead.
        k: number of clusters, in ``[1, N]``.
        weights: ``[.., N]``, at least 0. A row of weight 0 gets a label and counts nowhere else: a cluster of
            only such rows is empty.
        lengths: ``[B]`` integers: problem b has ``lengths[b]`` rows, what follows them is ignored.
        metric: ``"l2"``, or ``"cosine"``: rows and centroids are normalised, a zero row stays zero.
        init: ``"k-means++"`` (greedy: best of ``2 + log k`` draws each step), ``"random"`` (distinct rows),
            or centroids ``[.., k, D]`` to start from.
        n_init: restarts; for each problem the one with the lowest inertia is returned. Centroids to start
            from are one start.
        max_iter: at least 0.
        tol: a problem has converged when the squared shifts of its centroids sum to at most ``tol`` times the
            mean variance of its features, and moves no more. 0 runs ``max_iter`` iterations.
        empty: once per iteration an empty cluster becomes, by ``"split"``, the half of another one drawn with
            probability ``count - 1``; by ``"farthest"``, the row farthest from its centroid; by ``"random"``,
            a random row; ``"keep"`` leaves its old centroid. After the last iteration, except for ``"keep"``,
            the farthest rows become centroids until no cluster is empty.
        precision: of the products on a GPU: ``"highest"``, fp32 (labels are those of exact distances but for
            fp32 rounding); ``"high"``, each operand in two bf16 parts, as good as TF32; ``"medium"``, bf16
            (labels may be those of centroids a little farther away); ``None`` follows
            ``torch.get_float32_matmul_precision()``. fp64 input, and everything on a CPU, is exact at each.
        seed: of all random draws.
        device: where to compute; default: where ``x`` lies. Chunks of ``x`` move there, never all of it.
        group: process group over which the rows are sharded: ``x``, ``weights``, ``lengths`` and the labels
            returned are those of this rank, which may have no row. Ranks agree on the other arguments.
        callback: called after each iteration with a ``KMeansProgress``, of the restart with the lowest
            inertia.
        progress: show a tqdm bar of the iterations, and one for each pass over chunks that is long.

    Returns:
        ``KMeansResult`` of the kind of array that ``x`` is (tensors where that is no array), on ``device``.

    Raises:
        TypeError, ValueError: an argument is not as above, or ``x`` has a NaN or an infinity.
        ImportError: ``progress`` without tqdm.

    Warns:
        ClustopsWarning: fewer distinct rows than ``k``; exactly the surplus is empty.

    Determinism: one seed gives one result: bit for bit for any chunking, number of threads and number of
    ranks, and for a problem alone or in a batch.

    Cost: ``N K D`` multiply-adds an iteration, and about ``log(k)`` such to start with k-means++, which reads
    ``x`` about ``k`` times, ``2 k`` times where it comes in chunks. An iteration sums up only rows whose
    label changed, and on a CPU those are not computed that would repeat the one before. Memory beside ``x``:
    O(N + K D), times ``n_init``, and a few chunks (of 2^22 numbers where slices are read). With ``tol=0``
    iterations on a GPU do not wait for the host; the check for empty clusters at the end does, except while a
    CUDA graph is captured, where two rounds of repair replace it.

    >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    >>> result = kmeans(x, 2)
    >>> result.centroids.flatten().sort().values, result.counts, result.inertia
    (tensor([ 0.5000, 10.5000]), tensor([2, 2]), tensor(1., dtype=torch.float64))

    Source: Lloyd 1982; Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", SODA 2007;
    splitting of empty clusters after Caron et al., "Deep Clustering", ECCV 2018, section 3.3.
    """
    kind = arrays.like(x)
    data = arguments.rows_of(x)
    _check_options(k, metric, init, n_init, max_iter, tol, empty, precision, seed, group)
    start = None if isinstance(init, str) else arguments.centroids_of(init, data, "init", k)
    rows = _rows(data, k, weights, lengths, start, metric, precision, device, group, progress)
    restarts = n_init if start is None else 1
    if start is not None:
        centroids = arguments.batched(start, 3).to(rows.device, rows.dtype, copy=True)
    else:
        centroids = (plus_plus if init == "k-means++" else random_rows)(rows, k, seed=seed, restarts=restarts)
    if metric == "cosine":
        centroids = unit_rows(centroids)

    capturing = rows.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with _Reports(rows, data.ndim == 2, kind, callback, progress, max_iter) as report:
        fit = lloyd(
            rows,
            centroids,
            max_iter=max_iter,
            tolerance=expand_tolerance(rows, tol, restarts),
            empty=empty,
            seed=seed,
            look=not capturing and (rows.device.type != "cuda" or tol > 0),
            report=report,
        )
    rounds = 0 if empty == "keep" else _CAPTURED_ROUNDS if capturing else k
    settled = settle(rows, fit.centroids, rounds=rounds, look=not capturing)
    best = _best(rows, fit, settled)
    if empty != "keep" and not capturing:
        _warn_of_surplus(best.n_empty, k)
    return KMeansResult(*(kind(t.squeeze(0) if data.ndim == 2 else t) for t in vars(best).values()))


def _rows(
    data: Tensor | Reader,
    k: int,
    weights: Any,
    lengths: Any,
    start: Tensor | None,
    metric: str,
    precision: str | None,
    device: torch.device | str | None,
    group: Group,
    progress: bool,
) -> Rows:
    weights = arguments.weights_of(weights, data, group)
    lengths = arguments.lengths_of(lengths, data, k, group)
    if device is None:
        for name, given in (("weights", weights), ("lengths", lengths), ("init", start)):
            if given is not None:
                check_same_device(given, name, data, "x")
    else:
        check_device(device, "device")
    rows = Rows(
        data,
        None if weights is None else arguments.batched(weights, 2),
        lengths,
        metric=metric,
        precision=precision,
        device=None if device is None else torch.device(device),
        group=group,
        progress=progress and rank(group) == 0,
    )
    arguments.check_k(k, rows.n_total)
    return rows


def _best(rows: Rows, fit: Fit, settled: Settled) -> KMeansResult:
    """The restart of each problem with the lowest inertia."""
    inertia = rows.total(settled.distances)
    restarts = rows.copies(inertia)
    first = restarts * torch.arange(rows.batch, device=rows.device)
    best = inertia.view(-1, restarts).argmin(1) + first

    def of_best(entries: Tensor) -> Tensor:
        return entries if restarts == 1 else entries[best]

    labels = rows.outside(of_best(settled.labels), -1)
    return KMeansResult(
        centroids=of_best(settled.centroids),
        labels=labels,
        counts=rows.count(labels, settled.centroids.shape[1], weighted=False),
        inertia=of_best(inertia),
        n_iter=of_best(fit.n_iter),
        converged=of_best(fit.converged),
        n_repaired=of_best(fit.n_repaired + settled.n_repaired),
        n_empty=(of_best(settled.counts) == 0).sum(1),
    )


def _check_options(
    k: int,
    metric: str,
    init: Any,
    n_init: int,
    max_iter: int,
    tol: float,
    empty: str,
    precision: str | None,
    seed: int,
    group: Group,
) -> None:
    check_count(k, "k", 1, "ask for one cluster or more")
    arguments.check_metric(metric)
    if isinstance(init, str):
        check_choice(init, "init", arguments.INITS)
    check_count(n_init, "n_init", 1, "ask for one start or more")
    check_count(max_iter, "max_iter", 0, "0 only assigns to the start")
    if isinstance(tol, bool) or not isinstance(tol, (int, float)):
        reject("tol", "a number of at least 0", type(tol).__name__, "0 runs all iterations", TypeError)
    if not 0 <= tol < float("inf"):
        reject("tol", "finite and at least 0", tol, "0 runs all iterations")
    check_choice(empty, "empty", arguments.POLICIES)
    arguments.check_precision(precision)
    arguments.check_seed(seed)
    check_group(group)


def _warn_of_surplus(n_empty: Tensor, k: int) -> None:
    short = n_empty > 0
    if not bool(short.any()):
        return
    problem = int(short.int().argmax())
    distinct = k - int(n_empty[problem])
    name = (
        "x" if n_empty.numel() == 1 else f"problem {problem} of x, the first of {int(short.sum())} like it,"
    )
    warnings.warn(
        f"{name} has {distinct} distinct rows for k = {k}: {k - distinct} clusters stay empty; "
        f"ask for fewer clusters",
        ClustopsWarning,
        stacklevel=3,
    )


class _Reports:
    """Brings each iteration to the callback and the bar."""

    def __init__(
        self,
        rows: Rows,
        single: bool,
        kind: Callable[[Tensor], Any],
        callback: Callable[[KMeansProgress], None] | None,
        progress: bool,
        max_iter: int,
    ) -> None:
        self.rows, self.single, self.kind, self.callback = rows, single, kind, callback
        self.bar = bar(None, "k-means", max_iter) if progress and rank(rows.group) == 0 else None
        self.wanted = callback is not None or progress

    def __enter__(self) -> Report | None:
        return self._report if self.wanted else None

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _report(self, entries: KMeansProgress) -> None:
        best = leading(entries, self.rows.batch)
        if self.bar is not None:
            self.bar.set_postfix(inertia=f"{float(best.inertia.mean()):.6g}", refresh=False)
            self.bar.update()
        if self.callback is not None:
            values = (best.inertia, best.shift, best.n_empty, best.n_repaired)
            self.callback(
                KMeansProgress(
                    best.iteration, *(self.kind(t.squeeze(0) if self.single else t) for t in values)
                )
            )
