"""Empty-cluster repair, one cluster after the other, and the rule of faiss as an oracle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .kmeans_ops import RELOCATE, SPLIT, accumulator, assign_l2, draw, squared_distances, unit_rows

STEP = 2.0**-5


class Step(NamedTuple):
    """The centroids after one iteration, and what was empty and repaired in it."""

    centroids: Tensor
    n_empty: int
    n_repaired: int


def repair_step(
    x: Tensor,
    w: Tensor,
    labels: Tensor,
    distances: Tensor,
    centroids: Tensor,
    empty: str,
    metric: str,
    key: tuple[int, int, int],
) -> Step:
    """Means of the clusters, with empty ones repaired by the policy ``empty``.

    Args:
        labels, distances: of the rows ``x [N, D]`` to ``centroids [K, D]``.
        key: seed, restart and iteration of the random numbers.
    """
    k = centroids.shape[0]
    n_empty = int((torch.bincount(labels, minlength=k) == 0).sum())
    moved = 0
    if empty in ("farthest", "random"):
        labels, moved = _relocated(labels, distances, empty, key, k)
    means = centroids.clone()
    for j in range(k):
        mine = labels == j
        if mine.any():
            mean = (w[mine].unsqueeze(1) * x[mine].double()).sum(0) / w[mine].sum()
            mean = mean.to(x.dtype)
            if metric == "cosine":
                mean = unit_rows(mean) if bool((mean != 0).any()) else centroids[j]
            means[j] = mean
    counts = torch.bincount(labels, minlength=k)
    if empty == "split":
        seed, restart, iteration = key
        uniform = draw(seed, SPLIT, restart, iteration, torch.arange(k))
        means, pairs = _split(x, labels, distances, means, counts, uniform)
        moved = len(pairs)
        means = unit_rows(means) if metric == "cosine" else means
    if empty == "faiss":
        means, counts, moved = faiss_split(means, counts, x.shape[0])
    return Step(means, n_empty, moved)


def _split(
    x: Tensor, labels: Tensor, distances: Tensor, means: Tensor, counts: Tensor, uniform: Tensor
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Each empty cluster draws a donor by ``count - 1``; a donor serves the first that drew it."""
    farthest: dict[int, int] = {}
    tickets = []
    for j in range(counts.numel()):
        if counts[j] > 1:
            members = (labels == j).nonzero().squeeze(1)
            farthest[j] = int(members[distances[members].argmax()])
        divisible = j in farthest and bool((x[farthest[j]] != means[j]).any())
        tickets.append(int(counts[j]) - 1 if divisible else 0)
    cumulative = torch.tensor(tickets).cumsum(0)
    total = int(cumulative[-1])
    result = means.clone()
    pairs: list[tuple[int, int]] = []
    for child in (counts == 0).nonzero().squeeze(1).tolist() if total else []:
        target = min(int(float(uniform[child]) * total), total - 1)
        donor = int((cumulative > target).nonzero()[0])
        if donor in [d for d, _ in pairs]:
            continue
        direction = x[farthest[donor]] - means[donor]
        up, down = means[donor] + STEP * direction, means[donor] - STEP * direction
        if bool((up == down).all()):
            up, down = means[donor] + direction, means[donor]
        result[child], result[donor] = up, down
        pairs.append((donor, child))
    return result, pairs


def _relocated(
    labels: Tensor, distances: Tensor, policy: str, key: tuple[int, int, int], k: int
) -> tuple[Tensor, int]:
    """Rows become the empty clusters: the farthest, or random ones; the nearest of each cluster stays."""
    labels = labels.clone()
    counts = torch.bincount(labels[labels >= 0], minlength=k)
    valid = labels >= 0
    score = distances
    if policy == "random":
        seed, restart, iteration = key
        score = draw(
            seed, RELOCATE, restart, iteration, valid.to(torch.int64).cumsum(0) - valid.to(torch.int64)
        )
    keepers = set()
    for j in range(k):
        members = (labels == j).nonzero().squeeze(1)
        if members.numel():
            nearest = members[distances[members] == distances[members].min()]
            keepers.add(int(nearest[-1]))
    order = score.sort(descending=True, stable=True).indices.tolist()
    takable = [i for i in order if i not in keepers and valid[i] and distances[i] > 0]
    empties = (counts == 0).nonzero().squeeze(1).tolist()
    pairs = list(zip(empties, takable, strict=False))
    for cluster, row in pairs:
        labels[row] = cluster
    return labels, len(pairs)


def settle(x: Tensor, centroids: Tensor) -> tuple[Tensor, int]:
    """Put empty clusters on the farthest rows, one of each cluster a round, while there are both."""
    centroids = centroids.clone()
    k, moved = centroids.shape[0], 0
    while True:
        labels, distances = (t[0, :, 0] for t in assign_l2(x.unsqueeze(0), centroids.unsqueeze(0), 1))
        counts = torch.bincount(labels, minlength=k)
        best = []
        for j in range(k):
            members = (labels == j).nonzero().squeeze(1)
            if counts[j] > 1 and distances[members].max() > 0:
                row = int(members[distances[members].argmax()])
                best.append((-float(distances[row]), j, row))
        pairs = list(zip((counts == 0).nonzero().squeeze(1).tolist(), sorted(best), strict=False))
        if not pairs:
            return centroids, moved
        for cluster, (_, _, row) in pairs:
            centroids[cluster] = x[row]
        moved += len(pairs)


def repair_empty_clusters(
    x: Tensor, labels: Tensor, centroids: Tensor, counts: Tensor, *, policy: str = "split", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``clustops.repair_empty_clusters``, one problem after the other.

    ``policy="faiss"`` is the rule of faiss: labels stay, counts come back as the floats that faiss keeps.
    """
    if x.ndim == 3:
        each = [
            repair_empty_clusters(*one, policy=policy, seed=seed)
            for one in zip(x, labels, centroids, counts, strict=True)
        ]
        a, b, c, d = zip(*each, strict=True)
        return torch.stack(a), torch.stack(b), torch.stack(c), torch.stack(d)
    x, centroids = x.to(accumulator(x.dtype)), centroids.to(accumulator(x.dtype))
    k = counts.numel()
    if policy == "keep":
        return labels, centroids, counts, torch.tensor(0)
    if policy == "faiss":
        centroids, h, moved = faiss_split(centroids, counts, x.shape[0])
        return labels, centroids, h, torch.tensor(moved)
    if policy == "split":
        return _split_rounds(x, labels, centroids, counts, seed)
    own = (x - centroids[labels.clamp(min=0)]).square().sum(-1)
    after, moved = _relocated(labels, own, policy, (seed, 0, 0), k)
    centroids = centroids.clone()
    for row in (after != labels).nonzero().squeeze(1).tolist():
        centroids[after[row]] = x[row]
    return after, centroids, torch.bincount(after[after >= 0], minlength=k), torch.tensor(moved)


def _split_rounds(
    x: Tensor, labels: Tensor, centroids: Tensor, counts: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k = counts.numel()
    empty = (counts == 0).sum()
    labels, centroids, counts = labels.clone(), centroids.clone(), counts.clone()
    for iteration in range(k):
        means = centroids.clone()
        for j in (counts > 0).nonzero().squeeze(1).tolist():
            means[j] = x[labels == j].double().mean(0).to(x.dtype)
        own = (x - means[labels.clamp(min=0)]).square().sum(-1)
        uniform = draw(seed, SPLIT, 0, iteration, torch.arange(k))
        halves, pairs = _split(x, labels, own, means, counts, uniform)
        for donor, child in pairs:
            centroids[donor], centroids[child] = halves[donor], halves[child]
            members = (labels == donor).nonzero().squeeze(1)
            to_donor, to_child = squared_distances(x[members], halves[[donor, child]]).unbind(1)
            nearer = (to_child < to_donor) | ((to_child == to_donor) & (child < donor))
            labels[members[nearer]] = child
        counts = torch.bincount(labels[labels >= 0], minlength=k)
    return labels, centroids, counts, empty - (counts == 0).sum()


def faiss_split(centroids: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """The rule of ``faiss::Clustering``, bit for bit; fp32 centroids.

    For each empty cluster in turn the others are scanned cyclically and one is taken with probability
    ``(h - 1) / (n - k)`` (mt19937 seeded 1234; after ``10 k`` refusals the largest). The centroid is copied,
    coordinates of the two are scaled by ``1 +- 1/1024`` alternately, and the count is halved.
    """
    c, h = centroids.clone().cpu().numpy(), counts.cpu().numpy().astype(np.float32)
    k, d = c.shape
    raw = np.random.RandomState(1234)._bit_generator
    sign = np.where(np.arange(d) % 2 == 0, np.float32(1), np.float32(-1)) * np.float32(1 / 1024)
    up, down = (np.float32(1) + sign).astype(c.dtype), (np.float32(1) - sign).astype(c.dtype)
    moved = 0
    for ci in range(k):
        if h[ci] != 0:
            continue
        cj = int(np.argmax(h))
        for tries in range(10 * k):
            p = (float(h[tries % k]) - 1.0) / float(np.float32(n - k)) if n > k else np.inf
            if np.float32(raw.random_raw()) / np.float32(2**32 - 1) < p:
                cj = tries % k
                break
        c[ci], c[cj] = c[cj] * up, c[cj] * down
        h[ci] = h[cj] / 2
        h[cj] -= h[ci]
        moved += 1
    return torch.from_numpy(c).to(centroids.device), torch.from_numpy(h).to(counts.device), moved
