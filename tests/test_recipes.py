from __future__ import annotations

import dataclasses
import doctest
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import assert_message, generator, run_ranks
from torch import Tensor

from clustops.recipes import (
    augment,
    ccssl,
    clustering,
    daino,
    deepcluster,
    deepcluster_v2,
    networks,
    probe,
    prototypes,
    suave,
    supervised,
    training,
)
from clustops.recipes.augment import Strength
from clustops.recipes.data import ImageData, labelled_subset, load
from clustops.recipes.training import Result

# A few steps of each system. Checkpoints fall between logged steps and between the epochs of DeepCluster.
_PROTOTYPES: dict[str, Any] = {
    "pretrain_steps": 5,
    "pretrain_batch": 24,
    "n_prototypes": 12,
    "steps": 4,
    "finetune_steps": 2,
    "batch": 24,
    "labelled_batch": 20,
    "mix": "cutmix",
    "log_every": 2,
    "checkpoint_every": 3,
}
_FIXMATCH: dict[str, Any] = {
    "steps": 5,
    "batch": 20,
    "mu": 1,
    "threshold": 0.1,
    "log_every": 2,
    "checkpoint_every": 3,
}
SHORT: dict[str, tuple[ModuleType, Any]] = {
    "supervised": (supervised, supervised.Config(steps=5, log_every=2, checkpoint_every=3)),
    "fixmatch": (ccssl, ccssl.Config(method="fixmatch", **_FIXMATCH)),
    "two views": (ccssl, ccssl.Config(method="fixmatch_two_views", **_FIXMATCH)),
    "ccssl": (ccssl, ccssl.Config(method="ccssl", push_threshold=0.12, **_FIXMATCH)),
    "suave": (suave, suave.Config(queue=64, **_PROTOTYPES)),
    "daino": (daino, daino.Config(**_PROTOTYPES)),
    "deepcluster": (
        deepcluster,
        deepcluster.Config(
            epochs=2, batch=40, n_clusters=12, probe_seeds=1, kmeans_iterations=3, checkpoint_every=3
        ),
    ),
    "deepcluster-v2": (
        deepcluster_v2,
        deepcluster_v2.Config(
            epochs=2, batch=40, n_clusters=12, heads=2, kmeans_iterations=3, checkpoint_every=3
        ),
    ),
}
every_system = pytest.mark.parametrize("name", SHORT)


def few(n_train: int = 160, n_test: int = 60) -> ImageData:
    data = load("digits")
    return dataclasses.replace(
        data,
        train_images=data.train_images[:n_train],
        train_labels=data.train_labels[:n_train],
        test_images=data.test_images[:n_test],
        test_labels=data.test_labels[:n_test],
    )


def train(name: str, **options: Any) -> Result:
    module, config = SHORT[name]
    result: Result = module.train(few(), config, **options)
    return result


class Killed(Exception):
    pass


def killer(step: int) -> training.Progress:
    """Ends the run after ``step`` steps, of all its stages together."""
    left = [step]

    def progress(done: int, steps: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return progress


# laws of all systems


@every_system
def test_one_seed_gives_one_result_and_touches_no_global_generator(name: str) -> None:
    before = torch.get_rng_state()
    first = train(name)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = train(name)
    assert first.history == second.history
    assert first.accuracy == second.accuracy
    module, config = SHORT[name]
    other = module.train(few(), dataclasses.replace(config, seed=1))
    assert other.history != first.history


# In Suave and Daino the tenth step is the fifth after pre-training.
@pytest.mark.parametrize(
    ("name", "step"), [(name, step) for name in SHORT for step in (1, 4)] + [("suave", 10), ("daino", 10)]
)
def test_a_killed_run_resumes_to_the_numbers_of_an_uninterrupted_one(
    name: str, step: int, tmp_path: Path
) -> None:
    whole = train(name, out=tmp_path / "whole")
    with pytest.raises(Killed):
        train(name, out=tmp_path / "killed", progress=killer(step))
    resumed = train(name, out=tmp_path / "killed", resume=True)
    assert resumed.history == whole.history
    assert resumed.accuracy == whole.accuracy
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "killed")]
    assert lines[0] == lines[1]
    assert [json.loads(line) for line in lines[0]] == whole.history


@every_system
def test_a_finished_run_resumes_to_its_own_result(name: str, tmp_path: Path) -> None:
    whole = train(name, out=tmp_path)
    again = train(name, out=tmp_path, resume=True)
    assert again.history == whole.history
    assert again.accuracy == whole.accuracy


@every_system
def test_labels_of_unlabelled_images_are_never_seen(name: str) -> None:
    data = few()
    kept = labelled_subset(data.train_labels, 4, 0)
    hidden = torch.full_like(data.train_labels, -1)
    hidden[kept] = data.train_labels[kept]
    module, config = SHORT[name]
    seen = module.train(data, config)
    blind = module.train(dataclasses.replace(data, train_labels=hidden), config)
    for a, b in zip(seen.history, blind.history, strict=True):
        # Known labels may be compared with, for the log alone.
        for entry in (a, b):
            entry.pop("nmi_labels", None)
            entry.pop("true_pairs", None)
        assert a == b


def _losses(rank: int, world: int, name: str) -> list[dict[str, float]]:
    import torch.distributed as dist

    module, config = SHORT[name]
    # So that every step is logged; DeepCluster logs epochs.
    each = {"batch": 160, "epochs": 4} if name.startswith("deepcluster") else {"log_every": 1}
    config = dataclasses.replace(config, **each)
    result: Result = module.train(few(), config, group=dist.group.WORLD if world > 1 else None)
    return result.history


@every_system
def test_two_ranks_reach_the_losses_of_one_process_with_the_joint_batch(name: str) -> None:
    alone = _losses(0, 1, name)
    for history in run_ranks(2, _losses, name):
        assert len(history) == len(alone)
        assert history[0]["loss"] == pytest.approx(alone[0]["loss"], rel=2e-5)
        assert history[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=2e-3)


@pytest.mark.parametrize(
    ("name", "changes", "least"),
    [
        ("supervised", {"steps": 60, "ema": 0.9}, 0.7),
        ("fixmatch", {"steps": 80, "ema": 0.9, "threshold": 0.9}, 0.7),
        ("ccssl", {"steps": 80, "ema": 0.9, "threshold": 0.9}, 0.7),
        ("suave", {"pretrain_steps": 40, "steps": 80, "mix": "none", "queue": 0}, 0.6),
        ("daino", {"pretrain_steps": 40, "steps": 80, "mix": "none"}, 0.6),
        ("deepcluster", {"epochs": 8}, 0.7),
        ("deepcluster-v2", {"epochs": 8}, 0.6),
    ],
)
def test_a_short_run_learns(name: str, changes: dict[str, Any], least: float) -> None:
    module, config = SHORT[name]
    result = module.train(few(320, 200), dataclasses.replace(config, **changes))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.accuracy > least


def test_a_checkpoint_of_other_settings_is_refused_with_both_values(tmp_path: Path) -> None:
    module, config = SHORT["supervised"]
    module.train(few(), config, out=tmp_path)
    with pytest.raises(ValueError, match="config must be") as error:
        module.train(few(), dataclasses.replace(config, lr=0.5), out=tmp_path, resume=True)
    assert_message(error.value, "config", "'lr': 0.03", "'lr': 0.5")


def test_a_run_that_dies_while_it_saves_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("supervised")

    def half_a_file(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        save = torch.save
        patch.setattr(
            torch, "save", lambda c, path: save(c, path) if c["step"] == 3 else half_a_file(c, path)
        )
        with pytest.raises(Killed):
            train("supervised", out=tmp_path)
    assert train("supervised", out=tmp_path, resume=True).history == whole.history


# what the systems share


def test_every_epoch_of_batches_is_a_permutation() -> None:
    steps = [training.batch_indices(7, 3, seed=1, stream="s", step=k) for k in range(14)]
    drawn = torch.cat(steps)
    for epoch in drawn.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert len({tuple(epoch.tolist()) for epoch in drawn.split(7)}) > 1


def test_a_batch_larger_than_the_set_spans_epochs() -> None:
    batch = training.batch_indices(3, 8, seed=0, stream="s", step=1)
    assert batch.shape == (8,)
    assert sorted(batch[1:7].tolist()) == [0, 0, 1, 1, 2, 2]


def test_seeds_of_streams_and_steps_differ() -> None:
    keys = [(s, name, k) for s in range(3) for name in ("a", "b") for k in range(3)]
    assert len({training.derive(*key) for key in keys}) == len(keys)


def test_weight_decay_leaves_biases_and_normalisation_alone() -> None:
    model = networks.Classifier(networks.encoder("small", 1), 10)
    decayed, free = training.weight_groups(model, 0.1)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert {id(p) for g in (decayed, free) for p in g["params"]} == {id(p) for p in model.parameters()}
    assert free["weight_decay"] == 0


def test_the_average_moves_towards_the_model() -> None:
    slow, fast = (networks.BatchNorm(1) for _ in range(2))
    fast.running_mean.fill_(1.0)
    training.move_towards(slow, fast, 0.75)
    assert slow.running_mean == pytest.approx(0.25)


def test_schedules_begin_and_end_where_they_should() -> None:
    assert training.cosine(0, 10, 2.0, 1.0) == 2.0
    assert training.cosine(10, 10, 2.0, 1.0) == pytest.approx(1.0)
    assert training.decayed_cosine(0, 10) == 1.0
    assert training.decayed_cosine(10, 10) == pytest.approx(0.19509, abs=1e-5)


def test_the_linear_probe_is_logistic_regression() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = torch.randn(60, 5, generator=generator(0)), torch.arange(60) % 3
    weight, bias = probe.linear_probe(x, y, 3, penalty=0.5)
    judge = linear_model.LogisticRegression(C=2.0, tol=1e-8, max_iter=1000).fit(x.numpy(), y.numpy())
    expected = torch.from_numpy(judge.predict_proba(x.numpy())).double()
    torch.testing.assert_close((x.double() @ weight + bias).softmax(1), expected, rtol=1e-3, atol=1e-4)


# networks


def _normalised(rank: int, world: int) -> list[Tensor]:
    import torch.distributed as dist

    x = torch.randn(12, 3, 2, 2, generator=generator(0), dtype=torch.float64)
    target = torch.randn(12, 3, 2, 2, generator=generator(1), dtype=torch.float64)
    norm = networks.BatchNorm(3, group=dist.group.WORLD if world > 1 else None).double()
    own = x.tensor_split(world)[rank].requires_grad_()
    out = norm(own)
    loss = (out * target.tensor_split(world)[rank]).square().mean()
    loss.backward()
    training.average_gradients(norm.parameters(), norm.group)
    assert own.grad is not None
    assert norm.weight.grad is not None
    # Gradients of a mean over ranks.
    return [out.detach(), own.grad / world, norm.weight.grad, norm.running_mean, norm.running_var]


def test_batch_norm_over_ranks_is_that_of_the_joint_batch() -> None:
    alone = _normalised(0, 1)
    ranks = run_ranks(2, _normalised)
    for i in range(2):
        torch.testing.assert_close(torch.cat([r[i] for r in ranks]), alone[i])
    for i in range(2, 5):
        for r in ranks:
            torch.testing.assert_close(r[i], alone[i])


def test_sobel_filters_see_edges_and_nothing_else() -> None:
    flat = networks.SobelFilters()(torch.ones(1, 3, 6, 6))
    assert flat[..., 1:-1, 1:-1].abs().max() == 0
    ramp = torch.arange(6.0).expand(1, 3, 6, 6)
    edges = networks.SobelFilters()(ramp)[0, :, 2, 2]
    assert edges[0] == -8
    assert edges[1] == 0


@pytest.mark.parametrize("name", networks.ENCODERS)
def test_encoders_give_features_of_the_promised_width(name: str) -> None:
    with torch.no_grad():
        made = networks.seeded(0, lambda: networks.encoder(name, 3))
        assert made(torch.rand(2, 3, 16, 16)).shape == (2, made.n_features)


def test_the_small_encoder_has_twenty_three_thousand_weights() -> None:
    made = networks.encoder("small", 1)
    assert sum(p.numel() for p in made.parameters() if p.dim() > 1) == 23184


def test_wide_resnet_28_2_has_one_and_a_half_million_weights() -> None:
    made = networks.encoder("wrn-28-2", 3)
    assert sum(p.numel() for p in made.parameters()) + 1290 == 1_467_610


def test_an_unknown_network_is_refused() -> None:
    with pytest.raises(ValueError, match="network must be") as error:
        networks.encoder("resnet-1000", 3)
    assert_message(error.value, "network", "'small'", "'resnet-1000'")


# augmentation


def test_no_strength_changes_nothing() -> None:
    images = torch.rand(5, 3, 8, 8, generator=generator(0))
    torch.testing.assert_close(augment.augment(images, Strength(), generator(1)), images)


@pytest.mark.parametrize("strength", [augment.DIGITS_STRONG, augment.PHOTO_STRONG, augment.PHOTO_LOCAL])
def test_a_rank_gets_its_rows_of_the_joint_views(strength: Strength) -> None:
    images = torch.rand(6, 3, 8, 8, generator=generator(0))
    whole = augment.augment(images, strength, generator(1))
    rows = slice(2, 4)
    part = augment.augment(images[rows], strength, generator(1), rows=rows, total=6)
    torch.testing.assert_close(part, whole[rows])


@pytest.mark.parametrize("name", [n for n in vars(augment) if n.startswith(("DIGITS", "PHOTO"))])
def test_named_strengths_change_images_and_keep_them_images(name: str) -> None:
    strength = getattr(augment, name)
    images = (torch.rand(4, 3, 12, 12, generator=generator(0)) * 255).to(torch.uint8)
    views = augment.augment(images, strength, generator(1))
    side = strength.size or 12
    assert views.shape == (4, 3, side, side)
    assert views.dtype == torch.float32
    assert bool(views.isfinite().all())
    assert side != 12 or not torch.allclose(views, training.to_float(images))


def test_cutout_blanks_a_square_of_at_most_its_side() -> None:
    views = augment.augment(torch.ones(200, 1, 8, 8), Strength(cutout=3), generator(0))
    blank = (views == 0).sum((1, 2, 3))
    assert blank.max() == 9
    assert blank.min() >= 4
    # Every pixel is blanked in some view.
    assert bool((views == 0).any(0).all())


def test_a_flip_mirrors_half_of_the_images() -> None:
    images = torch.arange(8.0).expand(400, 1, 8, 8) / 8
    views = augment.augment(images, Strength(flip=True), generator(0))
    flipped = views[:, 0, 0, 0] > views[:, 0, 0, -1]
    assert 150 < int(flipped.sum()) < 250
    torch.testing.assert_close(views[flipped], images[flipped].flip(3))


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_images_carry_the_labels_in_proportion(how: str) -> None:
    n = 40
    targets = F.one_hot(torch.arange(n) % 2, 2).float()
    # Images of class 1 are white: the share of white is the target.
    images = targets[:, 1].view(n, 1, 1, 1).expand(n, 1, 8, 8)
    mixed, mixed_targets = augment.mix_images(images, targets, generator(0), how=how)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), mixed_targets[:, 1])
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(n))
    assert ((mixed_targets > 0.05) & (mixed_targets < 0.95)).any()


def test_half_mixtures_join_two_images() -> None:
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 4, 4)
    mixtures = augment.half_mixtures(images, 30, generator(0))
    assert mixtures.shape == (30, 1, 4, 4)
    assert bool((mixtures[..., :2] == mixtures[:, :, :1, :1]).all())
    assert bool((mixtures[..., 2:] == mixtures[:, :, :1, -1:]).all())
    assert bool((mixtures[..., 0] != mixtures[..., -1]).any())


# single systems


@pytest.mark.parametrize("method", ["raw", "untrained"])
def test_baselines_without_training_beat_chance(method: Any) -> None:
    assert supervised.train(load("digits"), supervised.Config(method=method)).accuracy > 0.6


def test_weak_and_strong_supervision_differ_in_the_views_alone() -> None:
    config = SHORT["supervised"][1]
    same = dataclasses.replace(config, strong=config.weak)
    assert (
        supervised.train(few(), dataclasses.replace(config, method="weak")).history
        == supervised.train(few(), same).history
    )


def test_labelled_and_first_unlabelled_views_are_weak() -> None:
    config = dataclasses.replace(SHORT["ccssl"][1], weak=Strength())
    data, labelled = training.prepare(few(), 4, 0, "cpu")
    known, unknown, views = ccssl._views(data, labelled, config, 0, None)
    plain, weak, strong, second = views.split([20] * 4)
    torch.testing.assert_close(plain, data.train_images[known])
    torch.testing.assert_close(weak, data.train_images[unknown])
    assert not torch.allclose(strong, weak, atol=0.1)
    assert not torch.allclose(second, weak, atol=0.1)


def test_weights_of_pairs_by_hand() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    confidence = torch.tensor([1.0, 0.5, 0.8, 0.9])
    truth = torch.tensor([0, 0, -1, 1])
    # Pairs (0,1), (0,2), (1,2) weigh 0.5, 0.8, 0.4; only the first is true. Each counts from both sides.
    every, true = ccssl.pair_weights(labels, confidence, truth, None)
    assert float(every) == pytest.approx(2 * 1.7 / 4)
    assert float(true) == pytest.approx(2 * 0.5 / 4)
    assert ccssl.pair_weights(labels, confidence, truth, 0.75)[0] == pytest.approx(2 * 0.8 / 4)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_rows_weigh_the_two_losses_of_suave(weight: float) -> None:
    config = dataclasses.replace(SHORT["suave"][1], label_weight=weight)
    last = suave.train(few(), dataclasses.replace(config, finetune_steps=0)).history[-1]
    # 24 images in four views; 20 labelled rows and as many mixed ones.
    rows, labelled = 4 * 24, weight * 40
    expected = (rows * last["loss_unlabelled"] + labelled * last["loss_labelled"]) / (rows + labelled)
    assert last["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("module", [suave, daino])
def test_a_pretraining_is_shared_as_result_or_file(module: Any, tmp_path: Path) -> None:
    config = SHORT[module.__name__.rpartition(".")[2]][1]
    whole = module.train(few(), config, out=tmp_path)
    first = module.train(few(), dataclasses.replace(config, stage="pretrain"))
    assert module.train(few(), config, pretrained=first).history == whole.history
    file = tmp_path / "pretrain" / "checkpoint.pt"
    assert module.train(few(), config, pretrained=file).history == whole.history


def test_a_system_starts_from_the_pretrained_weights_but_for_the_prototypes() -> None:
    config = SHORT["suave"][1]
    first = suave.train(few(), dataclasses.replace(config, stage="pretrain"))
    model = prototypes.build(few(), config, 10, None)
    prototypes.start_from(model, first)
    for name, weights in model.state_dict().items():
        assert torch.equal(weights, first.extras["model"][name]) == (name != "prototypes")


def test_only_a_pretraining_is_a_start() -> None:
    with pytest.raises(ValueError, match="pretrained must be") as error:
        suave.train(few(), SHORT["suave"][1], pretrained=Result("supervised-raw", 0.5, []))
    assert_message(error.value, "pretrained", "supervised-raw", "stage=")


def test_prototypes_start_at_class_means_or_at_random() -> None:
    data, config = few(), SHORT["suave"][1]
    data, labelled = training.prepare(data, 4, 0, "cpu")
    model = prototypes.build(data, config, 10, None)
    random = model.prototypes.detach().clone()
    prototypes.use_class_means(model, data, labelled)
    assert not torch.allclose(model.prototypes, random)
    model.eval()
    with torch.no_grad():
        scores = model(data.train_images[labelled])
    assert float((scores.argmax(1) == data.train_labels[labelled]).float().mean()) > 0.6


def _drawn(**flags: Any) -> tuple[Tensor, Tensor]:
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([10, 20, 30, 140]))
    labels = labels[torch.randperm(200, generator=generator(0))]
    settings = {"balance": True, "published_indices": False, **flags}
    order = clustering.epoch_order(labels, 200, seed=0, epoch=0, **settings)
    return torch.bincount(labels[order], minlength=4), torch.bincount(labels, minlength=4)


def test_deepcluster_draws_clusters_evenly() -> None:
    assert _drawn()[0].tolist() == [50] * 4


def test_without_balancing_draws_follow_cluster_sizes() -> None:
    drawn, sizes = _drawn(balance=False)
    assert torch.equal(drawn, sizes)


def test_with_the_published_indices_draws_follow_cluster_sizes() -> None:
    drawn, sizes = (x.double() for x in _drawn(published_indices=True))
    assert torch.corrcoef(torch.stack([drawn, sizes]))[0, 1] > 0.95


def test_deepcluster_reports_its_clusters() -> None:
    result = train("deepcluster")
    first, last = result.history
    assert "nmi_previous" not in first
    assert 0 <= last["nmi_previous"] <= 1
    assert last["smallest"] <= last["median"] <= last["largest"]
    assert last["empty_after"] == 0
    assert 1 <= last["effective"] <= 12
    for name in ("sizes_before_repair", "sizes_after_repair", "sizes", "drawn"):
        assert int(result.extras[name].sum()) == 160
    assert len(result.extras["probe_by_layer"]) == 3


@pytest.mark.parametrize(
    "flags",
    [{"init": "warm"}, {"init": "random", "empty": "keep"}, {"sobel": True}, {"published_indices": True}],
)
def test_settings_of_deepcluster_run(flags: dict[str, Any]) -> None:
    module, config = SHORT["deepcluster"]
    assert 0 <= module.train(few(), dataclasses.replace(config, **flags)).accuracy <= 1


def test_the_published_settings_make_a_step() -> None:
    config = dataclasses.replace(ccssl.published("cifar10", 1), steps=1, batch=2, mu=1)
    images = (torch.rand(8, 3, 32, 32, generator=generator(0)) * 255).to(torch.uint8)
    labels = torch.arange(8) % 2
    data = ImageData("tiny", images, labels, images[:2], labels[:2], 2)
    assert ccssl.train(data, config).history[0]["loss"] > 0


@pytest.mark.parametrize("module", [augment, networks, probe, prototypes, training, ccssl, suave, daino])
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0
