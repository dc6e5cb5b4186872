"""One rank of k-means over shards of a file, as torchrun starts it: ``kmeans_worker.py FOLDER CUT...``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import clustops
from clustops.distributed import joined_ranks, rank

N, D, K = 120, 3, 12


class Halves:
    """Rows of a file of bf16 numbers."""

    def __init__(self, rows: np.ndarray[Any, Any]) -> None:
        self.rows, self.shape, self.dtype = rows, rows.shape, torch.bfloat16

    def __getitem__(self, index: slice) -> torch.Tensor:
        return torch.from_numpy(np.array(self.rows[index])).view(torch.bfloat16)


def shard(folder: Path, dtype: str, rows: slice) -> Any:
    """Rows of ``FOLDER/DTYPE.npy``, read by slices."""
    x = np.load(folder / f"{dtype}.npy", mmap_mode="r")[rows]
    return Halves(x) if dtype == "bfloat16" else x


def results(folder: Path, rows: slice, group: Any) -> dict[str, dict[str, torch.Tensor]]:
    """k-means in every dtype, from every start, with every policy."""
    far = torch.cat([torch.randn(4, D, generator=torch.Generator().manual_seed(0)), torch.full((8, D), 1e3)])
    found = {}
    for dtype in ("float32", "float64", "bfloat16"):
        for init, empty in [
            ("k-means++", "split"),
            ("random", "keep"),
            (far, "split"),
            (far, "farthest"),
            (far, "random"),
        ]:
            x = shard(folder, dtype, rows)
            fit = clustops.kmeans(x, K, init=init, empty=empty, max_iter=4, tol=0, seed=1, group=group)
            start = init if isinstance(init, str) else "far"
            found[f"{dtype} {start} {empty}"] = {k: torch.as_tensor(v) for k, v in vars(fit).items()}
    return found


class Failing(Halves):
    """A shard that cannot be read a third time."""

    reads = 0

    def __getitem__(self, index: slice) -> torch.Tensor:
        self.reads += 1
        if self.reads > 2:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def main(folder: Path, cuts: list[int]) -> None:
    with joined_ranks() as group:
        rows = slice(cuts[rank(group)], cuts[rank(group) + 1])
        if (folder / "fail").exists():
            x = np.load(folder / "bfloat16.npy", mmap_mode="r")[rows]
            clustops.kmeans((Failing if rank(group) == 1 else Halves)(x), K, init="random", group=group)
        torch.save(results(folder, rows, group), folder / f"{rank(group)}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), [int(cut) for cut in sys.argv[2:]])
