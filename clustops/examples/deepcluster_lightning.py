"""DeepCluster in Lightning, over ranks too: it keeps the sampler and tells it the epoch.

``python -m clustops.examples.deepcluster_lightning`` prints how often each cluster was drawn.
"""

from __future__ import annotations

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import clustops


class DeepCluster(lightning.LightningModule):
    """For ``reload_dataloaders_every_n_epochs=1``. Checkpoints hold the labels their epoch began with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.images = 2 * torch.randn(8, 32)[(8 * torch.rand(400) ** 2).long()] + torch.randn(400, 32)
        self.network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        self.labels = nn.Buffer(torch.zeros(400, dtype=torch.int64))
        self.position: dict[str, Any] | None = None

    def train_dataloader(self) -> DataLoader[Any]:
        if self.position is None:
            labels = clustops.kmeans(
                self.network[:2](self.images).detach(), 8, seed=self.current_epoch
            ).labels
            self.labels.copy_(self.trainer.strategy.broadcast(labels))
        world, rank = self.trainer.world_size, self.trainer.global_rank
        self.sampler = clustops.InverseClusterSizeSampler(self.labels, 400, num_replicas=world, rank=rank)
        self.sampler.set_epoch(self.current_epoch)  # Lightning does, but workers may have read ahead by then
        if self.position is not None:
            self.sampler.load_state_dict(self.position)
            self.position = None
        return DataLoader(TensorDataset(self.images, torch.arange(400)), 40 // world, sampler=self.sampler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sampler"] = self.sampler.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.position = checkpoint["sampler"]

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return cross_entropy(self.network(batch[0]), self.labels[batch[1]])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.network.parameters(), lr=0.02)


if __name__ == "__main__":
    settings = {"accelerator": "cpu", "reload_dataloaders_every_n_epochs": 1, "barebones": True}
    lightning.Trainer(max_epochs=3, **settings).fit(model := DeepCluster())
    print(f"clusters of {model.labels.bincount().tolist()}, drawn {model.sampler.quotas().tolist()}")
