"""``DistributedDataParallel``: each rank has its samples as anchors and those of all ranks as negatives.

``torchrun --nproc-per-node=2 -m clustops.examples.ranks`` prints the losses of
``python -m clustops.examples.ranks``.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import clustops
from clustops.distributed import Group, all_reduce_sum, joined_ranks, rank, world_size


def train(group: Group, steps: int = 30) -> list[float]:
    """The losses of the joint batch in ``steps`` steps; shards may differ in size."""
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(65, 2, 32, generator=g), torch.arange(65) % 8
    images += 2 * torch.randn(8, 32, generator=g)[labels, None]
    images, labels = (t[rank(group) :: world_size(group)] for t in (images, labels))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: nn.Module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    if group is not None:
        network = DistributedDataParallel(network, process_group=group)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        # The mean over ranks, which DDP takes of gradients, is the loss of one process with all samples.
        loss = clustops.supcon_loss(network(images), labels, normalize=True, group=group)
        loss.backward()
        optimiser.step()
        losses.append(all_reduce_sum(loss.detach(), group).item() / world_size(group))
    return losses


if __name__ == "__main__":
    with joined_ranks() as group:
        losses = train(group)
        if rank(group) == 0:
            print(f"{world_size(group)} ranks: {losses[0]:.6f} -> {losses[-1]:.6f}")
