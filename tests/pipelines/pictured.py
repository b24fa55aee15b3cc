"""The same few pictures as a folder, as Parquet files, as tars and as a saved Hugging Face data set."""

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.data import DataConfig

COUNT = 12
SIDE = 6


def pixels(count: int = COUNT, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def classes(count: int) -> list[int]:
    """The first four pictures are of class 0, the next four of class 1, and so on, as a folder orders them."""
    return [index // 4 for index in range(count)]


def write_folder(root: Path, pictures: Sequence[bytes]) -> Path:
    for index, contents in enumerate(pictures):
        file = root / f"class {index // 4}" / f"{index % 4}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(contents)
        file.with_suffix(".txt").write_text(f"picture {index}\n")
    return root


def write_parquet(root: Path, pictures: Sequence[bytes], **columns: Any) -> Path:
    """Two files of row groups of three; the second's pictures are structs as Hugging Face writes them, too."""
    root.mkdir(parents=True, exist_ok=True)
    structs = [{"bytes": contents, "path": None} for contents in pictures]
    columns = {"label": classes(len(pictures)), "caption": [f"picture {i}" for i in range(len(pictures))], **columns}
    half = len(pictures) // 2
    for name, part in (("a", slice(half)), ("b", slice(half, None))):
        cut = {key: values[part] for key, values in columns.items() if values is not None}
        table = pa.table({"image": structs[part], **cut})
        pq.write_table(table, root / f"{name}.parquet", row_group_size=3)
    return root


def write_tar(path: Path, members: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, contents in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(contents)
            archive.addfile(about, io.BytesIO(contents))
    return path


def write_webdataset(root: Path, pictures: Sequence[bytes]) -> Path:
    """Two tars; the classes of the first stand in .cls, those of the second in .json."""
    half = len(pictures) // 2
    for name, rows in (("part-00.tar", range(half)), ("part-01.tar", range(half, len(pictures)))):
        members: dict[str, bytes] = {}
        for row in rows:
            members[f"x/{row:03d}.png"] = pictures[row]
            if row < half:
                members[f"x/{row:03d}.cls"] = str(row // 4).encode()
                members[f"x/{row:03d}.txt"] = f"picture {row}\n".encode()
            else:
                members[f"x/{row:03d}.json"] = json.dumps({"label": row // 4, "caption": f"picture {row}"}).encode()
        write_tar(root / name, members)
    return root


def write_huggingface(root: Path, pictures: Sequence[bytes]) -> Path:
    datasets = import_module("datasets")
    columns = {
        "image": [{"bytes": contents, "path": None} for contents in pictures],
        "label": classes(len(pictures)),
        "caption": [f"picture {index}" for index in range(len(pictures))],
    }
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(num_classes=3), caption=datasets.Value("string")
    )
    whole = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict({"train": whole, "test": whole.select(range(4))}).save_to_disk(str(root))
    return root


WRITERS: dict[Any, Any] = {
    "folder": write_folder,
    "parquet": write_parquet,
    "webdataset": write_webdataset,
    "huggingface": write_huggingface,
}


def config(kind: Any, path: Path, **changes: Any) -> DataConfig:
    return DataConfig(**{"kind": kind, "path": str(path), "held_out": 3, **changes})
