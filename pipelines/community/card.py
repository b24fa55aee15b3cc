"""The model card of an exported folder."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.community.folder import Parts
from pipelines.community.kinds import readable_request, settings
from pipelines.community.templates import render
from pipelines.evaluate import Generator
from pipelines.hub import is_hub_name
from pipelines.recipe import to_yaml
from pipelines.report import Row, read_report
from pipelines.report_columns import calls
from pipelines.run import Run

_TAGS = {"stable_diffusion": "text-to-image", "sana": "text-to-image", "unet": "unconditional-image-generation"}
_LICENCE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What became of a stage."""

    stock: bool
    """Whether a pipeline of diffusers itself samples it."""
    why: str
    """Why that is not so; empty where it is."""
    difference: float
    """The largest difference of its pictures from our sampler's, of values in [0, 1]."""


def write_card(folder: Path, name: str, job: Run, parts: Parts, generator: Generator, exported: Exported) -> None:
    """README.md of a folder that will be called ``name``."""
    recipe, teacher = job.recipe, job.recipe.teacher
    licence = _licence(parts.root)
    rows = _rows(job, generator)
    second = next((row.second_features for row in rows if row.second_features), "")
    steps = len(generator.grid) - 1
    text = render(
        "card.md.j2",
        licence=licence,
        base_model=teacher.path if is_hub_name(teacher.path) else "",
        pipeline_tag=_TAGS.get(parts.kind.name, ""),
        title=name,
        steps="one step" if steps == 1 else f"{steps} steps",
        network_calls=calls(len(generator.grid) - 1 - generator.afs).replace("call", "network call"),
        teacher=teacher.path,
        chain=_chain(job, generator.stage),
        code=sampling_code(name, parts, job, exported.stock),
        how=_how(parts, exported),
        difference=f"{exported.difference:.1e}",
        rows=rows,
        second=f" and `{second}`" if second else "",
        limits=_limits(parts, exported, steps),
        recipe=to_yaml(recipe),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def sampling_code(name: str, parts: Parts, job: Run, stock: bool) -> str:
    """Python that samples the folder, run from beside it."""
    asked = readable_request(parts.kind, job.reader, job.evaluation_labels(range(2)))
    arguments = {**asked, **settings(parts.kind, parts.teacher, stock=stock)}
    trust = "" if stock else ", trust_remote_code=True"
    return render(
        "sample.py.j2",
        folder=json.dumps(f"./{name}"),
        trust=trust,
        arguments=[f"{key}={_literal(value)}" for key, value in arguments.items()],
    )


def _literal(value: Any) -> str:
    return str(value) if isinstance(value, bool) else json.dumps(value, ensure_ascii=False)


def _chain(job: Run, stage: str) -> str:
    links = [f"`{name}` ({job.recipe.stages[name].objective.name})" for name in job.recipe.chain(stage)]
    return " → ".join(["the teacher", *links])


def _how(parts: Parts, exported: Exported) -> str:
    if exported.stock:
        return f"The folder is a plain `{parts.kind.stock}` with its own scheduler; no other code is needed."
    return (
        f"The folder brings the code of its pipeline (`few_steps_{parts.kind.name}.py` and `few_steps/few_steps.py`, on"
        f" torch and diffusers alone), because {exported.why}."
    )


def _limits(parts: Parts, exported: Exported, steps: int) -> list[str]:
    limits = [f"It is sampled in {'one step' if steps == 1 else f'{steps} steps'} and no other number."]
    if exported.stock:
        limits.append("Its scheduler belongs to its weights: with another one the pictures are wrong.")
        if parts.kind.name != "unet":
            limits.append("Pass `guidance_scale=1.0`: anything above would have the stock pipeline guide it.")
        if parts.kind.ends[0]:
            limits.append(
                "The stock pipeline starts from the noise itself and the student from a multiple of it, so the first"
                " and the last layer of the network hold a factor each."
            )
    elif parts.kind.name != "unet":
        limits.append("It was distilled for `guidance_scale=1.0`; any other calls the network twice a step.")
    if parts.kind.name == "native":
        limits.append("It runs in float32.")
    if parts.teacher.text_width:
        limits.append("There is no safety checker.")
    return limits


def _rows(job: Run, generator: Generator) -> list[Row]:
    """This generator's row and the teacher's, where this recipe was measured."""
    path = job.dir.path / "report.json"
    if not path.is_file():
        return []
    report = read_report(path)
    own = [row for row in report.rows if row.stage == generator.stage and row.nfe == generator.calls_per_image]
    own = [row for row in own if not row.guided]
    if not own or report.fingerprint != job.recipe.fingerprint:
        return []
    return [*own, *(row for row in report.rows if not row.stage)]


def _licence(root: Path) -> str:
    """What the front matter of a teacher's README says; empty where there is none."""
    file = root / "README.md"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    parts = text.split("---", 2)
    found = _LICENCE.search(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    return found.group(1) if found else ""
