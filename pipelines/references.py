"""What samples are measured against: real images as features of one net, and the statistics that FID is against."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hd_core.metrics.frechet import frechet_distance
from hd_core.metrics.statistics import Moments
from pipelines.data import DataSplits, ImageSet
from pipelines.extractor import Extractor
from pipelines.feature_shards import feature_spec
from pipelines.features import load_extractor
from pipelines.lazy import LazyPixels
from pipelines.pictures import Pixels
from pipelines.production import Actors, InParts, produce_rest
from pipelines.published import load_statistics
from pipelines.shards import ShardSet, decode, tensor_table

_TRAVELLING_BYTES = 128 * 2**20
"""Pixels that are sent to actors at most; larger sets in memory stay here."""
_UNITS_IN_SHARD = 64


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Real images that nothing was trained on, as features of one net."""

    extractor: Extractor
    """The net."""
    features: np.ndarray
    """``(m, d)`` of the held-out images."""
    moments: Moments
    """What FID is against: of these features, or published ones."""
    source: str
    """Where the moments come from: held-out images, or the name of published statistics."""
    real_fid: float
    """FID of as many real training images as are sampled against these: what a perfect generator would get."""
    halves_fid: float
    """FID of one half of the held-out images against the other."""
    pixels: tuple[int, ...]
    """Height, width and channels of an image."""

    @property
    def moments_sha256(self) -> str:
        """Of what FID is against."""
        return hashlib.sha256(self.moments.mean.tobytes() + self.moments.covariance.tobytes()).hexdigest()

    @property
    def provenance(self) -> dict[str, Any]:
        """How FID was measured, to stand beside it."""
        net = self.extractor
        resize = "none" if self.pixels[:2] == (net.size, net.size) else f"clean-fid PIL bicubic to {net.size}"
        width = self.moments.width
        return {"source": self.source, "features_sha256": net.fingerprint, "feature_width": width, "resize": resize}


@dataclass(frozen=True, kw_only=True)
class Library:
    """Features of real images, each made once and kept."""

    folder: Path
    splits: DataSplits
    actors: Actors
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
    """Shows how far something is: what it gives is told of rows."""

    def reference(self, net: str, extractor: Extractor, num_samples: int, statistics: str) -> Reference:
        """The held-out images under a net, and how far real images are from them.

        Args:
            net: how a process elsewhere loads the extractor.
            num_samples: samples that will be measured.
            statistics: published ones that FID is against instead; empty: none.

        Raises:
            ValueError: there are no such statistics, or they are of another net.
        """
        published = load_statistics(statistics, extractor.name) if statistics else None
        features = self._features("reference", self.splits.reference, net, extractor, len(self.splits.reference))
        real = self._features("train", self.splits.train, net, extractor, min(num_samples, len(self.splits.train)))
        half, moments = len(features) // 2, published or Moments.of(features)
        return Reference(
            extractor=extractor,
            features=features,
            moments=moments,
            source=statistics or "held-out images",
            real_fid=frechet_distance(Moments.of(real), moments),
            halves_fid=frechet_distance(Moments.of(features[:half]), Moments.of(features[half:])),
            pixels=self.splits.reference.images.shape[1:],
        )

    def judged_by(self, extractor: Extractor) -> ShardSet:
        """Features of what probes score against, as far as they are there."""
        return self._opened(*self._judges, extractor, len(self._judges[1]))

    def make_judged_by(self, net: str, extractor: Extractor) -> None:
        """See that those are all there."""
        self._features(*self._judges, net, extractor, len(self._judges[1]))

    @property
    def _judges(self) -> tuple[str, ImageSet]:
        kept = self.splits.validation
        return ("train", self.splits.train) if kept is None else ("validation", kept)

    def _features(self, part: str, images: ImageSet, net: str, extractor: Extractor, count: int) -> np.ndarray:
        """``(count, d)`` of the first images of a part of the data."""
        shards = self._opened(part, images, extractor, count)
        shards.mend()
        if not shards.complete:
            self._make(shards, images, net, extractor)
        return shards.read(range(shards.spec.num_shards)).values

    def _opened(self, part: str, images: ImageSet, extractor: Extractor, count: int) -> ShardSet:
        some = extractor(images.images[:1])
        inputs = {"feature_net": extractor.fingerprint, "data": self.splits.fingerprint, "part": part}
        spec = feature_spec(count, _UNITS_IN_SHARD * extractor.rows_at_once, some, inputs)
        return ShardSet.open(self.folder / f"{extractor.name}-{part}-{spec.fingerprint[:16]}", spec)

    def _make(self, shards: ShardSet, images: ImageSet, net: str, extractor: Extractor) -> None:
        pixels = images.images
        travels = isinstance(pixels, LazyPixels) or pixels.nbytes <= _TRAVELLING_BYTES
        parts = InParts(
            read=partial(_read, pixels, images.labels),
            encoder=partial(_Encoder, net=net, pixels=pixels.shape[1:]),
            rows=extractor.rows_at_once,
        )
        actors = self.actors if travels else Actors(count=0, cpus=1, gpus=0)
        with self.progress(f"{extractor.name} features of real images", shards.spec.rows) as show:
            produce_rest(shards, parts, actors, show)


def _read(images: Pixels | LazyPixels, labels: np.ndarray, ids: range) -> pa.Table:
    return tensor_table(np.arange(ids.start, ids.stop), labels[ids.start : ids.stop], images[ids.start : ids.stop])


class _Encoder:
    """Holds a feature net, and makes features of pixels."""

    def __init__(self, device: str, *, net: str, pixels: tuple[int, ...]) -> None:
        self._extractor, self._pixels = load_extractor(net, device), pixels

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = decode(table, "uint8", self._pixels)
        return tensor_table(rows.sample_ids, rows.labels, self._extractor(rows.values))
