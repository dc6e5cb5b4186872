"""DeepCluster with torchdata's StatefulDataLoader: resumes at any step, though workers read ahead.

``python -m clustops.examples.deepcluster_stateful`` goes on from a state within an epoch and compares the
indices with those of a run that was not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import clustops

State = dict[str, Any]


def train(saved: State | None = None, workers: int = 2, epochs: int = 2) -> Iterator[tuple[list[int], State]]:
    """The indices of each step, and the state after it, which another call goes on from."""
    torch.manual_seed(0)
    images = 2 * torch.randn(8, 32)[(8 * torch.rand(200) ** 2).long()] + torch.randn(200, 32)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02)
    labels = saved["labels"] if saved else torch.zeros(200, dtype=torch.int64)
    sampler = clustops.InverseClusterSizeSampler(labels, 200)
    data = TensorDataset(images, torch.arange(200))
    loader = StatefulDataLoader(data, batch_size=20, sampler=sampler, num_workers=workers)
    if saved:
        network.load_state_dict(saved["network"])
        loader.load_state_dict(saved["loader"])  # the sampler's state is in it
    for epoch in range(saved["epoch"] if saved else 0, epochs):
        if not saved:
            labels = clustops.kmeans(network[:2](images).detach(), 8, seed=epoch).labels
            sampler.set_labels(labels)
            sampler.set_epoch(epoch)
        saved = None
        for batch, index in loader:
            loss = cross_entropy(network(batch), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            weights = {name: weight.clone() for name, weight in network.state_dict().items()}
            state = {"epoch": epoch, "labels": labels, "network": weights, "loader": loader.state_dict()}
            yield index.tolist(), state


if __name__ == "__main__":
    whole = [indices for indices, _ in train()]
    _, state = list(islice(train(), 13))[-1]
    rest = [indices for indices, _ in train(state)]
    print(f"stopped after 13 of {len(whole)} steps; went on with the same indices: {rest == whole[13:]}")
