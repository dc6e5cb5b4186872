"""DeepCluster in plain PyTorch: cluster the features, learn the clusters, each drawn equally often, repeat.

``python -m clustops.examples.deepcluster`` prints the sizes of the clusters and how often each was drawn.
Source: Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features", ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import clustops


def train(epochs: int = 3) -> Iterator[tuple[Tensor, Tensor, float]]:
    """The clusters of all images, the indices drawn and the loss, step by step."""
    torch.manual_seed(0)
    images = 2 * torch.randn(8, 32)[(8 * torch.rand(600) ** 2).long()] + torch.randn(600, 32)
    encoder, head = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)), nn.Linear(16, 8)
    network = nn.Sequential(encoder, head)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.02)

    # No labels yet. With the number of draws given, all epochs have as many.
    sampler = clustops.InverseClusterSizeSampler(torch.zeros(600, dtype=torch.int64), 600)
    loader = DataLoader(TensorDataset(images, torch.arange(600)), batch_size=25, sampler=sampler)
    for epoch in range(epochs):
        labels = clustops.kmeans(encoder(images).detach(), 8, seed=epoch).labels
        sampler.set_labels(labels)
        sampler.set_epoch(epoch)
        nn.init.normal_(head.weight, std=0.01)  # clusters have new numbers each time
        nn.init.zeros_(head.bias)
        for batch, index in loader:
            loss = cross_entropy(network(batch), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield labels, index, loss.item()


if __name__ == "__main__":
    steps = list(train(epochs=3))
    for epoch in range(3):
        labels, indices, losses = zip(*steps[24 * epoch : 24 * epoch + 24], strict=True)
        sizes = labels[0].bincount(minlength=8).tolist()
        drawn = labels[0][torch.cat(indices)].bincount(minlength=8).tolist()
        print(f"clusters of {sizes}, drawn {drawn} times; loss {losses[0]:.2f} -> {losses[-1]:.2f}")
