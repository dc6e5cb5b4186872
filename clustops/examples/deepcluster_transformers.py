"""DeepCluster with Hugging Face's Trainer: it deals out the whole order, a callback clusters.

``python -m clustops.examples.deepcluster_transformers`` prints how often each cluster was drawn.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainerCallback, TrainingArguments

import clustops


class Network(nn.Module):
    """Checkpoints hold the labels that their epoch began with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images = 2 * torch.randn(8, 32)[(8 * torch.rand(400) ** 2).long()] + torch.randn(400, 32)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        self.labels = nn.Buffer(torch.zeros(400, dtype=torch.int64))
        self.sampler = clustops.InverseClusterSizeSampler(self.labels, 400)

    def forward(self, images: Tensor, index: Tensor) -> dict[str, Tensor]:
        return {"loss": cross_entropy(self.layers(images), self.labels[index])}


class DeepCluster(Trainer):
    """Draws as the network's sampler says."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return self.model.sampler


class Clustering(TrainerCallback):
    """New labels for each epoch."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, model: Network, **_: Any) -> None:
        if state.epoch % 1 == 0:  # else a checkpoint goes on within its epoch
            labels = clustops.kmeans(model.layers[:2](model.images).detach(), 8, seed=int(state.epoch)).labels
            model.labels.copy_(broadcast(labels))
        model.sampler.set_labels(model.labels)
        model.sampler.set_epoch(int(state.epoch))  # Trainer's own call is lost where ranks skip batches


if __name__ == "__main__":
    network, settings = Network(), {"report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3}
    data = [{"images": image, "index": i} for i, image in enumerate(network.images)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, per_device_train_batch_size=40, use_cpu=True, **settings)
        DeepCluster(network, arguments, train_dataset=data, callbacks=[Clustering()]).train()
    print(f"clusters of {network.labels.bincount().tolist()}, drawn {network.sampler.quotas().tolist()}")
