"""The samplers in Hugging Face's Trainer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from support import run_ranks, tell_trainers
from torch import Tensor

from clustops.sampler import InverseClusterSizeSampler

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import TrainerCallback  # noqa: E402

from clustops.examples.deepcluster_transformers import Clustering, DeepCluster, Network  # noqa: E402


class Seen(Network):
    """The example's network, which remembers what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []
        self.clusterings: list[list[int]] = []

    def forward(self, images: Tensor, index: Tensor) -> dict[str, Tensor]:
        self.seen.append(index.tolist())
        self.clusterings.append(self.labels.tolist())
        return super().forward(images, index)


class Stop(TrainerCallback):  # type: ignore[misc]
    """Ends a run as if it were killed after a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(rank: int, world: int, folder: Path, stop: int | None, step: int | None) -> Any:
    """Two epochs of ten steps, or what is left of them: the indices and the labels of each step."""
    tell_trainers(rank, world)
    network = Seen()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=40 // world,
        learning_rate=0.05,
        use_cpu=True,
        save_strategy="steps",
        save_steps=stop or 1000,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = [{"images": image, "index": i} for i, image in enumerate(network.images)]
    trainer = DeepCluster(network, arguments, train_dataset=data, callbacks=[Clustering(), Stop(stop)])
    trainer.remove_callback(transformers.PrinterCallback)
    with suppress(KeyboardInterrupt):
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}") if step else None)
    return network.seen, network.clusterings


def dealt(parts: list[list[list[int]]]) -> list[int]:
    """The order that processes have drawn: the first batch of each, the second of each, ..."""
    return [item for step in zip(*parts, strict=True) for batch in step for item in batch]


@pytest.mark.parametrize(("world", "stops"), [(1, (5, 10)), (2, (15,))])
def test_a_stopped_and_a_resumed_run_draw_what_one_run_draws(
    world: int, stops: tuple[int, ...], tmp_path: Path
) -> None:
    """Within the first epoch, at its end, and within the second."""
    parts, clusterings = zip(*run_ranks(world, train, tmp_path / "whole", None, None), strict=True)
    for epoch in range(2):
        labels = torch.tensor(clusterings[0][10 * epoch])
        sampler = InverseClusterSizeSampler(labels, 400)
        sampler.set_epoch(epoch)
        drawn = dealt([part[10 * epoch : 10 * epoch + 10] for part in parts])
        assert drawn == list(sampler)
        assert labels[drawn].bincount().tolist() == [50] * 8
    for stop in stops:
        folder = tmp_path / str(stop)
        first = run_ranks(world, train, folder, stop, None)
        rest = run_ranks(world, train, folder, None, stop)
        for part, labels, (head, _), (tail, again) in zip(parts, clusterings, first, rest, strict=True):
            assert head + tail == part
            assert again == labels[stop:]
