from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import simt
import torch
from hypothesis import HealthCheck, settings
from paths import EVERYWHERE, ON_CPU, instruction_sets, served_by

from clustops import native

# For the benchmarks package; last, so that an installed clustops comes before these sources.
sys.path.append(str(Path(__file__).parents[1]))

# Tests that run beside each other share the cores; what they start inherits the same.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

settings.register_profile(
    "clustops", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("clustops")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU here")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)


@pytest.fixture(params=instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each set of CPU kernels that this machine can run, in use for the test."""
    before = native.extension.instruction_set()
    native.extension.use_instruction_set(request.param)
    yield request.param
    native.extension.use_instruction_set(before)


@pytest.fixture(params=EVERYWHERE)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Everything that may serve the ops, in use for the test."""
    with served_by(request.param):
        yield request.param


@pytest.fixture(params=ON_CPU)
def cpu_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """As ``path``, without the GPU, which forked processes cannot use."""
    with served_by(request.param):
        yield request.param


@pytest.fixture(scope="session")
def contrastive_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels of the class losses on the CPU: compiled once for all modules that run them."""
    kernels = [f"contrastive{part}.cu" for part in ("", "_backward", "_prepare", "_sm90")]
    return simt.build(tmp_path_factory.mktemp("simt"), "contrastive_gpu", *kernels)
