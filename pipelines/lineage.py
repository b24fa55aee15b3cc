"""What a run's results come from: each artifact, what it was made from, and the hash by which it is known."""

from collections.abc import Iterator

from pipelines.artifacts import fingerprint, read_json
from pipelines.assembly import Assembly
from pipelines.recipe import TEACHER
from pipelines.report import Origin
from pipelines.shards import ShardSet

_IMAGES, _LATENTS, _PROMPTS, _TRAJECTORIES = "real images", "latents", "prompts", "trajectories"


def lineage_of(run: Assembly) -> list[Origin]:
    """The artifacts of a run, each after those that it was made from; what is not there is left out."""
    stages = [name for name in run.recipe.stages if read_json(run.dir.stage(name) / "stage.json")]
    return [_teacher(run), _images(run), *_shards(run), *(_stage(run, name) for name in stages)]


def _teacher(run: Assembly) -> Origin:
    config = run.recipe.teacher
    detail = f"{config.path}{f' at {config.revision}' if config.revision else ''}"
    return Origin(name=TEACHER, sha256=run.teacher.fingerprint, detail=detail)


def _images(run: Assembly) -> Origin:
    splits, data = run.splits, run.recipe.data
    parts = {"to train on": splits.train, "to choose by": splits.validation, "held out": splits.reference}
    counts = ", ".join(f"{len(part):,} {what}" for what, part in parts.items() if part is not None)
    return Origin(name=_IMAGES, sha256=splits.fingerprint, detail=f"{data.path or data.kind}: {counts}")


def _shards(run: Assembly) -> Iterator[Origin]:
    needs = {need for stage in run.recipe.stages.values() for need in stage.objective.needs}
    precompute = run.recipe.precompute
    if run.prompts:
        yield from _set(run.prompts, _PROMPTS, [TEACHER], "text embeddings")
    if run.latents and "images" in needs:
        yield from _set(run.latents, _LATENTS, [TEACHER, _IMAGES], "of the real images")
    if "trajectories" in needs:
        made_from = [TEACHER, *([_PROMPTS] if run.prompts else [])]
        yield from _set(
            run.trajectories, _TRAJECTORIES, made_from, f"{precompute.intervals} steps by {precompute.solver}"
        )


def _set(shards: ShardSet, name: str, made_from: list[str], what: str) -> Iterator[Origin]:
    count = shards.spec.num_shards
    if shards.complete:
        detail = f"{shards.spec.rows:,} rows in {count:,} file{'s' if count > 1 else ''}, {what}"
        yield Origin(
            name=name, made_from=made_from, sha256=fingerprint([one.sha256 for one in shards.shards]), detail=detail
        )


def _stage(run: Assembly, name: str) -> Origin:
    stage, manifest = run.recipe.stages[name], read_json(run.dir.stage(name) / "stage.json") or {}
    real = _LATENTS if run.latents else _IMAGES
    named = {"trajectories": _TRAJECTORIES, "images": real, "features": TEACHER, "start": stage.start}
    read = [stage.start, TEACHER, *(named[need] for need in sorted(stage.objective.needs) if need in named)]
    read += [_PROMPTS] if run.prompts else []
    best = f", the best of them of step {manifest['best_step']}" if manifest.get("kept") == "best" else ""
    detail = f"{stage.objective.name}, {manifest['steps']:,} iterations{best}"
    return Origin(name=name, made_from=list(dict.fromkeys(read)), sha256=manifest["sha256"], detail=detail)
