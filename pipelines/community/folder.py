"""What goes into an exported folder: the network with its steps, and copies of the other parts of the pipeline."""

import ast
import inspect
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hd_core.networks import dit
from hd_core.networks.student import FlowMapStudent
from pipelines.artifacts import write_json
from pipelines.community.kinds import Kind
from pipelines.community.stock import fold_step
from pipelines.community.table import Step
from pipelines.community.templates import render
from pipelines.diffusers_library import diffusers
from pipelines.model_files import WEIGHTS, read_object
from pipelines.teachers import Teacher
from pipelines.text import PARTS

_COPIED = (".json", ".safetensors", ".txt", ".model")
_VARIANTS = (".fp16.", ".non_ema.")


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where an export takes its parts from."""

    kind: Kind
    teacher: Teacher
    root: Path
    """The teacher's pipeline folder."""


def write_stock(folder: Path, parts: Parts, student: FlowMapStudent, step: Step, whole: Step) -> None:
    """The folder of a stock pipeline that makes one step. ValueError where no scheduler gives it."""
    backbone: Any = student.backbone
    scheduler = fold_step(backbone, parts.kind, step, whole)
    scheduler.save_pretrained(folder / "scheduler")
    network = _save_model(folder / parts.kind.part, backbone.model)
    components = {parts.kind.part: network, "scheduler": ["diffusers", parts.kind.scheduler]}
    _write_index(folder, parts, parts.kind.stock, {**components, **_copy_parts(folder, parts)})


def write_few_steps(
    folder: Path, parts: Parts, student: FlowMapStudent, steps: Sequence[Step], times: Sequence[float]
) -> None:
    """The folder of a pipeline with its own code, of any number of steps."""
    kind, backbone = parts.kind, student.backbone
    native = isinstance(backbone, dit.DiT)
    network = _save_native(folder / kind.part, backbone) if native else _save_model(folder / kind.part, backbone.model)
    _save_steps(folder / "few_steps", steps, times)
    module = f"few_steps_{kind.name}"  # of its own name: diffusers keeps the modules of all folders side by side
    (folder / f"{module}.py").write_text(pipeline_source(kind, decodes=parts.teacher.codec is not None), "utf-8")
    components = {kind.part: network, "few_steps": ["few_steps", "FewSteps"], **_copy_parts(folder, parts)}
    _write_index(folder, parts, [module, kind.pipeline], components)


def pipeline_source(kind: Kind, *, decodes: bool) -> str:
    """The code of a kind's own pipeline."""
    native = kind.name == "native"
    return render(
        f"{kind.name}.py.j2",
        summary="Pictures in a few steps of a distilled diffusion model.",
        pipeline=kind.pipeline,
        size="image_size" if native else "sample_size",
        channels="channels" if native else "in_channels",
        decodes=decodes,
    )


def native_source() -> str:
    """The code of this project's own DiT, on torch and diffusers alone."""
    tree = ast.parse(inspect.getsource(dit))
    foreign = [node for node in tree.body if isinstance(node, ast.ImportFrom) and _is_foreign(node)]
    names = {alias.name for node in foreign for alias in node.names}
    body = [node for node in tree.body if node not in foreign]
    for node in ast.walk(ast.Module(body, [])):
        if isinstance(node, ast.FunctionDef):
            _strip_annotations(node)
    for node in body:
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body if not _names(part) & names]
    return ast.unparse(ast.Module(body, [])) + render("native_dit.py.j2")


def _is_foreign(node: ast.ImportFrom) -> bool:
    return str(node.module).split(".")[0] in ("hd_core", "jaxtyping")


def _strip_annotations(function: ast.FunctionDef) -> None:
    function.returns = None
    for argument in [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]:
        argument.annotation = None


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


# Components: each writes its folder, and returns its library and class


def _save_model(folder: Path, model: Any) -> list[str]:
    model.save_pretrained(folder)
    config = read_object(folder / "config.json")
    config.pop("_name_or_path", None)  # a path of this machine
    write_json(folder / "config.json", config)
    return ["diffusers", type(model).__name__]


def _save_native(folder: Path, model: dit.DiT) -> list[str]:
    _save_tensors(folder, {f"network.{key}": value for key, value in model.state_dict().items()})
    write_json(folder / "config.json", {"_class_name": "FewStepDiT", **vars(model.config)})
    (folder / "few_step_dit.py").write_text(native_source(), "utf-8")
    return ["few_step_dit", "FewStepDiT"]


def _save_steps(folder: Path, steps: Sequence[Step], times: Sequence[float]) -> None:
    _save_tensors(folder, {"extra": torch.stack([step.extra for step in steps])})
    config = {
        "_class_name": "FewSteps",
        "times": list(times),
        "start": times[0],
        "timesteps": [step.timestep for step in steps],
        "scales": [step.scale for step in steps],
        "states": [step.state for step in steps],
        "predictions": [step.prediction for step in steps],
        "width": len(steps[0].extra),
    }
    write_json(folder / "config.json", config)
    (folder / "few_steps.py").write_text(render("few_steps.py.j2"), "utf-8")


def _copy_parts(folder: Path, parts: Parts) -> dict[str, Any]:
    """Autoencoder, text encoder and tokenizer, as far as there are any."""
    components: dict[str, Any] = {}
    if parts.teacher.codec:
        components["vae"] = _save_model(folder / "vae", parts.teacher.codec.vae)
    for part in PARTS if parts.teacher.text_width else ():
        components[part] = _index(parts.root)[part]
        _copy(parts.root / part, folder / part)
    return components


def _copy(source: Path, target: Path) -> None:
    """Configs, weights and tables of a folder; never a pickle or code."""
    for file in sorted(source.rglob("*")):
        if file.is_file() and file.suffix in _COPIED and not any(variant in file.name for variant in _VARIANTS):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def _write_index(folder: Path, parts: Parts, pipeline: str | list[str], components: Mapping[str, Any]) -> None:
    index = {"_class_name": pipeline, "_diffusers_version": diffusers().__version__, **components}
    if "DiTPipeline" in str(pipeline) and (names := _index(parts.root).get("id2label")):
        index["id2label"] = names
    if pipeline == "StableDiffusionPipeline":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", index)


def _index(root: Path) -> dict[str, Any]:
    file = root / "model_index.json"
    return read_object(file) if file.is_file() else {}


def _save_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True)
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
