"""Sinkhorn over processes that torchrun starts equals one process with all rows."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import sinkhorn_worker
import torch
from support import assert_close

import clustops

pytestmark = pytest.mark.filterwarnings("ignore::clustops.checks.ClustopsWarning")

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def environment(**more: str) -> dict[str, str]:
    paths = [str(Path(clustops.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}


@pytest.mark.parametrize("cuts", [[0, 37, 61], [0, 5, 5, 50, 61]], ids=["two", "four, one without rows"])
def test_ranks_of_torchrun_give_the_result_of_one_process(cuts: list[int], tmp_path: Path) -> None:
    ranks = len(cuts) - 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [sinkhorn_worker.__file__, str(tmp_path), *map(str, cuts)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    whole = slice(0, sinkhorn_worker.N)
    for dtype in DTYPES:
        parts = [results[str(dtype)] for results in found]
        for name, alone in sinkhorn_worker.results(dtype, whole, None).items():
            for part in parts:
                assert_close(part[name], alone, alone.dtype)
        alone, gradient = sinkhorn_worker.loss(dtype, whole, None)
        assert_close(torch.stack([part["loss"] for part in parts]).mean(), alone, alone.dtype)
        for part in parts:
            assert_close(part["gradient"] / ranks, gradient, dtype)


@pytest.mark.parametrize("how", ["raised", "killed"])
def test_a_rank_that_dies_ends_the_others_with_an_error(how: str, tmp_path: Path) -> None:
    (tmp_path / "fail").write_text(how)
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, sinkhorn_worker.__file__, str(tmp_path), "0", "30", "61"],
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
    assert all(process.returncode for process in ranks)  # torch may abort as it takes a broken group down
    assert "Error" in errors[0]
    assert "the disk is gone" not in errors[0]
    assert ("the disk is gone" in errors[1]) == (how == "raised")
