"""The samplers in Lightning."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import run_ranks, tell_trainers, woven
from torch import Tensor
from torch.utils.data import DataLoader

from clustops.sampler import InverseClusterSizeSampler, MPerClusterBatchSampler

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from clustops.examples.deepcluster_lightning import DeepCluster  # noqa: E402

pytestmark = [
    # Lightning's advice, and what it and torchdata call themselves.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
]


class Seen(DeepCluster):
    """The example, which remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, list[int]]] = []
        self.clusterings: dict[int, list[int]] = {}

    def training_step(self, batch: list[Tensor]) -> Tensor:
        assert self.trainer.train_dataloader.sampler is self.sampler
        self.clusterings[self.current_epoch] = self.labels.tolist()
        self.seen.append((self.current_epoch, batch[1].tolist()))
        return super().training_step(batch)


class SeenByWorkers(Seen):
    """With torchdata's loader, whose state Lightning saves and loads by itself."""

    def train_dataloader(self) -> Any:
        from torchdata.stateful_dataloader import StatefulDataLoader

        loader = super().train_dataloader()
        return StatefulDataLoader(loader.dataset, loader.batch_size, sampler=loader.sampler, num_workers=2)


def fit(model: Any, folder: Path, step: int | None = None, **settings: Any) -> Any:
    """Two epochs of ten steps, each of which leaves a checkpoint; or those that follow such a checkpoint."""
    saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=[] if step else [saver],
        enable_checkpointing=not step,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "reload_dataloaders_every_n_epochs": 1, **settings},
    )
    trainer.fit(model, ckpt_path=folder / f"step={step}.ckpt" if step else None)
    return model


def order_of(labels: list[int], epoch: int) -> list[int]:
    sampler = InverseClusterSizeSampler(torch.tensor(labels), len(labels))
    sampler.set_epoch(epoch)
    return list(sampler)


def assert_two_epochs(models: list[Any]) -> None:
    for epoch in range(2):
        parts = [[indices for e, indices in model.seen if e == epoch] for model in models]
        assert {len(part) for part in parts} == {10}
        assert woven(parts) == order_of(models[0].clusterings[epoch], epoch)
        assert all(model.clusterings == models[0].clusterings for model in models)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("lightning")
    return fit(Seen(), folder), folder


def test_each_epoch_draws_the_order_of_its_labels(whole: tuple[Any, Path]) -> None:
    model, _ = whole
    assert_two_epochs([model])
    for epoch, labels in model.clusterings.items():
        drawn = torch.tensor(labels)[order_of(labels, epoch)].bincount()
        assert drawn.tolist() == [50] * 8


def test_lightning_tells_a_sampler_the_epoch(tmp_path: Path) -> None:
    model = fit(Seen(), tmp_path, reload_dataloaders_every_n_epochs=0)
    assert_two_epochs([model])
    assert model.clusterings[0] == model.clusterings[1]
    assert model.seen[0][1] != model.seen[10][1]


@pytest.mark.parametrize("step", [1, 5, 9, 10, 11, 16, 19])
def test_a_checkpoint_goes_on_with_the_remaining_indices(whole: tuple[Any, Path], step: int) -> None:
    model, folder = whole
    resumed = fit(Seen(), folder, step)
    assert resumed.seen == model.seen[step:]
    assert resumed.clusterings[1] == model.clusterings[1]


@pytest.mark.parametrize("step", [4, 10, 13])
def test_a_stateful_loader_is_saved_and_loaded_by_lightning(
    whole: tuple[Any, Path], tmp_path: Path, step: int
) -> None:
    pytest.importorskip("torchdata.stateful_dataloader")
    model = fit(SeenByWorkers(), tmp_path)
    assert model.seen == whole[0].seen
    assert fit(SeenByWorkers(), tmp_path, step).seen == model.seen[step:]


class ByBatch(Seen):
    """With batches of clusters, by themselves cut up over ranks."""

    def train_dataloader(self) -> Any:
        data = super().train_dataloader().dataset
        world, rank = self.trainer.world_size, self.trainer.global_rank
        self.sampler: Any = MPerClusterBatchSampler(self.labels, 4, 5, num_replicas=world, rank=rank)
        return DataLoader(data, batch_sampler=self.sampler)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        self.seen.append((self.current_epoch, batch[1].tolist()))
        self.clusterings[self.current_epoch] = self.labels.tolist()
        return DeepCluster.training_step(self, batch)


def fit_of_a_rank(rank: int, world: int, kind: Any, folder: Path, step: int | None) -> Any:
    tell_trainers(rank, world)
    settings = {"use_distributed_sampler": False} if kind is ByBatch else {}
    model = fit(kind(), folder, step, devices=world, strategy="ddp", **settings)
    return model.seen, model.clusterings


def test_ranks_keep_their_shares_of_one_order_and_go_on_with_them(tmp_path: Path) -> None:
    runs = run_ranks(2, fit_of_a_rank, Seen, tmp_path, None)
    assert_two_epochs([SimpleNamespace(seen=seen, clusterings=labels) for seen, labels in runs])
    for (seen, _), (resumed, _) in zip(runs, run_ranks(2, fit_of_a_rank, Seen, tmp_path, 14), strict=True):
        assert resumed == seen[14:]


def test_ranks_with_stateful_loaders_go_on_with_their_shares(tmp_path: Path) -> None:
    """Lightning saves one rank's loader state for all."""
    pytest.importorskip("torchdata.stateful_dataloader")
    runs = run_ranks(2, fit_of_a_rank, SeenByWorkers, tmp_path, None)
    assert_two_epochs([SimpleNamespace(seen=seen, clusterings=labels) for seen, labels in runs])
    resumed = run_ranks(2, fit_of_a_rank, SeenByWorkers, tmp_path, 13)
    for (seen, _), (again, _) in zip(runs, resumed, strict=True):
        assert again == seen[13:]


def assert_batches(runs: Any) -> None:
    (_, clusterings), *_ = runs
    for epoch, labels in clusterings.items():
        sampler = MPerClusterBatchSampler(torch.tensor(labels), 4, 5)
        sampler.set_epoch(epoch)
        parts = [[indices for e, indices in seen if e == epoch] for seen, _ in runs]
        assert [batch for step in zip(*parts, strict=True) for batch in step] == list(sampler)


def test_batches_of_clusters_are_told_the_epoch(tmp_path: Path) -> None:
    model = fit(ByBatch(), tmp_path)
    assert_batches([(model.seen, model.clusterings)])
    assert_batches(run_ranks(2, fit_of_a_rank, ByBatch, tmp_path, None))
