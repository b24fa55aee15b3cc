"""Whether `hdistill score` says what clean-fid says, on the same files, and how much sooner.

    python -m benchmarks.fid_parity [--quick] [--pictures N] [--actors N]

Two folders of PNG files, of which each is a crop of a photograph of scikit-learn's and has a size of its own, or the
images of an npz file (--npz: x_train, x_test), go through clean-fid's own `compute_fid` and through ours, in this
process and by Ray actors, each in a process of its own. Both have the same network: Inception of random weights, or its
real ones where they are given (--weights). clean-fid loads pictures with as many workers as there are actors. `--quick`
takes a small network in Inception's place.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.process import available_cpus, prepare_process  # before torch: it sets how threads wait

# isort: split
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from pipelines.inception import WEIGHTS
from pipelines.torchvision_ops import declare_missing_operators

SIDES = (60, 400)
"""Pictures have sides between these."""


class RandomInception(nn.Module):
    """What TorchScript of Inception offers, of random weights: its layers, and the classifier after them."""

    def __init__(self, quick: bool) -> None:
        super().__init__()
        declare_missing_operators()
        from torchvision.models import inception_v3

        if quick:
            convolution = [nn.Conv2d(3, 2048, 15, stride=12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            self.layers, self.output = nn.Sequential(*convolution), nn.Linear(2048, 10)
            return
        net = inception_v3(weights=None, aux_logits=False, init_weights=True, transform_input=False)
        net.fc, net.dropout = nn.Identity(), nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.layers, self.output = net, nn.Linear(2048, 1008)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(self.layers(x))


def write_weights(folder: Path, quick: bool) -> Path:
    """A TorchScript file as NVIDIA's is."""
    torch.manual_seed(0)
    model = RandomInception(quick).train()
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # it takes the statistics of the batch as they are; without any, features reach 1e7
    with torch.no_grad():
        model(nn.functional.interpolate(torch.randn(16, 3, 12, 12), 299, mode="bilinear"))
    model.eval()
    torch.jit.save(torch.jit.trace(model, torch.zeros(1, 3, 299, 299)), folder / WEIGHTS)
    return folder / WEIGHTS


def draw(folder: Path, count: int, photograph: int) -> None:
    """Crops of one photograph, in many sizes."""
    image = Image.fromarray(load_sample_images()["images"][photograph])
    rng = np.random.default_rng(photograph)
    folder.mkdir()
    for number in range(count):
        side = int(rng.integers(*SIDES))
        left, top = (int(rng.integers(0, length - side)) for length in image.size)
        image.crop((left, top, left + side, top + side)).save(folder / f"{number:05}.png")


def unpack(folders: list[Path], npz: Path, count: int) -> None:
    """The first images to train on, and the first to test on."""
    with np.load(npz, allow_pickle=False) as file:
        for folder, key in zip(folders, ("x_train", "x_test"), strict=True):
            folder.mkdir()
            for number, image in enumerate(file[key][:count]):
                Image.fromarray(image.squeeze()).save(folder / f"{number:05}.png")


def theirs(weights: Path, folders: list[str], workers: int) -> float:
    """clean-fid's own FID of two folders."""
    declare_missing_operators()
    from cleanfid.fid import compute_fid
    from cleanfid.inception_torchscript import InceptionV3W

    net = InceptionV3W(str(weights.parent), download=False)
    given: dict[str, Any] = {"device": torch.device("cpu"), "num_workers": workers, "batch_size": 32, "verbose": False}
    return float(compute_fid(*folders, custom_feat_extractor=net, use_dataparallel=False, **given))


def ours(weights: Path, folders: list[str], actors: int) -> float:
    """FID of the same by this project, with an empty cache."""
    from rich.console import Console

    from pipelines.production import Actors
    from pipelines.score import Asked, score

    with TemporaryDirectory() as cache:
        asked = Asked(
            pictures=folders[0],
            reference=folders[1],
            features=str(weights),
            by_category=False,
            neighbours=5,
            pairs=1000,
            actors=Actors(count=actors, cpus=1.0, gpus=0.0),
            cache=Path(cache),
        )
        return score(asked, Console(quiet=True))["rows"][0]["fid"]


SIDES_OF = {"clean-fid": theirs, "ours": ours}


def child(side: str, weights: Path, folders: list[str], processes: int) -> None:
    """One measurement, in a process of its own: the FID and the seconds, everything but imports."""
    prepare_process(None if side == "clean-fid" or not processes else 1.0)
    started = time.perf_counter()
    fid = SIDES_OF[side](weights, folders, processes)
    print(json.dumps({"fid": fid, "seconds": time.perf_counter() - started}))


def measured(side: str, weights: Path, folders: list[str], processes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.fid_parity", "--child", side, str(weights), *folders, str(processes)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def main() -> None:
    """Both sides with one process and with many, then the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pictures", type=int, default=0, help="in each folder [default: 700, with --quick 200]")
    parser.add_argument("--actors", type=int, default=available_cpus())
    parser.add_argument("--npz", type=Path, help="images, in place of crops of photographs")
    parser.add_argument("--weights", type=Path, help=f"{WEIGHTS}, in place of random ones")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        side, weights, *folders, processes = given.child
        child(side, Path(weights), folders, int(processes))
        return
    count = given.pictures or (200 if given.quick else 700)
    found: dict[str, dict[str, float]] = {}
    print("| | processes | FID | seconds |\n|---|---|---|---|")
    with TemporaryDirectory() as folder:
        weights, folders = given.weights or write_weights(Path(folder), given.quick), [f"{folder}/a", f"{folder}/b"]
        if given.npz:
            unpack([Path(path) for path in folders], given.npz, count)
        else:
            for photograph, path in enumerate(folders):
                draw(Path(path), count, photograph)
        for side in SIDES_OF:
            for processes in (0, given.actors):
                one = found[f"{side} {processes}"] = measured(side, weights, folders, processes)
                print(f"| {side} | {processes} | {one['fid']:.6f} | {one['seconds']:.1f} |", flush=True)
    wanted = found["clean-fid 0"]["fid"]
    errors = [abs(one["fid"] / wanted - 1) for name, one in found.items() if name.startswith("ours")]
    speedup = {name: found[f"clean-fid {n}"]["seconds"] / found[f"ours {n}"]["seconds"] for name, n in
               (("one", 0), ("many", given.actors))}  # fmt: skip
    best = min(found[f"clean-fid {n}"]["seconds"] for n in (0, given.actors)) / min(
        found[f"ours {n}"]["seconds"] for n in (0, given.actors)
    )
    figures = {"relative_error": max(errors), "speedup": round(best, 2), "speedup_by_processes": speedup}
    print(json.dumps({**figures, "pictures": count, "features": 2048, "actors": given.actors, "found": found}))


if __name__ == "__main__":
    main()
