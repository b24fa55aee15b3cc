"""Lets a CPU torch import a torchvision whose compiled operators were built for CUDA and do not load.

torchvision's Python half registers shape functions for two operators that its compiled half should have declared.
Where that half does not load, ``import torchvision`` fails, and takes clean-fid's and diffusers' imports with it. With
the two schemas declared, all three import; the operators themselves (box suppression), which nothing here calls, still
raise a clear error.
"""

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared: list[torch.library.Library] = []  # a schema lives as long as the library that defined it


def declare_missing_operators() -> None:
    """Declare torchvision's missing operator schemas; call it before anything imports torchvision.

    Does nothing on a torch built for a GPU, without torchvision, or where torchvision's operators load.
    """
    if hasattr(torch.ops.torchvision, "nms") or torch.version.cuda or torch.version.hip:
        return
    package = importlib.util.find_spec("torchvision")
    if package is None or any(_loads(library) for library in _libraries(package.submodule_search_locations or [])):
        return
    library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)


def _libraries(folders: list[str]) -> list[Path]:
    return [file for folder in folders for file in sorted(Path(folder).glob("_C.*")) if file.suffix in (".so", ".pyd")]


def _loads(library: Path) -> bool:
    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True
