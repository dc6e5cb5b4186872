"""Mixed precision: the network runs in bf16 or fp16, the loss accumulates in fp32 whatever autocast says.

``python -m clustops.examples.mixed_precision`` trains in each.
"""

from __future__ import annotations

import torch
from torch import nn

import clustops


def train(dtype: torch.dtype, steps: int = 30) -> list[float]:
    """The losses of ``steps`` steps with the network in ``dtype``."""
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(64, 2, 32, generator=g), torch.arange(64) % 8
    images += 2 * torch.randn(8, 32, generator=g)[labels, None]
    confidence = torch.rand(64, generator=g)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
    # Gradients of fp16 features underflow unless the loss is scaled; bf16 has the range of fp32.
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            features = network(images)  # [N, views, D] in dtype
            loss = clustops.ccssl_loss(features, labels, confidence, normalize=True)  # fp32
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        losses = train(dtype)
        print(f"{dtype}: {losses[0]:.4f} -> {losses[-1]:.4f}")
