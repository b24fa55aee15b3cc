"""Text embeddings of a run's prompts, encoded once: stored without padding, looked up by label.

The rows are the training prompts, then the empty prompt of guidance, whose label is therefore the number of training
prompts, as the number of classes stands for "no class"; then prompts that only evaluation asks for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Int
from torch import Tensor

from hd_core.types import Condition
from pipelines.shards import Shard, ShardSet, ShardSetSpec, commit_table, in_dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTable:
    """Embeddings of prompts in the order of their labels."""

    embeddings: Sequence[np.ndarray]
    """``(tokens, width)`` each, of as many tokens as the prompt has."""
    texts: Sequence[str]
    num_training: int
    """Prompts that training draws from; the label of the empty prompt."""
    length: int
    """Tokens to which every condition is padded."""

    def __len__(self) -> int:
        return self.num_training

    @classmethod
    def read(cls, shards: ShardSet) -> "PromptTable":
        """The table of a complete set of shards."""
        assert shards.complete
        embeddings: list[np.ndarray] = []
        texts: list[str] = []
        width = shards.spec.shape[-1]
        for path in shards.paths(range(shards.spec.num_shards)):
            table = pq.read_table(path)
            texts += table.column("prompt").to_pylist()
            embeddings += [_decoded(value, shards.spec.dtype, width) for value in table.column("values")]
        spec = shards.spec
        return cls(
            embeddings=embeddings, texts=texts, num_training=spec.inputs["num_training"], length=spec.details["length"]
        )

    def condition(self, labels: Int[Tensor, " b"]) -> Condition:
        """Embeddings of the labels' prompts, padded at the right; the mask tells text from padding."""
        rows = [self.embeddings[label] for label in labels.tolist()]
        padded = torch.zeros(len(rows), self.length, rows[0].shape[1])
        mask = torch.zeros(len(rows), self.length, dtype=torch.bool)
        for row, (embedding, place) in enumerate(zip(rows, padded, strict=True)):
            place[: len(embedding)] = torch.from_numpy(embedding.astype(np.float32))
            mask[row, : len(embedding)] = True
        return Condition(labels=labels, embeddings=padded.to(labels.device), mask=mask.to(labels.device))


def _decoded(value: pa.LargeBinaryScalar, dtype: str, width: int) -> np.ndarray:
    return np.frombuffer(value.as_buffer(), dtype).reshape(-1, width)


def write_prompts(
    folder: Path, spec: ShardSetSpec, index: int, texts: Sequence[str], embeddings: Sequence[np.ndarray]
) -> Shard:
    """Commit one shard of prompts atomically.

    Raises:
        ValueError: an embedding does not fit into the stored dtype.
    """
    stored = [in_dtype(embedding, spec.dtype, "text embeddings") for embedding in embeddings]
    columns = {
        "sample_id": pa.array(spec.ids(index), pa.int64()),
        "prompt": pa.array(texts, pa.string()),
        "tokens": pa.array([len(embedding) for embedding in stored], pa.int64()),
        "values": pa.array([embedding.tobytes() for embedding in stored], pa.large_binary()),
    }
    return commit_table(folder, spec, index, pa.table(columns))


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The distinct prompts of a run, and which of them stand where."""

    texts: tuple[str, ...]
    """By label; the empty prompt of guidance among them."""
    num_training: int
    """Prompts that training draws from."""
    evaluation: tuple[int, ...]
    """Labels of the prompts that samples are measured with, in order."""
    labels: dict[str, int] = field(repr=False)
    """Label of each prompt."""

    @classmethod
    def of(cls, training: Sequence[str], evaluation: Sequence[str], captions: Sequence[str] = ()) -> "Vocabulary":
        """Deduplicate prompts. Evaluation uses the training's where it has none of its own; captions are of images."""
        first = list(dict.fromkeys(training))
        labels = {text: label for label, text in enumerate(first)}
        others = [text for text in dict.fromkeys([*evaluation, *captions]) if text not in labels]
        labels |= {text: len(first) + 1 + place for place, text in enumerate(others)}
        asked = tuple(labels[text] for text in evaluation or training)
        return cls(texts=(*first, "", *others), num_training=len(first), evaluation=asked, labels=labels)

    def labels_of(self, captions: Sequence[str] | None) -> np.ndarray:
        """The label of each image's caption, int64. ValueError where there are no captions."""
        if captions is None:
            raise ValueError("the teacher reads text, so real images need captions: give data that has them")
        return np.array([self.labels[text] for text in captions], np.int64)

    def evaluation_labels(self, ids: range) -> Int[Tensor, " b"]:
        """The prompt of each sample: in order, and around again where there are more samples than prompts."""
        return torch.tensor([self.evaluation[sample_id % len(self.evaluation)] for sample_id in ids])
