"""What README.md shows runs, and what it names exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import clustops

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[2][:20])
def test_an_example_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        exec(compile(block, "README.md", "exec"), {})


def test_every_public_name_that_readme_uses_exists() -> None:
    for name in re.findall(r"clustops\.([A-Za-z_]+)\(", README):
        assert hasattr(clustops, name), name


def test_every_public_op_has_a_reference_with_its_signature() -> None:
    for name in clustops.reference.__all__:
        public = list(inspect.signature(getattr(clustops, name)).parameters)
        twin = list(inspect.signature(getattr(clustops.reference, name)).parameters)
        extra = [p for p in public if p not in twin]
        assert twin == [p for p in public if p in twin], name
        assert set(extra) <= {"group", "device", "progress", "callback", "precision", "out"}, (name, extra)


def test_every_public_name_is_documented() -> None:
    for name in clustops.__all__:
        assert getattr(clustops, name).__doc__, name
