"""The command line: its frozen set of commands and options, and how it speaks to people who make mistakes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipelines import cli, ui
from pipelines import recipe as recipes
from pipelines.cli import main
from pipelines.evaluate import evaluation_seed
from pipelines.run import Run
from tests.pipelines.conftest import Finished
from tests.pipelines.tiny import UNTRACKED, hdistill, tree

pytestmark = pytest.mark.usefixtures("without_ray")

ON_A_RECIPE = {"RECIPE", "--set", "--run-dir"}
COMMANDS = {
    "run": ON_A_RECIPE | {"--dry-run"},
    "submit": ON_A_RECIPE | {"--address", "--no-wait", "--no-code"},
    "teacher": {"RECIPE", "--set"},
    "features": {"RECIPE", "--set", "--out", "--task", "--seed", "--steps"},
    "precompute": ON_A_RECIPE,
    "train": ON_A_RECIPE | {"--stage"},
    "evaluate": ON_A_RECIPE,
    "score": {"PICTURES", "REFERENCE", "--features", "--by-category", "--neighbours", "--pairs", "--actors"}
    | {"--gpus-per-actor", "--cache", "--out", "--clip", "--captions"},
    "export": ON_A_RECIPE | {"--stage", "--steps", "--out"},
    "flops": {"RECIPE", "--set"},
    "sample": ON_A_RECIPE | {"--stage", "--num", "--label", "--prompt", "--steps", "--guidance", "--seed", "--out"},
    "report": {"RUN_DIR"},
    "compare": {"RUN_DIR...", "--query", "--store", "--out"},
    "tune": ON_A_RECIPE
    | {"SPACE", "--stage", "--trials", "--sampler", "--scheduler", "--metric", "--rungs", "--samples", "--random"}
    | {"--finalists", "--seeds", "--score-seeds", "--slots", "--cpus-per-trial", "--gpus-per-trial"},
    "ui": {"--store", "--host", "--port"},
    "recipes": {"NAME"},
    "assets build": {"--out", "--seed"},
}
"""A new option is a new promise: think of a field of the recipe first, then change this."""


def commands(group: click.Group = main, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def written(parameter: click.Parameter) -> str:
    return parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.make_metavar(click.Context(main))


def test_the_commands_and_options_are_these():
    found = {name: {written(p).strip("[]") for p in command.params} for name, command in commands()}
    assert found == COMMANDS


@pytest.mark.parametrize("name", [(), *(name.split() for name in COMMANDS), ["assets"]], ids=" ".join)
def test_every_help_is_readable(name: list[str]):
    result = hdistill(*name, "--help")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith("Usage: ") and len(lines) > 4
    assert max(map(len, lines)) <= 100
    assert hdistill(*name, "-h").output == result.output


def test_every_command_and_option_says_what_it_does():
    for name, command in commands():
        assert command.help and command.help.strip().splitlines()[0].endswith((".", "report.", ":")), name
        for option in (p for p in command.params if isinstance(p, click.Option)):
            assert option.help, f"{name} {option.opts[0]} has no help"


def test_version():
    assert hdistill("--version").output.startswith("hdistill, version ")


def test_recipes_lists_each_with_what_it_is():
    lines = hdistill("recipes").output.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes.names())
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_recipes_prints_the_file_of_one():
    assert hdistill("recipes", "digits").output == recipes.names()["digits"].read_text()


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "digit"], "unknown recipe 'digit' (did you mean 'digits'?)"),
        (["run", "my.yaml"], "recipe file my.yaml does not exist"),
        (["recipes", "digit"], "unknown recipe 'digit' (did you mean 'digits'?)"),
        (["run", "digits", "--set", "stages.sketch.num_step=5"], "did you mean 'num_steps'?"),
        (["run", "digits", "--set", "seed"], "--set takes key=value, such as seed=1; given 'seed'"),
        (["run", "digits", "--set", "seed=x"], "seed: must be a whole number; given 'x'"),
        (["train", "digits", "--set", "stages.sketch.num_steps=0"], "num_steps must be at least 1; given 0"),
        (["report", "nowhere"], "nowhere/report.json does not exist"),
        (["sample", "digits", "--stage", "refin"], "there is no stage 'refin' (did you mean 'refine'?)"),
        (["sample", "digits", "--stage", "refine"], "stage refine is not trained in runs/digits"),
        (["sample", "digits", "--stage", "refine", "--num", "0"], "--num must be at least 1"),
        (["sample", "digits", "--stage", "refine", "--label", "10"], "--label from 0 to 9"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    result = hdistill(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["run"], ["nosuch"], ["run", "digits", "--nosuch"], ["sample", "digits"]])
def test_a_wrong_use_is_explained_by_click(arguments: list[str]):
    result = hdistill(*arguments)
    assert result.exit_code == 2 and "Usage: " in result.stderr


def test_stage_of_train_is_checked_before_anything_is_made(finished: Finished, tmp_path: Path):
    run_dir = tmp_path / "run"
    result = hdistill("train", finished.recipe_file, "--run-dir", run_dir, *UNTRACKED, "--stage", "sketh")
    assert result.exit_code == 2 and "did you mean 'sketch'?" in result.stderr
    assert not (run_dir / "trajectories").exists()


def raising(error: BaseException) -> click.Group:
    @click.group(cls=cli._Commands)
    def group() -> None: ...

    @group.command()
    def work() -> None:
        raise error

    return group


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("wrong"), 2, "error: wrong\n"),
        (FloatingPointError("diverged"), 1, "error: diverged\n"),
        (OSError(28, "No space left on device", "x"), 1, "error: No space left on device (x). Nothing finished is"),
        (KeyboardInterrupt(), 130, "\nstopped. The same command goes on from the last checkpoint.\n"),
    ],
)
def test_exit_codes(error: BaseException, code: int, message: str):
    result = CliRunner().invoke(raising(error), ["work"])
    assert result.exit_code == code
    assert result.stderr.startswith(message)


def test_a_reader_that_went_away_is_no_error_to_speak_of():
    result = CliRunner().invoke(raising(BrokenPipeError(32, "Broken pipe")), ["work"])
    assert result.exit_code == 1 and not result.output


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("a bug"), KeyError("a bug")])
def test_a_bug_stays_a_traceback(error: Exception):
    result = CliRunner().invoke(raising(error), ["work"])
    assert result.exception is error and result.exit_code == 1


def test_the_command_starts_fast_and_says_no_more_than_it_must(tmp_path: Path):
    command = [sys.executable, "-m", "pipelines.cli", "run", "nosuch"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == f"error: unknown recipe 'nosuch'. Known: {', '.join(recipes.names())}; " + (
        "a recipe of your own is named by its path, ending in .yaml\n"
    )


# Dry run


def test_a_dry_run_writes_nothing_and_shows_recipe_and_plan(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    result = hdistill("run", finished.recipe_file, "--dry-run")
    assert result.exit_code == 0
    assert list(tmp_path.iterdir()) == []
    assert "learning_rate: 0.001" in result.output and "in all: " in result.output


def test_a_dry_run_on_a_finished_directory_says_what_is_reused(finished: Finished):
    before = tree(finished.run_dir)
    result = hdistill("run", *finished.arguments, "--dry-run")
    assert "in all: 0 network calls" in result.output
    assert tree(finished.run_dir) == before


# Samples and reports


def test_sample_writes_pictures_and_a_sheet(finished: Finished, tmp_path: Path):
    arguments = ("--stage", "refine", "--num", "5", "--label", "3")
    before = tree(finished.run_dir)
    result = hdistill("sample", *finished.arguments, *arguments, "--out", tmp_path / "some")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == [
        *(f"{index:05d}.png" for index in range(5)),
        "sheet.png",
    ]
    with Image.open(tmp_path / "some" / "00000.png") as picture:
        assert picture.size == (8, 8) and picture.mode == "L"
    assert tree(finished.run_dir) == before


def test_samples_follow_their_seed_and_not_their_number(finished: Finished, tmp_path: Path):
    def drawn(name: str, *options: str) -> list[np.ndarray]:
        out = tmp_path / name
        assert hdistill("sample", *finished.arguments, "--stage", "sfd_4", *options, "--out", out).exit_code == 0
        return [np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))]

    few, many, other = drawn("few", "--num", "2"), drawn("many", "--num", "4"), drawn("other", "--seed", "1")
    assert np.array_equal(few, many[:2])
    assert len(other) == 64 and not np.array_equal(other[0], few[0])


def test_sample_is_what_evaluation_saw(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seed = evaluation_seed(finished.recipe.seed)
    hdistill("sample", *finished.arguments, "--stage", "sfd_2", "--num", 16, "--seed", seed, "--out", tmp_path)
    pictures = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("0*.png"))]
    kept = np.load(finished.run_dir / "evaluate" / "sfd_2-flow_map-2.npz")["images"][..., 0]
    # Another batch size may round a pixel the other way.
    assert np.abs(np.stack(pictures).astype(int) - kept.astype(int)).max() <= 1


def test_report_is_rebuilt_and_printed(copied: Finished):
    (copied.run_dir / "report.html").unlink()
    before = (copied.run_dir / "report.json").read_bytes()
    result = hdistill("report", copied.run_dir)
    assert result.exit_code == 0
    assert "Sketch" in result.output and "HD" in result.output
    assert (copied.run_dir / "report.html").stat().st_size > 10_000
    assert (copied.run_dir / "report.json").read_bytes() == before


def test_the_run_directory_is_named_after_the_recipe(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[Path] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "partial", lambda job, _: opened.append(job.dir.path))
    hdistill("precompute", finished.recipe_file, *UNTRACKED)
    assert opened == [Path("runs/tiny")]


def test_ui_serves_the_store_on_this_machine_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    served: list[tuple[str, str, int]] = []
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(ui, "ui", lambda *arguments: served.append(arguments))
    hdistill("ui", "--store", tmp_path / "mlflow.db", "--port", 5055)
    assert served == [(f"sqlite:///{tmp_path / 'mlflow.db'}", "127.0.0.1", 5055)]


def test_modules_that_cost_seconds_are_not_imported_for_help():
    code = "import sys, pipelines.cli; print([m for m in ('torch', 'ray', 'mlflow', 'diffusers') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
