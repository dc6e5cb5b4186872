"""DeepCluster with Accelerate: every process has the whole order, ``prepare`` deals out its batches.

``accelerate launch --cpu --num_processes 2 -m clustops.examples.deepcluster_accelerate`` goes on from a state
within an epoch and compares the indices with those of a run that was not stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import clustops

State = dict[str, Any]


def train(saved: State | None = None, epochs: int = 2) -> Iterator[tuple[list[int], State]]:
    """This process's indices of each step, and the state after it, which another call goes on from."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    images = 2 * torch.randn(8, 32)[(8 * torch.rand(400) ** 2).long()] + torch.randn(400, 32)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    labels = saved["labels"] if saved else torch.zeros(400, dtype=torch.int64)
    sampler = clustops.InverseClusterSizeSampler(labels, 400)
    if saved:
        network.load_state_dict(saved["network"])
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02)
    data = TensorDataset(images, torch.arange(400))
    loader = DataLoader(data, batch_size=40 // accelerator.num_processes, sampler=sampler)
    model, optimiser, loader = accelerator.prepare(network, optimiser, loader)
    for epoch in range(saved["epoch"] if saved else 0, epochs):
        if not saved:
            labels = clustops.kmeans(network[:2](images).detach(), 8, seed=epoch).labels
            labels = broadcast(labels)
            sampler.set_labels(labels)
        done, saved = saved["done"] if saved else 0, None
        loader.set_epoch(epoch)  # it overrules the sampler's; before skipping, which may not pass it on
        for batch, index in accelerator.skip_first_batches(loader, done):
            loss = cross_entropy(model(batch), labels[index])
            optimiser.zero_grad()
            accelerator.backward(loss)
            optimiser.step()
            done += 1
            weights = {name: weight.clone() for name, weight in network.state_dict().items()}
            yield index.tolist(), {"epoch": epoch, "done": done, "labels": labels, "network": weights}


if __name__ == "__main__":
    whole = [indices for indices, _ in train()]
    _, state = list(islice(train(), 13))[-1]
    rest = [indices for indices, _ in train(state)]
    Accelerator().print(f"went on after 13 of {len(whole)} steps with the same indices: {rest == whole[13:]}")
