"""Rows of the table for folders of pictures that others' generators drew."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from pipelines.artifacts import fingerprint
from pipelines.captions import own_captions
from pipelines.evaluate import Evaluator
from pipelines.generators import Generator
from pipelines.peers import PICTURES, PeerConfig
from pipelines.picture_cosines import picture_cosines
from pipelines.picture_files import PictureFiles, picture_features
from pipelines.pictures import MODES, Pixels
from pipelines.report import Row


def drawn_by(name: str, peer: PeerConfig) -> Generator:
    """A folder of pictures as what drew them."""
    files = PictureFiles(peer.path)
    captions = own_captions(files.source)
    return Generator(
        label=name,
        stage="",
        solver=PICTURES,
        grid=(),
        calls_per_image=peer.calls,
        train_seconds=0.0,
        identity=files.identity,
        peer=peer,
        captions=fingerprint(captions) if captions else "",
    )


def measure_pictures(
    evaluator: Evaluator, generator: Generator, nets: Sequence[str], progress: Callable[[int], None]
) -> Row:
    """The row of a folder: of all pictures that are in it, each resized from its own size to the net's.

    Args:
        nets: how a process elsewhere loads each feature net of the evaluator.
        progress: told of pictures.

    Raises:
        ValueError: there are no pictures, fewer than can be measured, or one is damaged.
    """
    assert generator.peer
    files, config = PictureFiles(generator.peer.path), evaluator.config
    if len(files) <= config.neighbours:
        raise ValueError(f"{generator.peer.path} holds {len(files)} pictures: more than neighbours are needed")
    folder = evaluator.folder / f"{generator.key}-features"
    ours, *others = [
        picture_features(files, net, reference.extractor, folder, config.actors, progress)
        for net, reference in zip(nets, evaluator.references, strict=True)
    ]
    theirs = others[0] if others else ours[:, :0]
    cosines = None
    if evaluator.clip and (captions := own_captions(files.source)):
        cosines = picture_cosines(files, captions, evaluator.clip, folder, config.actors)
    row = evaluator.row(generator, ours, theirs, cosines, images_per_second=None, gflops_per_image=None)
    evaluator.keep(generator, row, _shown(files, config.pictures, evaluator.reference.pixels))
    return row


def _shown(files: PictureFiles, count: int, pixels: tuple[int, ...]) -> Pixels:
    """The first pictures, in the size and the channels of the table's others."""
    height, width, channels = pixels
    images = (Image.fromarray(files.read(row)) for row in range(min(count, len(files))))
    shown = [np.asarray(image.convert(MODES[channels]).resize((width, height))) for image in images]
    return np.stack(shown).reshape(-1, *pixels)
