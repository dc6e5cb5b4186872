"""A contrastive batch larger than memory for activations: embeddings first, gradients part by part.

``python -m clustops.examples.gradient_cache`` prints the largest difference to one large batch.
Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

import clustops
from clustops.distributed import Group


def backward(network: nn.Module, parts: list[tuple[Tensor, Tensor]], group: Group = None) -> Tensor:
    """The loss over all parts of (images, labels) together; adds its gradients to ``network``.

    Only one part's activations are in memory at a time, for a second forward pass. Batch norm sees parts.
    """
    states, rows = [], []
    with torch.no_grad():
        for images, _ in parts:
            states.append(torch.get_rng_state())
            rows.append(network(images))
    features = torch.cat(rows).requires_grad_()
    labels = torch.cat([labels for _, labels in parts])
    loss = clustops.supcon_loss(features, labels, normalize=True, group=group)
    (gradient,) = torch.autograd.grad(loss, features)

    for i, grad in enumerate(gradient.split([len(images) for images, _ in parts])):
        torch.set_rng_state(states[i])  # dropout repeats itself
        # DistributedDataParallel averages gradients with the last part.
        is_last = i == len(parts) - 1
        with nullcontext() if is_last else getattr(network, "no_sync", nullcontext)():
            network(parts[i][0]).backward(grad)
    return loss.detach()


if __name__ == "__main__":
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).double()
    images, labels = torch.randn(256, 2, 32, dtype=torch.float64), torch.arange(256) % 10
    loss = clustops.supcon_loss(network(images), labels, normalize=True)
    expected = torch.autograd.grad(loss, list(network.parameters()))
    backward(network, list(zip(images.split(32), labels.split(32), strict=True)))
    gradients = (p.grad for p in network.parameters() if p.grad is not None)
    worst = max((a - b).abs().max().item() for a, b in zip(gradients, expected, strict=True))
    print(f"8 parts of 32 samples: largest difference of a gradient {worst:.1e}")
