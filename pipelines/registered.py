"""The best student of a run, exported and handed to the model registry."""

from pathlib import Path

from pipelines.artifacts import fingerprint, write_json
from pipelines.community.kinds import KINDS, readable_request, settings
from pipelines.export import export
from pipelines.generators import Generator
from pipelines.model_files import ModelFiles, read_object
from pipelines.registry import MODEL_TAG
from pipelines.report import Report, Row
from pipelines.run import Run
from pipelines.storage import local_stand_in, remove_tree
from pipelines.teachers import teacher_folder
from pipelines.tracked import best_student, measured_by, summary_of


def register_best(job: Run, report: Report) -> None:
    """Register the student of the lowest FID as a version of `track.register`; the store gets it when it can."""
    best, name = best_student(report.rows), job.recipe.track.register
    if best is None:
        return job.say(f"no student was measured without guidance: none is registered as {name}")
    generator = _generator(job, best)
    key = fingerprint([generator.identity, list(generator.grid), generator.afs, job.teacher.fingerprint])
    folder = local_stand_in(job.dir.path) / "registered" / key[:12]
    if not (folder / "sampler.json").exists():
        remove_tree(folder)
        export(job, generator.stage, folder / "pipeline", _steps(job, generator))
        write_json(folder / "sampler.json", _told(job, folder / "pipeline"))
    job.tracker.register(name, folder, {MODEL_TAG: key, **_tags(report, best)})


def _generator(job: Run, row: Row) -> Generator:
    known = [job.student(row.stage), *job.students(row.stage)]
    return next(one for one in known if one.calls_per_image == row.nfe and one.guidance_scale == 1)


def _steps(job: Run, generator: Generator) -> int | None:
    """How many steps to ask for; None: the stage's own, which most students alone can walk."""
    return None if generator == job.student(generator.stage) else len(generator.grid) - 1


def _tags(report: Report, best: Row) -> dict[str, object]:
    numbers = summary_of(best)
    kept = {key: numbers[key] for key in ("fid", "fid_low", "fid_high", "nfe") if key in numbers}
    recipe = {"recipe": report.recipe["name"], "fingerprint": report.fingerprint, "stage": best.stage}
    return {**kept, **recipe, **measured_by(report)}


def _told(job: Run, folder: Path) -> dict[str, object]:
    """How the exported pipeline is asked for pictures, and what they are like."""
    kind, teacher = KINDS[ModelFiles.of(teacher_folder(job.recipe.teacher)).class_name], job.reader
    stock = isinstance(read_object(folder / "model_index.json")["_class_name"], str)
    (asks,) = readable_request(kind, teacher, job.evaluation_labels(range(1)))
    channels, height, width = teacher.image_shape
    called = settings(kind, teacher, stock=stock)
    return {"stock": stock, "asks": asks, "settings": called, "picture": [height, width, channels]}
