"""DeepCluster over ranks: each has its rows in k-means and its share of the order.

``torchrun --nproc-per-node=2 -m clustops.examples.deepcluster_ddp FILE`` saves each step. Kill it, start it
again with ``--nproc-per-node=3``: it goes on with the next index.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import clustops
from clustops.distributed import Group, all_gather_rows, joined_ranks, rank, world_size


def train(group: Group, file: Path | None = None, epochs: int = 3) -> Iterator[tuple[Tensor, float]]:
    """Indices and loss of this rank, step by step; goes on from ``file``, if there is one."""
    mine, world = rank(group), world_size(group)
    torch.manual_seed(0)
    images = 2 * torch.randn(8, 32)[(8 * torch.rand(600) ** 2).long()] + torch.randn(600, 32)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    saved = torch.load(file) if file and file.exists() else None
    labels = saved["labels"] if saved else torch.zeros(600, dtype=torch.int64)
    sampler = clustops.InverseClusterSizeSampler(labels, 600, num_replicas=world, rank=mine)
    if saved:
        network.load_state_dict(saved["network"])
        sampler.load_state_dict(saved["sampler"])
    model = DistributedDataParallel(network, process_group=group) if group else network
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02)
    loader = DataLoader(TensorDataset(images, torch.arange(600)), batch_size=24 // world, sampler=sampler)
    for epoch in range(sampler.epoch, epochs):
        if not saved:
            features = network[:2](images.tensor_split(world)[mine]).detach()
            labels = all_gather_rows(clustops.kmeans(features, 8, seed=epoch, group=group).labels, group)[0]
            sampler.set_labels(labels)
            sampler.set_epoch(epoch)
        saved = None
        for batch, index in loader:
            loss = cross_entropy(model(batch), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if file and mine == 0:
                state = {"network": network.state_dict(), "labels": labels, "sampler": sampler.state_dict()}
                torch.save(state, file.with_suffix(".new"))
                file.with_suffix(".new").replace(file)  # whole, whenever this is killed
            yield index, loss.item()


if __name__ == "__main__":
    with joined_ranks() as group:
        steps = list(train(group, Path(sys.argv[1]) if sys.argv[1:] else None))
        print(f"rank {rank(group)}: {len(steps)} steps, last losses {[loss for _, loss in steps[-2:]]}")
