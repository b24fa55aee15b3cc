"""Multiply-adds by longhand formulas and published figures."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pipelines.architectures import ARCHITECTURES, architecture, architecture_folder, shipped
from pipelines.flops import Arithmetic, count, multiply_adds, phases, print_costs, speedup
from pipelines.memory import parameters
from pipelines.recipe import load
from pipelines.teachers import EMBEDDED
from tests.pipelines.tiny import tiny_recipe

DIT = "facebook/DiT-XL-2-256"
DDPM = "google/ddpm-cifar10-32"
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SANA = "Efficient-Large-Model/Sana_"

PARAMETERS = {
    DIT: 675.1e6 + 27 * (1001 * 1152 + 257 * 1152 + 1153 * 1152),  # each of 28 blocks has embeddings of its own
    DDPM: 35.7e6,
    SD: 860e6,
    f"{SANA}600M_512px_diffusers": 591.75e6,
    f"{SANA}600M_1024px_diffusers": 591.75e6,
    f"{SANA}1600M_512px_diffusers": 1.6e9,
}
"""As published; SANA's 0.6 B as built."""
AUTOENCODERS = {DIT: 83.65e6, DDPM: 0, SD: 83.65e6, SANA: 312.25e6}


def write_config(folder: Path, **config: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def dit() -> Arithmetic:
    return count(DIT)


@pytest.fixture(scope="module")
def digits() -> Arithmetic:
    return count("digits")


# Architectures


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_shipped_architectures_have_the_published_numbers_of_parameters(name: str):
    built = architecture(name)
    assert parameters(built.network) == pytest.approx(PARAMETERS[name], rel=5e-3)
    expected = next(value for start, value in AUTOENCODERS.items() if name.startswith(start))
    assert parameters(built.autoencoder) == pytest.approx(expected, rel=1e-3)
    assert {parameter.device.type for parameter in built.network.parameters()} == {"meta"}


@pytest.mark.parametrize("name", [SD, f"{SANA}600M_512px_diffusers"])
@torch.no_grad()
def test_networks_of_text_are_called_with_text(name: str):
    built = architecture(name)
    x = torch.zeros(2, *built.shape, device="meta")
    assert built.call(x).shape == x.shape
    assert built.decode(x[:1]).shape == (1, 3, 512, 512)


def test_all_that_ships_is_tested_and_only_configs_ship():
    assert shipped() == sorted(PARAMETERS)
    assert {file.suffix for file in ARCHITECTURES.rglob("*") if file.is_file()} == {".json", ".md"}
    for config in ARCHITECTURES.rglob("*.json"):
        assert "_class_name" in json.loads(config.read_text())


def test_a_path_is_embedded_local_or_shipped(tmp_path: Path):
    assert architecture_folder("digits") == EMBEDDED / "digits"
    assert architecture_folder(DIT) == ARCHITECTURES / "facebook--DiT-XL-2-256"
    assert architecture_folder(str(tmp_path)) == tmp_path
    with pytest.raises(ValueError, match=r"no architecture 'facebook/DiT-XL-9'.*digits(.|\n)*facebook/DiT-XL-2-256"):
        architecture_folder("facebook/DiT-XL-9")


def test_what_cannot_be_built_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"must have a config\.json"):
        architecture(str(tmp_path))
    with pytest.raises(ValueError, match="names the class Other; there is DiT, "):
        architecture(write_config(tmp_path, _class_name="Other"))
    with pytest.raises(ValueError, match=r"config.json cannot be built: .*depht"):
        architecture(write_config(tmp_path, _class_name="DiT", depht=3))
    with pytest.raises(ValueError, match=r"config.json cannot be built: width 10 is not a multiple of heads 4"):
        architecture(write_config(tmp_path, _class_name="DiT", width=10))


def test_the_autoencoder_lies_beside_the_model(tmp_path: Path):
    small = {"patch_size": 1, "width": 8, "depth": 1, "heads": 2, "num_classes": 1}
    write_config(tmp_path / "transformer", _class_name="DiT", image_size=8, channels=4, **small)
    assert count(str(tmp_path)).decoder_macs == 0
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    small = {"block_out_channels": [8], "latent_channels": 4, "norm_num_groups": 4, "mid_block_add_attention": False}
    write_config(tmp_path / "vae", _class_name="AutoencoderKL", **blocks, **small)
    found = count(str(tmp_path))
    # 8x8 pixels: 1x1 of 4 channels, 3x3 of 4 to 8, four 3x3 of 8 in the middle and four above, 3x3 of 8 to 3.
    assert found.decoder_macs == 64 * (4 * 4 + 9 * (4 * 8 + 8 * 8 * 8 + 8 * 3))
    assert found == count(str(tmp_path / "transformer"))


# Multiply-adds


def test_the_embedded_teacher_by_longhand(digits: Arithmetic):
    config = json.loads((EMBEDDED / "digits" / "transformer" / "config.json").read_text())
    n, w = (config["image_size"] // config["patch_size"]) ** 2, config["width"]
    patches, embedding = 2 * n * config["channels"] * config["patch_size"] ** 2 * w, 64 * w + w * w
    block = 12 * n * w * w + 2 * n * n * w + 6 * w * w
    assert digits.teacher_macs == patches + embedding + config["depth"] * block + 2 * w * w
    assert digits.student_macs == digits.teacher_macs + embedding
    assert digits.shape == (1, 8, 8)
    assert (digits.decoder_macs, digits.decoder_parameters) == (0, 0)


def test_dit_and_its_decoder_give_the_published_figures(dit: Arithmetic):
    assert dit.teacher_macs / 1e9 == pytest.approx(118.64, rel=5e-3)
    assert dit.decoder_macs / 1e9 == pytest.approx(311.09, rel=5e-5)
    assert dit.student_macs - dit.teacher_macs == 64 * 1152 + 1152**2
    assert speedup(250, 1, dit) == pytest.approx(69.7, rel=5e-3)
    once = 27 * (256 * 1152 + 1152**2)  # where all blocks share one embedding of the time, as when it was published
    assert (dit.teacher_macs - once) / 1e9 == pytest.approx(118.64, rel=2e-4)


def test_the_speedup_counts_the_decoder_on_both_sides(dit: Arithmetic):
    plain = replace(dit, student_macs=dit.teacher_macs)
    t, d = dit.teacher_macs, dit.decoder_macs
    assert speedup(250, 2, plain) == pytest.approx((250 * t + d) / (2 * t + d))
    assert speedup(250, 2, replace(plain, decoder_macs=0)) == pytest.approx(125)


# Phases

COSTS = Arithmetic(
    teacher_macs=1000, student_macs=1001, decoder_macs=70, teacher_parameters=1, decoder_parameters=1, shape=(1, 1, 1)
)


def test_phases_of_a_recipe_by_hand(tmp_path: Path):
    t, s, d = 1000, 1001, 70
    assert multiply_adds(tiny_recipe(tmp_path), COSTS) == {
        "precompute": (64, 4 * t),
        "sketch": (5 * 16, 3 * s),
        "refine": (4 * 16, round(1 + 3 + 2 + (2 + 2 + 3) / 2) * s),
        "sfd_2": (4 * 16, 2 * 3 * s),
        "sfd_4": (4 * 16, 3 * 3 * s),
        "evaluate": (200, (1 + 2 + 2) * t + (1 + 1 + 2 + 3) * s + 7 * d),
    }
    guided = multiply_adds(tiny_recipe(tmp_path, "teacher.guidance_scale=2", "evaluate.guidance_scales=[1, 3]"), COSTS)
    assert guided["precompute"] == (64, 2 * 4 * t)
    assert guided["evaluate"] == (200, 2 * 5 * t + 3 * 7 * s + 11 * d)


def test_a_student_that_is_told_its_steps_is_measured_at_all_of_them():
    counts = [1, 2, 3, 4, 6, 8, 10, 1, 2, 1, 2]
    teacher = [1, 2, 3, 4, 5, 10, 2, 3, 4, 5, 32, 2, 3, 4, 5]
    decoded = (len(counts) + len(teacher)) * 70
    found = multiply_adds(load("digits_sfd"), COSTS)["evaluate"]
    assert found == (5000, sum(teacher) * 1000 + sum(counts) * 1001 + decoded)


def test_a_recipe_of_a_shipped_architecture_needs_no_download(tmp_path: Path):
    (tmp_path / "ddpm.yaml").write_text(
        f"teacher: {{path: {DDPM}}}\nstages: {{sketch: {{objective: {{name: mean_velocity}}}}}}\n"
    )
    costs = {cost.phase: cost for cost in phases(load(str(tmp_path / "ddpm.yaml")))}
    sketch = costs["sketch"]
    assert sketch.macs == 500 * 128 * sketch.macs_per_row == 500 * 128 * 3 * (6_221_856_768 + 64 * 512 + 512 * 512)
    assert sketch.memory.checkpointed_peak is not None
    assert sketch.memory.weights < sketch.memory.checkpointed_peak < sketch.memory.peak
    assert costs["precompute"].memory.checkpointed_peak is None


def test_an_absent_teacher_is_a_clear_mistake():
    with pytest.raises(ValueError, match="no architecture 'teachers/fashion'"):
        phases(load("fashion_hd"))


def test_the_printed_costs():
    printed = io.StringIO()
    print_costs(load("digits"), Console(file=printed, width=120))
    text = printed.getvalue()
    assert "teacher digits: 317.70 k parameters, 3.40 M multiply-adds a call" in text
    assert "refine: 1 call an image, the teacher 32: 31.9x" in text
    assert "sfd_4: 4 calls an image, the teacher 32: 8.0x" in text
    assert "334.20 G" in text  # 8192 trajectories of 12 calls
