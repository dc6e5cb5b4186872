"""``torch.compile`` of network and loss as one graph.

``python -m clustops.examples.compiled`` trains compiled and not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import clustops


def train(compiled: bool, steps: int = 30, backend: str = "inductor") -> list[float]:
    """The losses of ``steps`` steps."""
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 2, 32, generator=g), torch.arange(64) % 8
    images += 2 * torch.randn(8, 32, generator=g)[labels, None]
    confidence = torch.rand(64, generator=g)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)

    def loss_of(images: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
        return clustops.ccssl_loss(network(images), labels, confidence, threshold=0.5, normalize=True)

    # fullgraph: an error where something could not be traced. dynamic: one graph for batches of all sizes.
    step = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=backend) if compiled else loss_of
    losses = []
    for i in range(steps):
        n = 64 - 16 * (i % 3)
        optimiser.zero_grad()
        loss = step(images[:n], labels[:n], confidence[:n])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for compiled in (False, True):
        losses = train(compiled)
        print(f"{'compiled' if compiled else 'eager':8}: {losses[0]:.6f} -> {losses[-1]:.6f}")
