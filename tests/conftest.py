from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# For the benchmarks package; last, so that an installed clustops comes before these sources.
sys.path.append(str(Path(__file__).parents[1]))

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
