"""Recipes: every shipped one works, every change is remembered by the fingerprint, every mistake is explained."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from hd_core.objectives.sfd import SFD
from pipelines import recipe as recipes
from pipelines.artifacts import flatten
from pipelines.plan import print_plan
from pipelines.recipe import Recipe, from_dict, load, override, parse_setting, to_yaml
from pipelines.stability import StopConfig
from tests.pipelines.tiny import RECIPE

SHIPPED = recipes.names()
DIGITS = load("digits")
FREE = {
    "name",
    "track.enabled",
    "track.uri",
    "track.experiment",
    "track.register",
    "train.num_workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "train.gradient_checkpointing",
    "train.resident_bytes",
    "train.max_failures",
    "train.strategy",
    "train.sharded",
    "train.micro_batch_size",
    "train.keep_checkpoints",
    "train.resize_seconds",
    "precompute.num_actors",
    "precompute.cpus_per_actor",
    "precompute.gpus_per_actor",
    "precompute.batch_size",
    "evaluate.batch_size",
    "evaluate.num_actors",
    "evaluate.cpus_per_actor",
    "evaluate.gpus_per_actor",
    "evaluate.step_counts",
    "evaluate.guidance_scales",
    "evaluate.peers",
    "evaluate.clip",
    *(f"stages.{stage}.{name}" for stage in DIGITS.stages for name in ("label", "log_every", "checkpoint_every")),
    *(f"stages.{stage}.probe.{name}" for stage in DIGITS.stages for name in ("beside", "cpus", "gpus")),
    *(f"evaluate.solvers.{solver}" for solver in DIGITS.evaluate.solvers),
    *(f"stages.{stage}.stop.{item.name}" for stage in DIGITS.stages for item in dataclasses.fields(StopConfig)),
    "teacher_training",
}
WORDS: dict[str, dict[str, Any] | None] = {
    "data.kind": {"data.kind": "folder", "data.path": "/pictures"},
    "data.path": {"data.kind": "folder", "data.path": "/pictures"},
    "data.channels": {"data.channels": 1},
    "data.split": {"data.kind": "huggingface", "data.path": "owner/set", "data.split": "test"},
    "data.reference_split": {"data.kind": "huggingface", "data.path": "owner/set", "data.reference_split": "test"},
    "data.fit": {"data.fit": "pad", "data.image_size": 8},
    "train.strategy": {"train.strategy": "fsdp", "train.num_workers": 2},
    "train.sharded": {"train.sharded": ["teacher"]},
    "train.autocast": {"train.autocast": "bfloat16"},
    "precompute.dtype": {"precompute.dtype": "float32"},
    "precompute.solver": {"precompute.solver": "euler"},
    "teacher.revision": {"teacher.path": "someone/model", "teacher.revision": "main"},
    "precompute.intervals": {"precompute.intervals": 24},
    "evaluate.features": {"evaluate.features": "inception"},
    "evaluate.grid.kind": {"evaluate.grid.kind": "polynomial", "evaluate.grid.t_max": 0.9},
    "evaluate.grid.t_max": {"evaluate.grid.t_max": 0.9},
    "evaluate.step_counts": {"evaluate.step_counts": [7]},
    "evaluate.pairs": {"evaluate.pairs": 9000},
    "evaluate.peers": {"evaluate.peers": {"theirs": {"path": "/pictures", "calls": 1}}},
    "evaluate.grid.knots": None,  # two stretches have no grid of one step
    "track.uri": {"track.uri": "sqlite:///other.db"},
}
LAST_WORDS = {
    "decay": "halfway", "distance": "l2", "loss": "softplus", "start": "teacher", "label": "other", "pairs": "ends",
    "arm": "uniform", "tail": "token_logits", "guidance_scale": 1.5, "teacher_training": {"num_steps": 7},
    "states": "teacher", "step_embedding": "random",
}  # fmt: skip
JARGON = ("Input should", "valid ", "pydantic", "Value error", "dataclass", "tuple", "parse", "NoneType", "Traceback")


def own(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def changes_of(key: str, value: Any) -> dict[str, Any] | None:
    """An allowed change of one leaf of the digits recipe, with what else it then needs; none where there is none."""
    last = key.split(".")[-1]
    if key in WORDS:
        return WORDS[key]
    if "grid." in key and not key.startswith("evaluate"):  # the students' grid must stay the stored one
        name = key.split("grid.")[1]
        others = {"rho": 5.0, "betas": [0.001, 0.01]}
        if name not in others:
            return None
        owners = ["precompute", *(f"stages.{n}.objective" for n, s in DIGITS.stages.items() if _has_grid(s))]
        return {f"{owner}.grid.{name}": others[name] for owner in owners}
    if last == "start":
        return {key: "teacher"} if value != "teacher" else {key: "sketch"} if "sketch" not in key else None
    if key.endswith("objective.name"):
        return None  # its sibling fields change with it
    if last == "intervals":
        return {key: 6}
    if last == "guidance_scale" and key.startswith("stages") and "refine" not in key:
        return None  # stored trajectories have the teacher's own
    if last == "weighting":
        return {key: "matched" if "adversarial" in key else "plain"}
    if last == "later":
        return {key: {"7": {"ema_decay": 0.5}}}  # as a resolved recipe has it
    if last == "keep":
        return {key: "best", key.replace("keep", "every"): 10}
    if last == "step_counts":
        return {key: [12, *_siblings(key, "intervals")]}
    if last == "taught_by":
        return {key: "start", key.replace(last, "start_intervals"): 12}
    if last in ("perceptual", "perceptual_weight"):
        stage = ".".join(key.split(".")[:2])
        sfd = "perceptual_weight" in DIGITS.to_dict()["stages"][key.split(".")[1]]["objective"]
        return {f"{stage}.perceptual": "digits", f"{stage}.objective.perceptual_weight": 0.5} if sfd else None
    if last == "afs" and key.startswith("stages") and DIGITS.stages[key.split(".")[1]].objective.name == "dmd":
        return {key: True, key.replace("afs", "intervals"): 2}
    if key.endswith(("fake_score.kind", "student.kind")):
        return {key: "lora"}
    if "discriminator." in key and last in ("width", "heads"):
        return {key: value * 2}
    if last in LAST_WORDS:
        return {key: LAST_WORDS[last]}
    if isinstance(value, bool):
        return {key: not value}
    if isinstance(value, int | float):
        return {key: value + 1 if isinstance(value, int) else value * 0.8 + 0.01}
    if isinstance(value, list):
        return {key: [*value[:-1], value[-1] * 2 if isinstance(value[-1], int) else value[-1] * 0.9]}
    return {key: "other"}


def _siblings(key: str, name: str) -> list[Any]:
    return [flatten(DIGITS.to_dict())[".".join([*key.split(".")[:-1], name])]]


def _has_grid(stage: Any) -> bool:
    return isinstance(stage.objective, SFD)


def leaves() -> Iterator[tuple[str, dict[str, Any]]]:
    for key, value in flatten(DIGITS.to_dict()).items():
        changes = changes_of(key, value)
        if changes is not None:
            yield key, changes


# Shipped recipes


@pytest.mark.parametrize("name", [name for name in SHIPPED if load(name).teacher_training is None])
def test_every_shipped_recipe_loads_and_dry_runs(name: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    print_plan(load(name), run_dir, Console(quiet=True))
    assert not run_dir.exists()


@pytest.mark.parametrize("path", SHIPPED.values(), ids=SHIPPED)
def test_every_shipped_recipe_opens_with_what_it_is_its_command_and_its_hardware(path: Path):
    header = recipes.header(path)
    assert len(header.splitlines()[0]) > 20
    assert f"hdistill run {path.stem}" in header
    assert re.search(r"^ *hardware +\S+", header, re.MULTILINE)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_survives_being_written_and_read(name: str, tmp_path: Path):
    recipe = load(name)
    assert load(own(tmp_path, to_yaml(recipe))) == recipe
    assert from_dict(recipe.to_dict()) == recipe


# Overrides and fingerprints


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seed": st.integers(0, 2**62),
            "stages.sketch.num_steps": st.integers(1, 10**6),
            "stages.sketch.ema_decay": st.floats(0, 0.999),
            "stages.refine.optimizers.student.betas": st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)).map(list),
            "stages.refine.label": st.text(st.characters(codec="ascii", exclude_categories=["C"])),
            "precompute.dtype": st.sampled_from(["float16", "float32"]),
            "data.held_out": st.integers(1, 1796) | st.floats(0.01, 0.99),
            "evaluate.solvers": st.dictionaries(
                st.sampled_from(["euler", "heun", "dpmpp_3m"]), st.lists(st.integers(1, 64), min_size=1, unique=True)
            ),
            "track.enabled": st.booleans(),
        },
    )
)
def test_overrides_arrive_and_survive_being_written_and_read(changes: dict[str, Any]):
    changed = override(DIGITS, changes)
    flat = changed.to_dict()
    for key, value in changes.items():
        inner: Any = flat
        for part in key.split("."):
            inner = inner[part]
        assert inner == value
    again = from_dict(yaml.safe_load(to_yaml(changed)))
    assert again == changed and again.fingerprint == changed.fingerprint
    assert override(DIGITS, {}) is DIGITS
    settings = [f"{key}={yaml.safe_dump(value, default_flow_style=True, width=1e9)}" for key, value in changes.items()]
    assert load("digits", [setting.removesuffix("\n...\n") for setting in settings]) == changed


@pytest.mark.parametrize(("key", "changes"), list(leaves()), ids=lambda given: given if isinstance(given, str) else "")
def test_the_fingerprint_sees_every_field_but_those_of_execution(key: str, changes: dict[str, Any]):
    changed = override(DIGITS, changes)
    assert changed != DIGITS
    assert (changed.fingerprint == DIGITS.fingerprint) == (key in FREE)


def test_nearly_every_field_was_tried():
    tried, known = {key for key, _ in leaves()}, set(flatten(DIGITS.to_dict()))
    assert known >= FREE
    untried = {re.sub(r"stages\.\w+", "stages.*", key) for key in known - tried}
    assert untried == {
        "evaluate.grid.knots",
        "precompute.grid.kind",
        "precompute.grid.knots",
        "precompute.grid.t_max",
        "precompute.grid.t_min",
        "stages.*.objective.grid.kind",
        "stages.*.objective.grid.knots",
        "stages.*.objective.grid.t_max",
        "stages.*.objective.grid.t_min",
        "stages.*.guidance_scale",  # of the stages that learn from stored trajectories, which refuse one
        "stages.*.objective.name",
        "stages.*.perceptual",  # of the stages whose objective has no such term
        "stages.*.start",  # of the first stage, which has no other to start from
    }


def test_the_fingerprint_does_not_depend_on_how_a_file_is_written(tmp_path: Path):
    first = load(own(tmp_path, RECIPE))
    values = yaml.safe_load(RECIPE)
    values["stages"] = {name: dict(reversed(list(stage.items()))) for name, stage in values["stages"].items()}
    second = load(own(tmp_path, yaml.safe_dump(dict(reversed(list(values.items()))), sort_keys=False)))
    assert first == second and first.fingerprint == second.fingerprint
    assert first.name == "mine"


@pytest.mark.parametrize("written", ["1e-3", "1.0e-3", "0.001", "'0.001'"])
def test_numbers_may_be_written_as_people_write_them(written: str):
    recipe = load("digits", [f"stages.sketch.optimizers.student.learning_rate={written}"])
    assert recipe.stages["sketch"].optimizers.student.learning_rate == 0.001


def test_settings_are_applied_in_order():
    assert load("digits", ["seed=1", "seed=2"]).seed == 2


def test_chain_and_needs(tmp_path: Path):
    assert DIGITS.chain("refine") == ["sketch", "refine"] and DIGITS.chain("sfd_3") == ["sfd_3"]
    assert DIGITS.needs_trajectories
    only = load(own(tmp_path, "stages: {a: {objective: {name: dmd}}, b: {start: a, objective: {name: dmd}}}"))
    assert not only.needs_trajectories and only.chain("b") == ["a", "b"]


# Mistakes: (setting, what the message must say)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("seed=", "seed: must be a whole number; given nothing"),
        ("seed=abc", "seed: must be a whole number; given 'abc'"),
        ("seed=1.5", "seed: must be a whole number; given 1.5"),
        ("name=3", "name: must be text; given 3"),
        ("name=a/b", "name must be a plain name; given 'a/b'"),
        ("track.enabled=perhaps", "track.enabled: must be true or false; given 'perhaps'"),
        ("data.held_out=many", "data.held_out: must be a number; given 'many'"),
        (
            "data.kind=cifar",
            "data.kind: must be 'digits', 'npz', 'folder', 'parquet', 'webdataset' or 'huggingface'; given 'cifar'",
        ),
        ("data.channels=2", "data.channels: must be 0, 1 or 3; given 2"),
        ("evaluate.solvers.euler=4", "evaluate.solvers.euler: must be a list; given 4"),
        ("evaluate.solvers.euler=[1, x]", "evaluate.solvers.euler.1: must be a whole number; given 'x'"),
        ("evaluate.solvers.euler=[0]", "solvers.euler: step counts must be at least 1; given [0]"),
        ("evaluate.solvers.euler=[2, 2]", "solvers.euler: each step count once; given [2, 2]"),
        ("evaluate.solvers={eular: [1]}", "'eular' is not one of euler,"),
        ("evaluate.neighbours=5000", "neighbours must be below num_samples and pairs; given 5000, 5000 and 10000"),
        ("stages=3", "stages: must be a mapping; given 3"),
        ("stages.sketch=", "stages.sketch: must be a mapping; given nothing"),
        ("stages.sketch.num_steps=0", "stages.sketch: num_steps must be at least 1; given 0"),
        ("stages.sketch.optimizers.student.betas=[0.5]", "student.betas: holds too few values"),
        ("stages.sketch.optimizers.student.betas=[0, 0, 0]", "student.betas: must hold 2 values; given [0, 0, 0]"),
        ("stages.sketch.optimizers.student.betas=[0.5, x]", "student.betas.1: must be a number; given 'x'"),
        ("stages.sketch.objective=hd", "objective.name: must be one of mean_velocity, meanflow, dmd, sfd; given 'hd'"),
        ("stages.sketch.objective={name: hd}", "must be one of mean_velocity, meanflow, dmd, sfd; given 'hd'"),
        ("stages.sketch.objective={}", "objective.name: required: one of mean_velocity, meanflow, dmd, sfd"),
        ("stages.sketch.objective={name: sfd, intervlas: 3}", "intervlas: unknown key (did you mean 'intervals'?)"),
        (
            "stages.sfd_2.objective.intervals=5",
            "stages.sfd_2.objective: its times in 5 steps are not all among the 13 of precompute.grid",
        ),
        ("stages.sfd_2.objective.grid.t_min=0.1", "its times in 2 steps are not all among the 13 of precompute.grid"),
        ("precompute.grid={t_max: 0.9}", "stages.sketch: mean_velocity needs precompute.grid from t_max 1 to t_min 0"),
        ("stages.sfd_2.start=sketh", "stages.sfd_2.start: 'sketh' is not one of teacher, sketch, refine"),
        ("stages.sketch.start=refine", "stages.sketch.start: 'refine' is not one of teacher"),
        ("sede=1", "unknown key 'sede' (did you mean 'seed'?). Keys at the top: name, seed,"),
        ("stages.sketh.num_steps=1", "unknown key 'sketh' (did you mean 'sketch'?). Keys of stages: sketch, refine,"),
        ("stages.sketch.num_step=1", "unknown key 'stages.sketch.num_step' (did you mean 'num_steps'?). Keys of"),
        ("seed.x=1", "unknown key 'seed.x'. seed is a single value"),
        ("seed", "--set takes key=value, such as seed=1; given 'seed'"),
        ("=1", "--set takes key=value, such as seed=1; given '=1'"),
        ("seed=[", "--set seed: '[' is not a YAML value"),
    ],
)
def test_a_wrong_setting_is_explained_in_one_line(setting: str, message: str):
    with pytest.raises(ValueError) as raised:
        load("digits", [setting])
    said = str(raised.value)
    assert message in said
    assert len(said.splitlines()) == 1 and not [word for word in JARGON if word in said]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold a mapping with the keys name, seed, teacher"),
        ("- 1", "must hold a mapping with the keys name, seed, teacher"),
        ("a: [", "is not YAML: while parsing a flow node"),
        ("a: !!python/object:os.system x", "is not YAML: could not determine a constructor"),
        ("\x00", "is not YAML: unacceptable character"),
        ("seed: 1", "stages: required"),
        ("stages:", "stages: must be a mapping; given nothing"),
        ("stages: {a: }", "stages.a: must be a mapping; given nothing"),
        ("stages: {a: {start: teacher}}", "stages.a.objective: required"),
        ("stages: {a: {guidance_scale: 2, objective: {name: sfd}}}", "sfd learns from stored trajectories"),
        (
            "stages: {a: {objective: {nam: sfd}}}",
            "a.objective.name: required: one of mean_velocity, meanflow, dmd, sfd",
        ),
        ("stages: {a-b: {objective: {name: dmd}}}", "stages.a-b: a stage's name is letters, digits and underscores"),
        ("stages: {teacher: {objective: {name: dmd}}}", "and not 'teacher'"),
        ("stages: {1: {objective: {name: dmd}}}", "stages.1: must be text; given 1"),
        ("1: 2\nstages: {}", "1: must be text; given 1"),
        ("sede: 1\nstages: {}", "sede: unknown key (did you mean 'seed'?). Keys here: name, seed,"),
        ("stages: {}\ndata: {knid: npz}", "data.knid: unknown key (did you mean 'kind'?). Keys here: kind, path,"),
    ],
)
def test_a_wrong_file_is_explained_in_one_line_that_names_it(tmp_path: Path, text: str, message: str):
    path = own(tmp_path, text)
    with pytest.raises(ValueError) as raised:
        load(path)
    said = str(raised.value)
    assert said.startswith(path) and message in said
    assert len(said.splitlines()) == 1


def test_every_mistake_of_a_file_gets_its_line(tmp_path: Path):
    path = own(tmp_path, "sed: 1\nstages: {a: {objective: {name: sfd, intervlas: 3}, num_steps: x}}")
    with pytest.raises(ValueError, match="sed: unknown key") as raised:
        load(path)
    assert len(str(raised.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown recipe 'digit' (did you mean 'digits'?). Known: cifar10_hd, "),
        ("x.yaml", "recipe file x.yaml does not exist"),
        ("/", "unknown recipe '/'. Known: cifar10_hd, "),
    ],
)
def test_an_unknown_recipe_is_named_with_those_there_are(name: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        load(name)


def test_an_unknown_stage_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=re.escape("there is no stage 'refin' (did you mean 'refine'?). Stages: ")):
        DIGITS.require_stage("refin")


def test_parse_setting_reads_yaml_values():
    assert parse_setting("a.b = [1, 0.5, x]") == ("a.b", [1, 0.5, "x"])
    assert parse_setting("a=b=c") == ("a", "b=c")


def test_every_field_of_every_part_is_documented():
    """A string under each field, as the recipe's own documentation."""
    import inspect

    seen: list[type] = []

    def walk(kind: type) -> None:
        if kind in seen:
            return
        seen.append(kind)
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            pattern = rf"\n    {field.name}: .*?(?:\n    [)}}\]])?\n    \"\"\"\w"
            if field.name != "name" and kind.__module__.startswith("pipelines"):
                assert re.search(pattern, source, re.DOTALL), f"{kind.__name__}.{field.name}"

    def values(part: Any) -> None:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            walk(type(part))
            for field in dataclasses.fields(part):
                values(getattr(part, field.name))
        elif isinstance(part, Mapping):
            for item in part.values():
                values(item)

    values(DIGITS)
    assert Recipe in seen and len(seen) > 10
