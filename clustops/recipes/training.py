"""What all recipes share: seeds, batches, schedules, the loop with its checkpoints and metrics file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..checks import reject
from ..distributed import Group, all_reduce_sum, average_gradients, rank, world_size
from .data import ImageData, labelled_subset

Progress = Callable[[int, int], None]
Metrics = dict[str, float]
StepMetrics = Mapping[str, Tensor | float]


class Stateful(Protocol):
    """Anything that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]:
        """What to hold."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take it back."""


@dataclass(frozen=True)
class Result:
    """What a recipe returns.

    Attributes:
        name: the recipe. accuracy: share of the test set that it gets right.
        history: one dict for each logged step: ``step`` and metrics.
        extras: what else there is to look at, by name.
    """

    name: str
    accuracy: float
    history: list[Metrics]
    extras: dict[str, Any] = field(default_factory=dict)


def derive(seed: int, stream: str, step: int = 0) -> int:
    """A seed of 63 bits that is a pure function of (seed, stream, step)."""
    key = f"{seed}/{stream}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A fresh generator for one purpose at one step: a resumed run draws what an uninterrupted one does."""
    return torch.Generator().manual_seed(derive(seed, stream, step))


def prepare(data: ImageData, labels_per_class: int, seed: int, device: str) -> tuple[ImageData, Tensor]:
    """``data`` on ``device``, and the rows of its training part that are labelled."""
    labelled = labelled_subset(data.train_labels, labels_per_class, seed).to(device)
    tensors: dict[str, Any] = {k: v.to(device) for k, v in vars(data).items() if isinstance(v, Tensor)}
    return dataclasses.replace(data, **tensors), labelled


def batch_indices(n: int, batch: int, *, seed: int, stream: str, step: int) -> Tensor:
    """Batch ``step`` of an endless sequence of random permutations of ``range(n)``, int64 ``[batch]``."""
    first, last = step * batch // n, (step * batch + batch - 1) // n
    orders = [torch.randperm(n, generator=generator(seed, stream, epoch)) for epoch in range(first, last + 1)]
    start = step * batch - first * n
    return torch.cat(orders)[start : start + batch]


def shard(total: int, group: Group) -> slice:
    """This rank's rows of a joint batch of ``total`` rows."""
    ranks = world_size(group)
    if total % ranks:
        reject("batch size", f"a multiple of the {ranks} ranks", total, "change it or the number of ranks")
    return slice(rank(group) * (total // ranks), (rank(group) + 1) * (total // ranks))


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From ``start`` at step 0 to ``end`` at ``steps`` along half a cosine wave."""
    return end + (start - end) * (1 + math.cos(math.pi * min(step / max(steps, 1), 1.0))) / 2


def decayed_cosine(step: int, steps: int) -> float:
    """FixMatch's factor of the learning rate, ``cos(7 pi step / (16 steps))``."""
    return math.cos(7 * math.pi * step / (16 * steps))


def weight_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for an optimiser: decay on matrices and filters, none on biases and normalisation."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def optimise(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float | None, group: Group) -> None:
    """One step along the gradient of the mean of ``loss`` over ranks; ``lr`` replaces that of all groups."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = parameters["lr"] if lr is None else lr
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients((p for parameters in optimizer.param_groups for p in parameters["params"]), group)
    optimizer.step()


@torch.no_grad()
def move_towards(average: nn.Module, model: nn.Module, decay: float) -> None:
    """``average <- decay average + (1 - decay) model``, weights and running statistics alike."""
    for slow, fast in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        slow.lerp_(fast, 1 - decay)


def to_float(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1], whether stored so or as bytes."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, size: int = 1024) -> Tensor:
    """``function`` of all images as floats, a batch at a time, without gradients."""
    return torch.cat([function(to_float(part)) for part in images.split(size)])


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """The modules are in evaluation mode inside, and as before after."""
    before = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, training in zip(modules, before, strict=True):
            module.train(training)


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of ``images`` whose largest output is their label, in evaluation mode."""
    with evaluating(model):
        guesses = in_batches(lambda x: model(x).argmax(1), images)
    return float((guesses == labels).double().mean())


@dataclass(frozen=True)
class Run:
    """Where a run writes and who takes part.

    Attributes:
        config: a dataclass; a checkpoint of another config is refused.
        out: folder, or ``None`` to write nothing. resume: continue from the checkpoint there, if any.
        progress: called with (steps done, steps) after each step.
        group: rank 0 writes; the folder must be visible to all ranks.
    """

    config: Any
    out: Path | None
    resume: bool
    progress: Progress | None
    group: Group


def fit(
    step: Callable[[int], StepMetrics],
    steps: int,
    run: Run,
    *,
    state: Mapping[str, Stateful],
    evaluate: Callable[[int], Metrics],
    log_every: int,
) -> list[Metrics]:
    """Call ``step(0), step(1), ...`` and return the logged metrics.

    Every ``log_every`` steps and at the end, what the step returned and ``evaluate(steps done)`` go to
    ``out/metrics.jsonl``; every ``config.checkpoint_every`` steps and at the end, ``state`` goes to
    ``out/checkpoint.pt``. All randomness of a step must follow from its number: then a resumed run gives the
    numbers of an uninterrupted one.

    Args:
        state: all that steps change, by name.
    """
    files = _Files(run)
    first, history = files.load(state) if run.resume else (0, [])
    files.write_history(history)
    for k in range(first, steps):
        metrics = step(k)
        done = k + 1
        if done % log_every == 0 or done == steps:
            history.append({"step": done, **_mean_over_ranks(metrics, run.group), **evaluate(done)})
            files.append(history[-1])
        if done % run.config.checkpoint_every == 0 or done == steps:
            files.save(done, state, history)
        if run.progress is not None:
            run.progress(done, steps)
    return history


def _mean_over_ranks(metrics: StepMetrics, group: Group) -> Metrics:
    numbers = torch.tensor([float(value) for value in metrics.values()], dtype=torch.float64)
    means = all_reduce_sum(numbers, group) / world_size(group)
    return dict(zip(metrics, means.tolist(), strict=True))


class _Files:
    """The checkpoint and the metrics file of one run."""

    def __init__(self, run: Run) -> None:
        self.config = dataclasses.asdict(run.config)
        self.checkpoint = None if run.out is None else Path(run.out) / "checkpoint.pt"
        self.writes = run.out is not None and rank(run.group) == 0
        self.metrics = Path(run.out) / "metrics.jsonl" if run.out is not None and self.writes else None
        if self.metrics is not None:
            self.metrics.parent.mkdir(parents=True, exist_ok=True)

    def load(self, state: Mapping[str, Stateful]) -> tuple[int, list[Metrics]]:
        if self.checkpoint is None or not self.checkpoint.exists():
            return 0, []
        saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if saved["config"] != self.config:
            differing = [name for name in self.config if saved["config"].get(name) != self.config[name]]
            then = {name: saved["config"].get(name) for name in differing}
            now = {name: self.config[name] for name in differing}
            reject(
                "config", f"that of {self.checkpoint}, {then}", now, "choose another folder or resume=False"
            )
        for name, part in state.items():
            part.load_state_dict(saved["state"][name])
        return saved["step"], saved["history"]

    def save(self, step: int, state: Mapping[str, Stateful], history: list[Metrics]) -> None:
        if self.checkpoint is None or not self.writes:
            return
        parts = {name: part.state_dict() for name, part in state.items()}
        content = {"config": self.config, "step": step, "state": parts, "history": history}
        # A run that dies while it writes must leave the last checkpoint whole.
        unfinished = self.checkpoint.with_suffix(".unfinished")
        torch.save(content, unfinished)
        os.replace(unfinished, self.checkpoint)

    def write_history(self, history: list[Metrics]) -> None:
        if self.metrics is not None:
            self.metrics.write_text("".join(json.dumps(entry) + "\n" for entry in history))

    def append(self, entry: Metrics) -> None:
        if self.metrics is not None:
            with self.metrics.open("a") as file:
                file.write(json.dumps(entry) + "\n")
