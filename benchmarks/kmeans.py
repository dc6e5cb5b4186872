"""k-means: assignment, Lloyd iterations (one problem, many at once), greedy seeding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import kmeans_peers as peers
from .case import OURS, Case, Implementation, Inputs, Result, Run, Skip, Target, Work, both

Data = Callable[[torch.Generator, tuple[int, ...]], Tensor]

PATCH = 8
PIXELS = 3 * PATCH**2
SAMPLED = 16384  # rows of each problem that the fp64 comparison looks at

ASSIGN_GAUSSIAN = {"faiss IndexFlatL2": Target(2.2, 1.2), "torch addmm+argmin": Target(2.5, 1.4)}
ASSIGN_PATCHES = {"faiss IndexFlatL2": Target(4.5, None)}
MANY = {"scikit-learn lloyd": Target(3.0, None)}


def cases(suite: str) -> list[Case]:
    """The shapes of one suite."""
    if suite == "quick":
        return [
            assign("Gaussian", gaussian, 20_000, 64, 200),
            lloyd("mixture", mixture, 10_000, 64, 100, iterations=3),
            lloyd("many Gaussian", gaussian, 256, 64, 16, b=8, iterations=3),
            seeding(10_000, 32, 16),
        ]
    if suite == "cpu":
        return [
            assign("Gaussian", gaussian, 100_000, 128, 1000, ASSIGN_GAUSSIAN),
            assign("image patches", patches, 100_000, PIXELS, 1000, ASSIGN_PATCHES),
            lloyd("mixture", mixture, 100_000, 128, 1000, targets=_lloyd_targets(2.3, 3.3, 3.0)),
            lloyd("image patches", patches, 100_000, PIXELS, 1000, targets=_lloyd_targets(4.5, 5.0, 3.3)),
            lloyd("Gaussian", gaussian, 50_000, 256, 2500, targets=_lloyd_targets(2.2, 3.0, 9.0)),
            lloyd("many Gaussian", gaussian, 2048, 64, 64, b=64, iterations=20, targets=MANY),
            seeding(100_000, 128, 64, {"scikit-learn kmeans_plusplus": both(7.0)}),
        ]
    if suite == "big":
        return []
    return [
        on_gpu("A bf16, mixture", mixture, 1_281_167, 256, 10_000, ms=11),
        on_gpu("A fp32, mixture", mixture, 1_281_167, 256, 10_000, ms=35, dtype=torch.float32),
        on_gpu("B batched, Gaussian", gaussian, 65_536, 128, 1024, b=32, ms=1.2),
        on_gpu("C small K, mixture", mixture, 10_000_000, 128, 64, ms=0.9),
        on_gpu("E tiny, Gaussian", gaussian, 8192, 128, 1024, iterations=20, ms=0.015),
        on_gpu("F many tiny, Gaussian", gaussian, 256, 64, 32, b=4096, iterations=20, ms=0.005),
        on_gpu("D large K, Gaussian", gaussian, 6_553_600, 128, 65_536, iterations=2, ms=190),
    ]


def assign(
    name: str, data: Data, n: int, d: int, k: int, targets: Mapping[str, Target] | None = None
) -> Case:
    """Every row's nearest centroid, the centroids taken from a few Lloyd iterations."""

    def make(generator: torch.Generator) -> Inputs:
        x = data(generator, (n, d))
        return {"x": x, "centroids": peers.lloyd(x, x[:k], 3)}

    def oracle(inputs: Inputs) -> Tensor:
        x, centroids = sampled(inputs["x"]).double(), inputs["centroids"].double()
        return peers.nearest(x[None], centroids[None])[0][0]

    def error(inputs: Inputs, least: Tensor, result: Result) -> float:
        x, labels = sampled(inputs["x"]).double(), sampled(result[0])
        distances = (x - inputs["centroids"].double()[labels]).square().sum(-1)
        return float((distances - least).max() / least.mean())

    return Case(
        name=f"assign, {name}, {n} x {d}, K {k}",
        make=make,
        implementations=(Implementation(OURS, _assign), *peers.ASSIGN),
        oracle=oracle,
        error=error,
        error_name="largest excess over the nearest squared distance, over its mean",
        tolerance=1e-4,
        work=Work(flops=2.0 * n * d * k, bytes=4.0 * n * d + 8 * n, matmul="bf16"),
        targets=targets or {},
    )


def lloyd(
    name: str,
    data: Data,
    n: int,
    d: int,
    k: int,
    *,
    b: int = 1,
    iterations: int = 10,
    dtype: torch.dtype = torch.float32,
    against: tuple[Implementation, ...] = peers.LLOYD,
    targets: Mapping[str, Target] | None = None,
    ms: float | None = None,
) -> Case:
    """Whole iterations, assignment and update, from the same rows as first centroids."""
    shape = (n, d) if b == 1 else (b, n, d)

    def make(generator: torch.Generator) -> Inputs:
        x = data(generator, shape).to(dtype)
        return {"x": x, "centroids": x[..., :k, :].clone(), "iterations": torch.tensor(iterations)}

    def oracle(inputs: Inputs) -> float:
        x = inputs["x"]
        return inertia(x, peers.lloyd(x.double(), inputs["centroids"].double(), iterations))

    def error(inputs: Inputs, least: float, result: Result) -> float:
        return abs(inertia(inputs["x"], result[0]) / least - 1)

    return Case(
        name=f"Lloyd x {iterations}, {name}, " + (f"{b} x " if b > 1 else "") + f"{n} x {d}, K {k}",
        make=make,
        implementations=(Implementation(OURS, _lloyd), *against),
        oracle=oracle,
        error=error,
        error_name="inertia against fp64 Lloyd's",
        tolerance=0.05,  # peers that draw their own first centroids reach another optimum
        work=Work(
            flops=2.0 * b * n * d * k,
            bytes=float(b * n * d * dtype.itemsize + 8 * b * n),
            matmul="tf32" if ms is not None and dtype == torch.float32 else "bf16",
        ),
        steps=iterations,
        step_name="iteration",
        targets=targets or {},
        target_seconds=None if ms is None else ms / 1e3,
    )


def on_gpu(
    name: str,
    data: Data,
    n: int,
    d: int,
    k: int,
    *,
    ms: float,
    b: int = 1,
    iterations: int = 5,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """Lloyd beside the GPU libraries."""
    return lloyd(name, data, n, d, k, b=b, iterations=iterations, dtype=dtype, against=peers.LLOYD_GPU, ms=ms)


def seeding(n: int, d: int, k: int, targets: Mapping[str, Target] | None = None) -> Case:
    """Greedy k-means++: each step weighs 2 + log K candidates by the potential that they leave."""
    trials = 2 + int(math.log(k))

    def oracle(inputs: Inputs) -> Tensor:
        return inputs["x"].double().var(0).sum()

    def error(inputs: Inputs, variance: Tensor, result: Result) -> float:
        distances, rows = peers.nearest(result[0].double()[None], inputs["x"].double()[None])
        return float(distances.max() / variance) + (k - len(set(rows.flatten().tolist())))

    return Case(
        name=f"k-means++, mixture, {n} x {d}, K {k}",
        make=lambda generator: {"x": mixture(generator, (n, d)), "k": torch.tensor(k)},
        implementations=(Implementation(OURS, _seed), *peers.SEEDING),
        oracle=oracle,
        error=error,
        error_name="centroids that are no rows of x, or repeat one",
        tolerance=1e-5,
        work=Work(flops=2.0 * trials * n * d, bytes=4.0 * n * d),
        steps=k,
        step_name="centroid",
        targets=targets or {},
    )


def gaussian(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Nothing to find: every distance is much like the next."""
    return torch.randn(shape, generator=generator, device=generator.device)


def mixture(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """1000 overlapping Gaussian groups."""
    centres = gaussian(generator, (1000, shape[-1]))
    groups = torch.randint(1000, shape[:-1], generator=generator, device=generator.device)
    return gaussian(generator, shape).add_(centres[groups])


def patches(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """Patches of the two photographs that scikit-learn carries, values in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_images

        images = load_sample_images().images
    except ImportError as error:
        raise Skip(f"the photographs come with scikit-learn and pillow: {error}") from error
    windows = torch.stack([torch.tensor(image) for image in images])
    windows = windows.unfold(1, PATCH, 1).unfold(2, PATCH, 1)
    image, row, column = (torch.randint(size, shape[:1], generator=generator) for size in windows.shape[:3])
    return windows[image, row, column].reshape(shape).float() / 255


def sampled(x: Tensor) -> Tensor:
    """Evenly spread rows, enough to compare, few enough for fp64."""
    return x[:: max(1, x.shape[0] // SAMPLED)]


def inertia(x: Tensor, centroids: Tensor) -> float:
    """Of the sampled rows, in fp64."""
    x, centroids = (t if t.dim() == 3 else t[None] for t in (x, centroids))
    x = x[:, :: max(1, x.shape[1] // SAMPLED)]
    return float(peers.nearest(x.double(), centroids.double())[0].sum())


def _assign(inputs: Inputs) -> Run:
    from clustops.kmeans import kmeans_assign

    return lambda: tuple(kmeans_assign(inputs["x"], inputs["centroids"]))


def _lloyd(inputs: Inputs) -> Run:
    from clustops.kmeans import kmeans

    x, start, iterations = inputs["x"], inputs["centroids"], int(inputs["iterations"])
    precision = "medium" if x.dtype == torch.bfloat16 else "highest"

    def run() -> Result:
        result = kmeans(x, start.shape[-2], init=start, max_iter=iterations, tol=0, precision=precision)
        return (result.centroids, result.labels)

    return run


def _seed(inputs: Inputs) -> Run:
    from clustops.kmeans import kmeans_plus_plus

    return lambda: (kmeans_plus_plus(inputs["x"], int(inputs["k"]), seed=0),)


def _lloyd_targets(faiss: float, sklearn: float, superkmeans: float) -> dict[str, Target]:
    return {
        "faiss Kmeans": Target(faiss, None),
        "scikit-learn lloyd": Target(sklearn, None),
        "faiss SuperKMeans": Target(superkmeans, None),
    }
