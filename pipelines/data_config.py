"""What a recipe says about its real images."""

from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["digits", "npz", "folder", "parquet", "webdataset", "huggingface"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where real images come from, and how they are split."""

    kind: Kind = "digits"
    """digits: scikit-learn's. npz: an archive. folder: pictures. parquet, webdataset, huggingface: encoded pictures."""
    path: str = ""
    """The file or folder (for parquet and webdataset a pattern, too), or a name on the hub; digits need none."""
    image_size: int = 0
    """Side to which images are brought, by ``fit``; 0 leaves them as they are."""
    fit: Literal["resize", "pad"] = "resize"
    """resize: centre-crop to a square, then resize. pad: centre on black; no pixel changes, no image may be larger."""
    channels: Literal[0, 1, 3] = 0
    """1: grey. 3: colour. 0: as they are (encoded pictures are read in colour)."""
    held_out: int | float = 600
    """Reference images: a number, or a share between 0 and 1; unused where the data bring their own reference."""
    validation: int | float = 0
    """Images that are kept from training, and that probes and sweeps score against: a number, or a share (0 to 1) of
    what is left beside the reference. 0: they score against the images that are trained on."""
    split_seed: int = 0
    """Seed of the permutation whose last ``held_out`` images are the reference, and of that which keeps ``validation``.
    """
    image_column: str = "image"
    """Column of the encoded pictures, in Parquet and Hugging Face data."""
    label_column: str = "label"
    """Column, or field of a WebDataset's .json, of the classes; none where it is absent or the name is empty."""
    caption_column: str = "caption"
    """Column, or field of a .json or of metadata.jsonl, of the captions; none where it is absent or empty."""
    split: str = "train"
    """Split of a Hugging Face data set; of a saved set without splits, all is taken."""
    reference_split: str = ""
    """Split of a Hugging Face data set that is the reference, in place of ``held_out``; empty: none."""

    def __post_init__(self) -> None:
        self._check_source()
        if self.image_size < 0:
            raise ValueError(f"image_size must be 0 (as it is) or a number of pixels; given {self.image_size}")
        if self.fit not in ("resize", "pad"):
            raise ValueError(f"fit must be resize or pad; given {self.fit!r}")
        if self.fit == "pad" and not self.image_size:
            raise ValueError("fit pad needs an image_size to pad to; given 0")
        if self.channels not in (0, 1, 3):
            raise ValueError(f"channels must be 1, 3 or 0 (as they are); given {self.channels}")
        if not _is_count_or_share(self.held_out):
            raise ValueError(f"held_out must be a number of images or a share between 0 and 1; given {self.held_out}")
        if self.validation != 0 and not _is_count_or_share(self.validation):
            raise ValueError(
                f"validation must be 0, a number of images or a share between 0 and 1; given {self.validation}"
            )
        if not 0 <= self.split_seed < 2**32:
            raise ValueError(f"split_seed must be in [0, 2^32); given {self.split_seed}")
        self._check_columns()

    def _check_source(self) -> None:
        if self.kind not in get_args(Kind):
            *most, last = get_args(Kind)
            raise ValueError(f"kind of data must be {', '.join(most)} or {last}; given {self.kind!r}")
        if self.kind != "digits" and not self.path:
            raise ValueError(f"data of kind {self.kind} needs a path; none was given")
        if self.kind == "digits" and self.path:
            raise ValueError(f"data of kind digits has no path; given {self.path!r}")

    def _check_columns(self) -> None:
        if not self.image_column:
            raise ValueError("image_column must name the column of the pictures; given none")
        if self.kind != "huggingface" and (self.split != "train" or self.reference_split):
            raise ValueError(f"split and reference_split are for data of kind huggingface; the kind is {self.kind}")
        if not self.split:
            raise ValueError("split must name a split of the data set, such as train; given none")
        if self.split == self.reference_split:
            raise ValueError(f"reference_split must be another split than the one to train on; both are {self.split!r}")

    def held_out_of(self, total: int) -> int:
        """How many of ``total`` images are the reference; ValueError where nothing is left to train on."""
        return _count_of("held_out", self.held_out, total)

    def validation_of(self, total: int) -> int:
        """How many of ``total`` images beside the reference are kept from training.

        Raises:
            ValueError: nothing is left to train on.
        """
        return _count_of("validation", self.validation, total) if self.validation else 0


def _is_count_or_share(value: int | float) -> bool:
    return value >= 1 if isinstance(value, int) else 0 < value < 1


def _count_of(name: str, value: int | float, total: int) -> int:
    count = value if isinstance(value, int) else round(value * total)
    if not 0 < count < total:
        raise ValueError(f"{name} {value} of {total} images leaves too few to train on or to measure by")
    return count
