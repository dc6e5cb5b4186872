"""One rank of Sinkhorn over shards of rows, as torchrun starts it: ``sinkhorn_worker.py FOLDER CUT...``."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clustops.checks import ClustopsWarning
from clustops.distributed import all_gather_rows, joined_ranks, rank
from clustops.integrations.sinkhorn import distributed_sinkhorn
from clustops.sinkhorn import sinkhorn
from clustops.sinkhorn_loss import swapped_prediction_loss
from clustops.sinkhorn_queue import FeatureQueue

N, K, V = 61, 7, 3

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prior": {"prior": torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 3.0, 1.0])},
    "relax": {"relax": 0.4, "n_iters": 6},
    "mass": {"mass": 0.4, "n_iters": 6},
    "relax and mass": {"relax": 0.4, "mass": 0.4},
    "tol": {"tol": 0.05, "n_iters": 30},
    "init": {"init": torch.linspace(-9, 9, K)},
}


def rows(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Scores ``[V, N, K]``, weights ``[N]`` and scores of a queue ``[V, 2 N, K]``."""
    g = torch.Generator().manual_seed(0)
    scores, queue = (torch.rand(V, n, K, generator=g, dtype=torch.float64) * 2 - 1 for n in (N, 2 * N))
    weights = torch.rand(N, generator=g) * (torch.arange(N) % 5 != 1)
    return scores.to(dtype), weights, queue.to(dtype)


def results(dtype: torch.dtype, part: slice, group: Any) -> dict[str, Tensor]:
    """Everything that ranks compute together; rows first."""
    scores, weights, queue = rows(dtype)
    scores, weights = scores[:, part], weights[part]
    queue = queue[:, 2 * part.start : 2 * part.stop]
    found = {}
    for name, settings in VARIANTS.items():
        q = sinkhorn(scores, weights=weights, queue_scores=queue, group=group, **settings)
        found[name] = q.transpose(0, 1)
    leaf = scores.clone().requires_grad_()
    q = sinkhorn(leaf, weights=weights, queue_scores=queue, epsilon=0.2, gradient="unrolled", group=group)
    q.square().sum().backward()
    assert leaf.grad is not None
    found["unrolled gradient"] = leaf.grad.transpose(0, 1)
    found["shim"] = distributed_sinkhorn(scores[0], group=group)
    return found


def loss(dtype: torch.dtype, part: slice, group: Any) -> tuple[Tensor, Tensor]:
    """The loss with a queue that was filled in two steps, and its gradient, rows first."""
    scores, weights, queued = rows(dtype)
    queue = FeatureQueue(N + 20, K, views=V, group=group, dtype=dtype)
    for step in queued.split(N, dim=1):
        queue.push(step[:, part])
    leaf = scores[:, part].clone().requires_grad_()
    value = swapped_prediction_loss(
        leaf, assign_views=range(V), weights=weights[part], queue_scores=queue.share(), group=group
    )
    value.backward()
    assert leaf.grad is not None
    return value.detach(), leaf.grad.transpose(0, 1)


def main(folder: Path, cuts: list[int]) -> None:
    with joined_ranks() as group:
        me = rank(group)
        part = slice(cuts[me], cuts[me + 1])
        if (folder / "fail").exists():
            how = (folder / "fail").read_text()
            for step in range(1000):
                if me == 1 and step == 3:
                    if how == "killed":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise OSError("the disk is gone")
                sinkhorn(rows(torch.float32)[0][:, part], group=group)
        found: dict[str, Any] = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            gathered = {
                name: all_gather_rows(shard, group)[0] for name, shard in results(dtype, part, group).items()
            }
            value, gradient = loss(dtype, part, group)
            gathered["gradient"] = all_gather_rows(gradient, group)[0]
            found[str(dtype)] = {**gathered, "loss": value}
        torch.save(found, folder / f"{me}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ClustopsWarning)
    main(Path(sys.argv[1]), [int(cut) for cut in sys.argv[2:]])
