"""The CLIP score against longhand: of a model, of generators, by actors, and what is kept, reused and refused."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipelines.artifacts import read_json
from pipelines.clip import Clip
from pipelines.evaluate import Evaluator, Generator
from pipelines.peer_pictures import drawn_by, measure_pictures
from pipelines.peers import PeerConfig
from pipelines.recipe import load, override
from pipelines.report import Row, print_table, read_report
from pipelines.report_columns import MEASURES, measures
from pipelines.run import Run, metrics_of_row
from pipelines.shards import Shard, ShardSet
from tests.pipelines import tiny
from tests.pipelines.clip_folder import PLACES, clip_folder, longhand
from tests.pipelines.diffusers_folders import stable_diffusion

RECIPE = """\
seed: 3
teacher: {{path: {root}/teacher, guidance_scale: 2.0}}
data: {{kind: folder, path: {root}/pictures, image_size: 16, held_out: 12}}
precompute: {{num_samples: 8, shard_rows: 16, intervals: 2, batch_size: 8, solver: euler, num_actors: 0}}
stages: {{sketch: {{objective: {{name: meanflow}}, num_steps: 1, batch_size: 2}}}}
evaluate: {{clip: {root}/clip, num_samples: 50, batch_size: 20, neighbours: 2, pictures: 50, solvers: {{euler: [1]}}}}
track: {{enabled: false}}
"""
TEXTS = ["a", "cat", "red dog", "zebra zebra zebra", ""]


def colours(count: int, side: int = 16, seed: int = 0) -> np.ndarray:
    """Pictures that differ in brightness and tint, ``(count, side, side, 3)``."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (count, side, side, 3)) * rng.random((count, 1, 1, 3))).astype(np.uint8)


def write(folder: Path, images: np.ndarray, captions: bool) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:02}.png")
        if captions:
            (folder / f"{number:02}.txt").write_text(f"{'abcdefgh'[number % 8] * (1 + number % 3)} x")
    return folder


def score_of(cosines: np.ndarray) -> float:
    return 100 * float(np.mean([max(cosine, 0) for cosine in cosines]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip"))


# The model


def test_cosines_are_those_of_one_picture_and_one_text_alone(model: Path):
    images, texts = colours(70), [TEXTS[number % 5] for number in range(70)]
    found = Clip.of(str(model))(images, texts)
    assert found.dtype == np.float64 and found.std() > 0.05
    wanted = longhand(model, [Image.fromarray(image) for image in images], texts)
    assert np.abs(found - wanted).max() < 2e-6
    others = longhand(model, [Image.fromarray(image) for image in images], [*texts[1:], texts[0]])
    assert np.abs(found - others).max() > 0.05  # to pair them otherwise is another score


def test_grey_pictures_are_those_in_colour(model: Path):
    clip, grey = Clip.of(str(model)), colours(3)[:, :, :, :1]
    assert np.array_equal(clip(grey, TEXTS[:3]), clip(grey.repeat(3, axis=3), TEXTS[:3]))


def test_a_long_text_is_cut_and_a_text_does_not_see_its_neighbours(model: Path):
    clip, images = Clip.of(str(model)), colours(1).repeat(2, axis=0)
    words = list("abcdefghijklmnopqrstuvwxyz")
    long = " ".join(words)
    cut, whole = clip(images, [" ".join(words[: PLACES - 2]), long])
    assert cut == whole != clip(images, [" ".join(words[: PLACES - 3]), long])[0]
    assert clip(images, ["a", long])[0] == clip(images, ["a", "b"])[0]


def test_files_of_openais_own_layout_are_read(model: Path, tmp_path: Path):
    """Sizes as numbers, and a tokenizer of two files."""
    folder = shutil.copytree(model, tmp_path / "clip")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(tokenizer["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    about = {"size": 10, "crop_size": 8, "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    assert np.array_equal(Clip.of(str(folder))(colours(5), TEXTS), Clip.of(str(model))(colours(5), TEXTS))


def test_its_fingerprint_is_that_of_its_files(model: Path, tmp_path: Path):
    copy = shutil.copytree(model, tmp_path / "clip")
    (copy / "README.md").write_text("other")
    assert Clip.of(str(copy)).fingerprint == Clip.of(str(model)).fingerprint
    (copy / "preprocessor_config.json").write_text("{}")
    assert Clip.of(str(copy)).fingerprint != Clip.of(str(model)).fingerprint


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (shutil.rmtree, "no CLIP model at .*: there is no config.json in .*evaluate.clip takes a folder"),
    "another": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'),
        "is of model_type bert, not clip. evaluate.clip takes a folder of a CLIP model in transformers' format, or its",
    ),
    "pickled": (lambda folder: (folder / "model.safetensors").rename(folder / "model.bin"), "has no .*safetensors"),
    "damaged": (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "the CLIP model .* cannot be loaded"),
    "no image processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "model .* cannot be loaded"),
    "no tokenizer": (
        lambda folder: [(folder / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")],
        "has no tokenizer in .*: tokenizer.json, or vocab.json and merges.txt",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_folders_are_explained(fault: str, model: Path, tmp_path: Path):
    breaking, message = FAULTS[fault]
    breaking(copy := shutil.copytree(model, tmp_path / "clip"))
    with pytest.raises(ValueError, match=message) as error:
        Clip.of(str(copy))(colours(1), ["a"])
    assert "\n" not in str(error.value)


def test_a_name_that_is_not_fetched_says_where_to_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"hf download openai/clip.*then give its folder as evaluate.clip"):
        Clip.of("openai/clip-vit-large-patch14")


# Generators


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Run:
    """A teacher of text, its prompts encoded, nothing measured."""
    root = tmp_path_factory.mktemp("text")
    stable_diffusion(root / "teacher")
    shutil.copytree(model, root / "clip")
    write(root / "pictures", colours(40, 20), captions=True)
    (root / "small.yaml").write_text(RECIPE.format(root=root))
    opened = tiny.open_run(load(str(root / "small.yaml")), root / "run")
    opened.prepare_shards()
    return opened


def evaluator_of(job: Run, folder: Path, **changes: Any) -> Evaluator:
    made = job.evaluator()
    made.folder, made.config = folder, replace(made.config, **changes)
    return made


def without_clip(job: Run, folder: Path, **changes: object) -> Evaluator:
    plain = tiny.open_run(override(job.recipe, {"evaluate.clip": ""}), job.dir.path)
    return evaluator_of(plain, folder, **changes)


def teacher_of(job: Run) -> Generator:
    return next(generator for generator in job.generators() if not generator.stage)


def test_a_rows_score_is_that_of_its_pictures_and_their_prompts(job: Run, tmp_path: Path):
    (row,) = evaluator_of(job, tmp_path).measure([teacher_of(job)])
    kept = np.load(tmp_path / row.samples)
    images, prompts = [Image.fromarray(image) for image in kept["images"]], kept["prompts"].tolist()
    assert job.clip and len(images) == row.num_samples == 50 and len(set(prompts)) > 5
    cosines = longhand(job.clip.folder, images, prompts)
    assert row.clip_score == pytest.approx(score_of(cosines), abs=1e-4) and row.clip_score > 1
    shifted = longhand(job.clip.folder, images, [*prompts[1:], prompts[0]])
    assert abs(row.clip_score - score_of(shifted)) > 1e-2
    low, high = row.intervals["clip_score"]
    half = 1.959964 * 100 * np.std(np.maximum(cosines, 0), ddof=1) / 50**0.5
    assert (row.clip_score - low, high - row.clip_score) == pytest.approx((half, half), rel=1e-3)


def test_the_score_is_the_only_thing_that_clip_changes(job: Run, tmp_path: Path):
    (scored,) = evaluator_of(job, tmp_path / "with").measure([teacher_of(job)])
    (plain,) = without_clip(job, tmp_path / "without").measure([teacher_of(job)])
    assert plain.clip_score is None and "clip_score" not in plain.intervals
    intervals = {name: ends for name, ends in scored.intervals.items() if name != "clip_score"}
    cut = replace(scored, clip_score=None, intervals=intervals, images_per_second=1.0)
    assert cut == replace(plain, images_per_second=1.0)


def test_other_blocks_give_the_same_score_to_rounding(job: Run, tmp_path: Path):
    found = [
        evaluator_of(job, tmp_path / str(size), batch_size=size).measure([teacher_of(job)])[0].clip_score
        for size in (50, 7)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.ray
def test_actors_give_the_same_bits(
    ray_cluster: None, job: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, hashes, rows = ShardSet.commit, dict[int, set[str]](), list[Row]()
    for actors in (0, 2):
        kept: set[str] = set()

        def spying(shards: ShardSet, shard: Shard, kept: set[str] = kept) -> None:
            kept.add(f"{shard.index} {shard.sha256}")
            commit(shards, shard)

        evaluator = evaluator_of(job, tmp_path / str(actors), num_actors=actors)
        with monkeypatch.context() as patch:
            patch.setattr(ShardSet, "commit", spying)
            rows += evaluator.measure([teacher_of(job)])
        hashes[actors] = kept
    assert hashes[0] == hashes[2] and len(hashes[0]) == 3
    assert rows[0].clip_score == rows[1].clip_score and rows[0].intervals == rows[1].intervals


# What is kept


def test_rows_without_a_score_stay_valid_until_one_is_asked_for(job: Run, tmp_path: Path):
    plain, asked, generator = without_clip(job, tmp_path), evaluator_of(job, tmp_path), teacher_of(job)
    assert "clip" not in plain.inputs(generator) and job.clip
    assert asked.inputs(generator) == plain.inputs(generator) | {"clip": {"model": job.clip.fingerprint}}
    (row,) = plain.measure([generator])
    assert plain.finished(generator) == row and asked.finished(generator) is None
    (scored,) = asked.measure([generator])
    assert asked.finished(generator) == scored and scored.clip_score
    left = plain.finished(generator)
    assert left and replace(left, images_per_second=1) == replace(row, images_per_second=1)


def test_a_score_of_another_model_is_refused_by_name(job: Run, tmp_path: Path):
    asked, generator = evaluator_of(job, tmp_path), teacher_of(job)
    asked.measure([generator])
    asked.clip = Clip.of(str(clip_folder(tmp_path / "other", seed=8)))
    with pytest.raises(ValueError, match=r"was made from other inputs: clip\.model: \w+"):
        asked.finished(generator)


def test_given_pictures_have_a_score_where_they_bring_captions(job: Run, tmp_path: Path):
    asked, rows = evaluator_of(job, tmp_path / "kept"), {}
    for captions in (True, False):
        folder = write(tmp_path / f"theirs_{captions}", colours(20, 12, seed=1), captions)
        generator = drawn_by(f"theirs-{captions}", PeerConfig(path=str(folder), calls=1))
        rows[captions] = measure_pictures(asked, generator, job.nets, lambda _: None)
        assert asked.finished(generator) == rows[captions]
    texts = [(tmp_path / "theirs_True" / f"{number:02}.txt").read_text() for number in range(20)]
    assert job.clip and rows[False].clip_score is None
    cosines = longhand(job.clip.folder, [Image.fromarray(image) for image in colours(20, 12, seed=1)], texts)
    assert rows[True].clip_score == pytest.approx(score_of(cosines), abs=1e-4)


def test_the_report_names_the_model_and_shows_the_score(job: Run):
    (row,) = job.evaluator().measure([teacher_of(job)])
    report = job.report([row])
    again = read_report(job.dir.path / "report.json")
    assert job.clip and again.rows == [row] == report.rows
    assert again.reference["clip"] == str(job.clip.folder)
    assert again.reference["clip_sha256"] == job.clip.fingerprint
    assert measures([row])["CLIP score"] == MEASURES["CLIP score"] and metrics_of_row(row)["clip_score"] > 0
    console = Console(record=True, width=70, file=io.StringIO())
    print_table(report, console)
    assert "score" in (said := console.export_text()) and f"{row.clip_score:.2f}" in said
    page = (job.dir.path / "report.html").read_text()
    assert "CLIP score" in page and f"{row.clip_score:.4g}" in page
    stored = read_json(job.dir.evaluation / "teacher-euler-2.json")
    assert stored["inputs"]["clip"] == {"model": job.clip.fingerprint}


def test_a_teacher_that_reads_no_text_is_refused_before_anything_is_done(model: Path, tmp_path: Path):
    recipe = tiny.write_recipe(tmp_path)
    result = tiny.hdistill("run", recipe, "--run-dir", tmp_path / "run", "--set", f"evaluate.clip={model}")
    assert result.exit_code == 2 and not list((tmp_path / "run").iterdir())
    assert "evaluate.clip compares pictures with their prompts, and the teacher digits reads no text" in result.stderr
    assert len(result.stderr.splitlines()) == 1
