"""The README's commands exist, and its lines of Python read what this project writes."""

import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import yaml

from pipelines import recipe as recipes
from pipelines.cli import main
from pipelines.shards import ShardSet, ShardSetSpec, write_shard

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("line", [line for line in commands() if line[0] == "hdistill"], ids=" ".join)
def test_hdistill_lines_are_understood(line: list[str]):
    context = click.Context(main, **main.context_settings)
    name, command, rest = main.resolve_command(context, line[1:])
    assert command is not None and name is not None
    command.make_context(name, rest, parent=context)


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
RECIPES = [block for block in BLOCKS if not block.startswith("cluster_name:")]  # those are Ray's, and tested elsewhere


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text.split("{")[0].split()[-1])
def test_pieces_of_recipes_load(text: str):
    around = {"name": "shown", "stages": {"sketch": {"objective": {"name": "mean_velocity"}}}}
    shown = yaml.safe_load(text)
    assert recipes.from_dict({**around, **shown}).to_dict().keys() >= shown.keys()


def test_make_lines_are_targets():
    targets = set(re.findall(r"^([a-z.]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for line in commands() if line[0] == "make"]
    assert {"demo", "test"} <= {line[1] for line in lines} <= targets
    assert "hdistill run digits" in (ROOT / "Makefile").read_text()


def test_python_lines_read_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = np.arange(4 * 3 * 1 * 2 * 2, dtype="float16").reshape(4, 3, 1, 2, 2)
    spec = ShardSetSpec(
        kind="trajectories",
        rows=4,
        shard_rows=4,
        dtype="float16",
        shape=(3, 1, 2, 2),
        inputs={"teacher": "t"},
        details={"times": [1.0, 0.5, 0.0]},
    )
    folder = tmp_path / "runs" / "digits" / "trajectories"
    ShardSet.open(folder, spec).commit(write_shard(folder, spec, 0, np.arange(4), values))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    (code,) = blocks("python")
    exec(code, names)
    np.testing.assert_array_equal(names["states"], values)
    assert names["about"]["times"] == [1.0, 0.5, 0.0]  # pyright: ignore[reportIndexIssue]
    assert names["table"].column_names == ["sample_id", "label", "values"]  # pyright: ignore[reportAttributeAccessIssue]
