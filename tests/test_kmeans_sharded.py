"""Rows spread over ranks give the result of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import kmeans_worker
import numpy as np
import pytest
import torch
import torch.distributed as dist
from support import assert_message, generator, run_ranks
from torch import Tensor

import clustops
from clustops.checks import ClustopsWarning
from clustops.kmeans import KMeansResult, kmeans

SHARDS = {
    "unequal": [0, 90, 120],
    "an empty one": [0, 0, 120],
    "tiny": [0, 119, 120],
    "four": [0, 5, 5, 77, 120],
}


def problem(batch: int) -> tuple[Tensor, Tensor]:
    """Rows of magnitudes so different that float64 sums depend on their order."""
    x = torch.randn(batch, 120, 3, generator=generator(1), dtype=torch.float64)
    x *= torch.exp(3 * torch.randn(batch, 120, 1, generator=generator(3), dtype=torch.float64))
    x[:, 60:90] = x[:, :1]
    weights = torch.rand(batch, 120, generator=generator(2))
    weights[:, ::7] = 0
    return x, weights


def options() -> list[dict[str, Any]]:
    far = torch.cat([problem(2)[0][:, :4], torch.full((2, 8, 3), 1e3)], dim=1)
    return [
        {"init": init, "empty": empty, "metric": metric, "n_init": 2, "max_iter": 6, "seed": 4}
        for init, empty, metric in [
            ("k-means++", "split", "l2"),
            ("random", "random", "cosine"),
            (far, "split", "l2"),
            (far, "farthest", "l2"),
            (far, "random", "cosine"),
            (far, "keep", "l2"),
        ]
    ]


def all_results(x: Tensor, weights: Tensor, lengths: Tensor, group: Any) -> list[KMeansResult]:
    return [
        kmeans(x, 12, weights=w, lengths=n, group=group, **chosen)
        for chosen in options()
        for w, n in ((None, None), (weights, None), (None, lengths))
    ]


def sharded(rank: int, world: int, cuts: list[int]) -> list[KMeansResult]:
    x, weights = problem(2)
    rows = slice(cuts[rank], cuts[rank + 1])
    lengths = torch.tensor([cuts[rank + 1] - cuts[rank]] * 2)
    return all_results(x[:, rows], weights[:, rows], lengths, torch.distributed.group.WORLD)


@pytest.mark.parametrize("cuts", SHARDS.values(), ids=SHARDS.keys())
def test_labels_centroids_and_counts_equal_the_single_process_bit_for_bit(cuts: list[int]) -> None:
    x, weights = problem(2)
    alone = all_results(x, weights, torch.tensor([120, 120]), None)
    ranks = run_ranks(len(cuts) - 1, sharded, cuts)
    for i, expected in enumerate(alone):
        for name, value in vars(expected).items():
            parts = [getattr(results[i], name) for results in ranks]
            if name == "labels":
                assert torch.equal(torch.cat(parts, dim=1), value)
            else:
                assert all(torch.equal(part, value) for part in parts), name


def surplus(rank: int, world: int) -> tuple[int, int]:
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", ClustopsWarning)
        found = kmeans(torch.ones(3 * rank + 1, 2), 4, group=torch.distributed.group.WORLD)
    return int(found.n_empty), sum(issubclass(w.category, ClustopsWarning) for w in raised)


def test_fewer_distinct_rows_than_clusters_over_all_ranks_are_reported_on_each() -> None:
    assert run_ranks(2, surplus) == [(3, 1), (3, 1)]


def too_many(rank: int, world: int) -> str:
    try:
        kmeans(torch.ones(2, 2), 5, group=torch.distributed.group.WORLD)
    except ValueError as error:
        return str(error)
    return "no error"


def test_k_is_held_against_the_rows_of_all_ranks() -> None:
    assert all("number of rows, 4, got 5" in message for message in run_ranks(2, too_many))


# --- processes of their own, files as shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of magnitudes so different that float64 sums depend on their order, in three files."""
    x = problem(1)[0][0]
    np.save(tmp_path / "float32.npy", x.float().numpy())
    np.save(tmp_path / "float64.npy", x.numpy())
    np.save(tmp_path / "bfloat16.npy", x.bfloat16().view(torch.int16).numpy())
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    paths = [str(Path(clustops.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("cuts", [[0, 37, 120], [0, 5, 5, 77, 120]], ids=["two", "four"])
def test_ranks_of_torchrun_give_the_result_of_one_process_bit_for_bit(cuts: list[int], folder: Path) -> None:
    ranks = len(cuts) - 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [kmeans_worker.__file__, str(folder), *map(str, cuts)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr
    alone = kmeans_worker.results(folder, slice(0, 120), None)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    for case, expected in alone.items():
        for name, value in expected.items():
            parts = [results[case][name] for results in found]
            if name == "labels":
                assert torch.equal(torch.cat(parts), value), case
            else:
                assert all(torch.equal(part, value) for part in parts), (case, name)


def test_a_rank_that_dies_ends_the_others_with_an_error(folder: Path) -> None:
    (folder / "fail").touch()
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, kmeans_worker.__file__, str(folder), "0", "60", "120"],
            env=environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=100)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    # 1, or what an abort gives: Gloo's own threads may end a process whose peer has gone.
    assert all(process.returncode != 0 for process in ranks), errors
    assert "the disk is gone" in errors[1]
    assert "Error" in errors[0]
    assert "the disk is gone" not in errors[0]


# --- what goes over the wire


def traffic(rank: int, world: int, max_iter: int, k: int, d: int) -> list[int]:
    """Bytes of each collective of one run."""
    sizes = []

    def counted(call: Any) -> Any:
        def collective(tensor: Any, *args: Any, **options: Any) -> Any:
            sizes.append(sum(t.nbytes for t in tensor) if isinstance(tensor, list) else tensor.nbytes)
            return call(tensor, *args, **options)

        return collective

    x = torch.randn(400, d, generator=generator(rank))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast", "barrier"):
            patch.setattr(dist, name, counted(getattr(dist, name)))
        kmeans(x, k, init=torch.ones(k, d).cumsum(0) / k, max_iter=max_iter, tol=0, group=dist.group.WORLD)
    return sizes


def test_an_iteration_is_one_all_reduce_of_the_sums_and_counts() -> None:
    k, d = 5, 7
    short, long = ([sorted(sizes) for sizes in run_ranks(2, traffic, n, k, d)] for n in (3, 5))
    for before, after in zip(short, long, strict=True):
        for _ in range(2):
            after.remove(8 * k * (2 * (d + 1) + 1))
        assert before == after


# --- bad input on one rank


def one_bad_row(rank: int, world: int, bad: float) -> str:
    x = torch.randn(20, 3, generator=generator(rank))
    if rank == 1:
        x[7, 1] = bad
    with pytest.raises(ValueError, match="finite") as raised:
        kmeans(x, 3, group=dist.group.WORLD)
    assert_message(raised.value, "x must be finite", "NaN or infinite", "remove or mask")
    return str(raised.value)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_every_rank_rejects_what_one_has(bad: float) -> None:
    assert len(set(run_ranks(3, one_bad_row, bad))) == 1
