"""Statistics of real images that others have published: clean-fid's sets by name, or a file of mean and covariance."""

import zipfile
from pathlib import Path

import numpy as np

from hd_core.metrics.statistics import Moments
from pipelines.cache import cache_folder, fetched

_COUNT = 50_000
"""Images that statistics are taken to be of: it only cancels, since files hold covariances and not sums."""


def load_statistics(name: str, net: str) -> Moments:
    """The moments in an npz file of ``mu`` and ``sigma``, or of a set that clean-fid publishes, as NAME/SPLIT/SIZE.

    Raises:
        ValueError: there is no such file or set, it is not of this feature net, or it cannot be fetched.
    """
    path = Path(name).expanduser()
    if path.suffix == ".npz":
        return _read(path)
    parts = _parts(name)
    if net != "inception":
        raise ValueError(f"published statistics {name} are of inception; the feature net here is {net}")
    return _read(_fetched(*parts))


def _parts(name: str) -> tuple[str, str, str]:
    parts = name.split("/")
    if len(parts) != 3 or not all(parts) or not parts[2].isdigit():
        raise ValueError(
            f"statistics are an npz file, or one of clean-fid's sets as NAME/SPLIT/SIZE, such as cifar10/train/32,"
            f" ffhq/trainval70k/256 or lsun_church/train/256; given {name!r}"
        )
    return parts[0], parts[1], parts[2]


def _fetched(name: str, split: str, size: str) -> Path:
    """A published set's file in the cache."""
    from cleanfid.downloads_helper import check_download_url

    path = cache_folder("statistics") / f"{name}_clean_{split}_{size}.npz".lower()
    url = f"https://www.cs.cmu.edu/~clean-fid/stats/{path.name}"
    remedy = f"Put {url} at {path}, or check the name"
    return fetched(path, lambda beside: check_download_url(beside, url), f"statistics {name}/{split}/{size}", remedy)


def _read(path: Path) -> Moments:
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[key], np.float64) for key in ("mu", "sigma"))
    except FileNotFoundError:
        raise ValueError(f"no file of statistics at {path}") from None
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no npz file of mu (d,) and sigma (d, d): {error}") from None
    return Moments(_COUNT, mean.reshape(-1), covariance * (_COUNT - 1))
