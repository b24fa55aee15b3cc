"""What every test gets: one thread, a fixed seed, and shapes checked at run time."""

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up by name)

# Before anything imports hd_core: a tensor of the wrong rank, or two that disagree on a named size, fails its test.
# hd_core.metrics is left out: its row counts differ under one letter.
CHECKED = ("types", "random", "paths", "times", "solvers", "guidance", "ema", "step", "networks", "objectives")
install_import_hook([f"hd_core.{name}" for name in CHECKED], "tests.typecheck.check")

settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _strict():  # pyright: ignore[reportUnusedFunction]
    """One thread (the tensors are tiny, the cores shared) and a seed for the networks' initial weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
