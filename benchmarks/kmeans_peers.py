"""What k-means is compared with: plain PyTorch, faiss, scikit-learn and the GPU libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .case import Implementation, Inputs, Result, Run, Skip

CHUNK = {"cpu": 1 << 25, "cuda": 1 << 29}  # distances held at once


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance and index of each row's nearest centroid, ``x [b, n, d]``, in chunks of rows."""
    half_norms = centroids.square().sum(-1)[:, None] / 2
    rows = max(1, CHUNK[x.device.type] // (centroids.shape[0] * centroids.shape[1]))
    best = [torch.baddbmm(half_norms, part, centroids.mT, alpha=-1).min(-1) for part in x.split(rows, dim=1)]
    scores = torch.cat([part.values for part in best], 1)
    return (2 * scores + x.square().sum(-1)).clamp_(min=0), torch.cat([part.indices for part in best], 1)


def lloyd(x: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """Centroids after plain Lloyd iterations; an empty cluster keeps its centroid."""
    if x.dim() == 2:
        return lloyd(x[None], centroids[None], iterations)[0]
    b, k, d = centroids.shape
    first = torch.arange(b, device=x.device)[:, None] * k
    points = x.reshape(-1, d).to(torch.promote_types(x.dtype, torch.float32))
    for _ in range(iterations):
        slots = (nearest(x, centroids)[1] + first).flatten()
        sums = points.new_zeros(b * k, d).index_add_(0, slots, points)
        counts = slots.bincount(minlength=b * k)[:, None]
        means = torch.where(counts > 0, sums / counts, centroids.reshape(-1, d))
        centroids = means.view(b, k, d).to(x.dtype)
    return centroids


def _addmm(inputs: Inputs) -> Run:
    x, centroids = inputs["x"], inputs["centroids"]

    def run() -> Result:
        return (torch.addmm(centroids.square().sum(1) / 2, x, centroids.T, alpha=-1).argmin(1),)

    return run


def _cdist(inputs: Inputs) -> Run:
    return lambda: (torch.cdist(inputs["x"], inputs["centroids"]).argmin(1),)


def _faiss_flat(inputs: Inputs) -> Run:
    import faiss

    x, centroids = inputs["x"].numpy(), inputs["centroids"].numpy()
    index = faiss.IndexFlatL2(x.shape[1])
    index.add(centroids)
    return lambda: (torch.from_numpy(index.search(x, 1)[1][:, 0]),)


def _sklearn_argmin(inputs: Inputs) -> Run:
    from sklearn.metrics import pairwise_distances_argmin

    x, centroids = inputs["x"].numpy(), inputs["centroids"].numpy()
    return lambda: (torch.from_numpy(pairwise_distances_argmin(x, centroids)),)


def _fastkmeans_predict(inputs: Inputs) -> Run:
    from fastkmeans import FastKMeans

    x, centroids = inputs["x"].numpy(), inputs["centroids"].numpy()
    model = FastKMeans(x.shape[1], centroids.shape[0], gpu=False)
    model.centroids = centroids
    return lambda: (torch.from_numpy(model.predict(x)),)


def _torch_lloyd(inputs: Inputs) -> Run:
    return lambda: (lloyd(inputs["x"], inputs["centroids"], int(inputs["iterations"])),)


Problem = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any], int], np.ndarray[Any, Any]]


def _each_problem(solve: Problem) -> Callable[[Inputs], Run]:
    """``solve(x, start, iterations)`` for one problem after the other, as these libraries take one only."""

    def build(inputs: Inputs) -> Run:
        x, start = (inputs[name].float().cpu().numpy() for name in ("x", "centroids"))
        iterations = int(inputs["iterations"])
        d, k = x.shape[-1], start.shape[-2]
        problems = list(zip(x.reshape(-1, x.shape[-2], d), start.reshape(-1, k, d), strict=True))
        solve(*problems[0], 1)  # so that a missing or unfit library is known before the timing
        return lambda: (torch.from_numpy(np.stack([solve(*problem, iterations) for problem in problems])),)

    return build


def _faiss_kmeans(x: np.ndarray[Any, Any], start: np.ndarray[Any, Any], iterations: int) -> Any:
    import faiss

    # Without these limits it would train on 256 rows a centroid, and warn under 39.
    limits = {"max_points_per_centroid": len(x), "min_points_per_centroid": 1}
    model = faiss.Kmeans(x.shape[1], len(start), niter=iterations, **limits)
    model.train(x, init_centroids=start)
    return model.centroids


def _faiss_super(x: np.ndarray[Any, Any], start: np.ndarray[Any, Any], iterations: int) -> Any:
    import faiss

    if not hasattr(faiss, "SuperKmeans"):
        raise Skip("this faiss has no SuperKMeans")
    limits = {"max_points_per_centroid": len(x), "min_points_per_centroid": 1}
    model = faiss.SuperKmeans(x.shape[1], len(start), niter=iterations, **limits)
    model.train(x)  # draws its own first centroids: it takes none
    return model.centroids


def _sklearn_lloyd(x: np.ndarray[Any, Any], start: np.ndarray[Any, Any], iterations: int) -> Any:
    from sklearn.cluster import KMeans

    model = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
    return model.fit(x).cluster_centers_


def _fastkmeans(x: np.ndarray[Any, Any], start: np.ndarray[Any, Any], iterations: int) -> Any:
    from fastkmeans import FastKMeans

    model = FastKMeans(x.shape[1], len(start), niter=iterations, tol=-1, gpu=torch.cuda.is_available())
    model.train(x)  # random first centroids: it takes none
    return model.centroids


def _batched(inputs: Inputs) -> list[Tensor]:
    """``x`` and the first centroids with a problem dimension in front."""
    pair = (inputs["x"], inputs["centroids"])
    return [tensor if tensor.dim() == 3 else tensor[None] for tensor in pair]


def _flash_kmeans(inputs: Inputs) -> Run:
    from flash_kmeans import batch_kmeans_Euclid

    (x, start), iterations = _batched(inputs), int(inputs["iterations"])
    exact = {"max_iters": iterations, "tol": 0.0, "init_centroids": start}
    return lambda: (batch_kmeans_Euclid(x, start.shape[1], **exact)[1],)


def _flashlib(inputs: Inputs) -> Run:
    from flashlib import flash_kmeans

    (x, start), iterations = _batched(inputs), int(inputs["iterations"])
    exact = {"max_iters": iterations, "tol": 0.0, "init_centroids": start}
    return lambda: (flash_kmeans(x, start.shape[1], **exact)[1],)


def _cuml(inputs: Inputs) -> Run:
    from cuml.cluster import KMeans

    x, start = inputs["x"].float(), inputs["centroids"].float()
    if x.dim() == 3:
        raise Skip("cuML takes one problem at a time")
    model = KMeans(len(start), init=start, n_init=1, max_iter=int(inputs["iterations"]), tol=1e-30)
    return lambda: (torch.as_tensor(model.fit(x).cluster_centers_),)


def _sklearn_seeding(inputs: Inputs) -> Run:
    from sklearn.cluster import kmeans_plusplus

    x, k = inputs["x"].numpy(), int(inputs["k"])
    return lambda: (torch.from_numpy(kmeans_plusplus(x, k, random_state=0)[0]),)


ASSIGN = (
    Implementation("faiss IndexFlatL2", _faiss_flat),
    Implementation("torch addmm+argmin", _addmm),
    Implementation("torch cdist+argmin", _cdist),
    Implementation("scikit-learn distances_argmin", _sklearn_argmin),
    Implementation("fastkmeans predict", _fastkmeans_predict),
)
LLOYD = (
    Implementation("faiss Kmeans", _each_problem(_faiss_kmeans)),
    Implementation("faiss SuperKMeans", _each_problem(_faiss_super)),
    Implementation("scikit-learn lloyd", _each_problem(_sklearn_lloyd)),
    Implementation("fastkmeans", _each_problem(_fastkmeans)),
    Implementation("torch addmm+argmin+index_add", _torch_lloyd),
)
LLOYD_GPU = (
    Implementation("flash-kmeans", _flash_kmeans),
    Implementation("flashlib", _flashlib),
    Implementation("cuML", _cuml),
    Implementation("fastkmeans", _each_problem(_fastkmeans)),
    Implementation("torch addmm+argmin+index_add", _torch_lloyd),
)
SEEDING = (Implementation("scikit-learn kmeans_plusplus", _sklearn_seeding),)
