"""Shipped recipes that need a teacher and data of one's own, from nothing, at a size that takes seconds."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipelines.plan import print_plan
from pipelines.recipe import load
from tests.pipelines.tiny import hdistill

SMALL = ("teacher_training.num_steps=2", "teacher_training.batch_size=8", "teacher_training.depth=4")


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with an archive as Fashion-MNIST's, of noise."""
    random = np.random.default_rng(0)
    parts = {
        f"{kind}_{part}": random.integers(0, 256 if kind == "x" else 10, (rows, *shape)).astype(np.uint8)
        for part, rows in (("train", 64), ("test", 40))
        for kind, shape in (("x", (28, 28)), ("y", ()))
    }
    np.savez(tmp_path / "fashion_mnist.npz", **parts)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(*changes: str) -> list[str]:
    return [word for change in changes for word in ("--set", change)]


def test_a_teacher_and_a_feature_net_of_ones_own_and_then_the_plan(fashion: Path):
    recipe = load("fashion_hd", SMALL)
    with pytest.raises(ValueError, match="is not trained yet: run `hdistill teacher`"):
        print_plan(recipe, fashion / "run", Console(quiet=True))
    assert hdistill("teacher", "fashion_hd", *settings(*SMALL)).output.startswith("wrote teachers/fashion")
    assert hdistill("teacher", "fashion_hd", *settings(*SMALL)).output.startswith("there already")
    assert hdistill("features", "fashion_hd", "--out", "nets/fashion", "--steps", "2").exit_code == 0
    print_plan(recipe, fashion / "run", Console(quiet=True))
