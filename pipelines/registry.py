"""The model registry: an exported generator as a version of a registered model, and the alias of the best one."""

import tempfile
import warnings
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.artifacts import read_json, write_text
from pipelines.community.templates import render

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

BEST = "best"
"""The alias."""
MODEL_TAG = "hdistill.model"
"""Of a version: what it holds, so that the same model is never registered twice."""
MEASURED = ("features", "features_sha256", "reference", "num_reference", "num_samples", "data")
"""Tags that must be equal in versions whose FIDs are compared."""
_NEEDS = ("mlflow", "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")


def register(client: "MlflowClient", run_id: str, name: str, folder: Path, tags: Mapping[str, str]) -> None:
    """Make a version of a registered model, once, and move the alias `best` to it where its FID is lower.

    The alias stays where the two FIDs were not measured alike. Doing the same again changes nothing.

    Args:
        folder: `pipeline`, which diffusers loads, and `sampler.json`, which says how it is asked.
        tags: `hdistill.model`, `fid` and those of `MEASURED` among them.
    """
    _ensure_model(client, name)
    known = [
        one for one in client.search_model_versions(f"name = '{name}'") if one.tags.get(MODEL_TAG) == tags[MODEL_TAG]
    ]
    made = known[0] if known else _created(client, run_id, name, folder, tags)
    for key, text in tags.items() if known else ():
        client.set_model_version_tag(name, made.version, key, text)
    if _leads(_current(client, name), made.version, tags):
        client.set_registered_model_alias(name, BEST, made.version)


def _ensure_model(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _created(client: "MlflowClient", run_id: str, name: str, folder: Path, tags: Mapping[str, str]) -> "ModelVersion":
    place = f"registered/{tags[MODEL_TAG][:12]}"
    with tempfile.TemporaryDirectory(prefix="hdistill-") as temporary:
        _save(Path(temporary, "model"), folder)
        client.log_artifacts(run_id, str(Path(temporary, "model")), place)
    source = f"{client.get_run(run_id).info.artifact_uri}/{place}"
    return client.create_model_version(name, source, run_id, tags=dict(tags))


def _save(path: Path, folder: Path) -> None:
    """Write a folder of MLflow's: our export, the code that samples it, and what may be asked of it."""
    from mlflow import pyfunc

    code = path.with_name("sampler.py")
    write_text(code, render("registered_model.py.j2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for an example, for which it would sample the model
        pyfunc.save_model(
            str(path),
            python_model=str(code),
            artifacts={"pipeline": str(folder)},
            signature=_signature(read_json(folder / "sampler.json")),
            pip_requirements=[f"{package}=={version(package).partition('+')[0]}" for package in _NEEDS],
        )


def _signature(told: Mapping[str, Any]) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    column = {
        "class_labels": ColSpec("long", "label"),
        "prompt": ColSpec("string", "prompt"),
        "batch_size": ColSpec("long", "label", required=False),
    }[told["asks"]]
    pictures = TensorSpec(np.dtype("uint8"), (-1, *told["picture"]))
    return ModelSignature(Schema([column, ColSpec("long", "seed", required=False)]), Schema([pictures]))


def _current(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """The version that is called best; None where there is none."""
    aliases = client.get_registered_model(name).aliases
    return client.get_model_version(name, aliases[BEST]) if BEST in aliases else None


def _leads(current: "ModelVersion | None", new: str, tags: Mapping[str, str]) -> bool:
    if current is None:
        return True
    alike = all(current.tags.get(key) == tags.get(key) for key in MEASURED)
    return current.version != new and alike and float(tags["fid"]) < float(current.tags["fid"])
