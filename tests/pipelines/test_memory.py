"""Bytes that are estimated against tensors that PyTorch really saved, and weights by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hd_core.networks.dit import ScalarEmbedding
from pipelines.architectures import Architecture, architecture
from pipelines.live_bytes import LiveBytes, inference_bytes, training_bytes
from pipelines.memory import Estimate, memory, parameters
from tests.pipelines.tiny import tiny_recipe

CONVOLUTIONS = {
    "_class_name": "UNet2DModel",
    "add_attention": False,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def write_config(folder: Path, **config: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def digits() -> Architecture:
    return architecture("digits")


@pytest.fixture(scope="module")
def plain(digits: Architecture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Estimate]:
    return memory(tiny_recipe(tmp_path_factory.mktemp("plain")), digits)


def test_live_bytes_follow_what_is_freed():
    with LiveBytes() as live:
        a = torch.zeros(1000, device="meta")
        b = a.view(10, 100) * 2
        assert (live.now, live.peak) == (8000, 8000)
        del a
        c = b + 1
        assert (live.now, live.peak) == (8000, 8000)
        c += 1
        d = b.to(torch.bfloat16)
        assert (live.now, live.peak) == (10000, 10000)
        del b, c, d
    assert (live.now, live.peak) == (0, 10000)


def test_what_was_there_before_is_not_counted():
    weight = torch.zeros(10, 10, device="meta")
    with LiveBytes([weight]) as live:
        product = torch.zeros(2, 10, device="meta") @ weight.t()
    assert live.peak == 80 + 80
    assert product.shape == (2, 10)


def saved_bytes(network: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass of a real network, parameters left out."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = call(x)
    saved[output.untyped_storage()._cdata] = output
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in own)


def test_the_meta_device_counts_what_a_real_network_keeps(tmp_path: Path):
    path = write_config(tmp_path, **CONVOLUTIONS)
    meta, real = architecture(path), architecture(path, "cpu")
    assert training_bytes(meta, 5) == training_bytes(real, 5)
    assert inference_bytes(meta, 5) == inference_bytes(real, 5)
    assert training_bytes(meta, 5).kept == saved_bytes(real.network, real.call, torch.zeros(5, *real.shape))


def test_a_training_pass_needs_more_than_a_call_and_grows_by_rows(tmp_path: Path):
    built = architecture(write_config(tmp_path, **CONVOLUTIONS))
    one, two, three = (training_bytes(built, rows) for rows in (1, 2, 3))
    assert three.kept - two.kept == two.kept - one.kept > 0
    assert inference_bytes(built, 2) < two.kept < two.peak
    assert training_bytes(built, 2, frozen=True).kept < two.kept
    assert training_bytes(built, 64, autocast=True).kept < training_bytes(built, 64).kept


def test_checkpointing_keeps_the_ends_of_blocks_and_recomputes_one(tmp_path: Path):
    small = {"num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 16, "norm_type": "ada_norm_zero"}
    blocks = [
        architecture(write_config(tmp_path / str(n), _class_name="DiTTransformer2DModel", num_layers=n, **small))
        for n in (1, 2, 6)
    ]
    one, two, six = (training_bytes(built, 64) for built in blocks)
    short, longer, long = (training_bytes(built, 64, checkpointing=True) for built in blocks)
    tokens = 64 * 64 * 16 * 4
    assert long.kept - longer.kept == 4 * (longer.kept - short.kept)
    assert tokens <= longer.kept - short.kept < 1.1 * tokens < (six.kept - two.kept) / 4
    assert long.kept + (two.kept - one.kept) < long.peak < one.peak + long.kept


def test_fused_attention_keeps_no_matrix_of_tokens(tmp_path: Path):
    small = {"channels": 1, "patch_size": 1, "width": 8, "depth": 1, "heads": 2, "num_classes": 1}
    built = architecture(write_config(tmp_path, _class_name="DiT", image_size=64, **small))
    assert training_bytes(built, 1).peak < 4096 * 4096 * 4  # one matrix would be 64 MiB


def test_weights_of_each_stage_by_hand(digits: Architecture, plain: dict[str, Estimate]):
    t = parameters(digits.network)
    s = t + parameters(ScalarEmbedding(64))
    assert plain["precompute"].weights == 4 * t
    assert plain["sketch"].weights == plain["sfd_2"].weights == 4 * t + (16 + 4) * s
    assert plain["refine"].weights == 4 * t + (16 + 4) * s + 16 * t
    assert plain["evaluate"].weights == 4 * t + 4 * s


def test_adapters_and_a_second_copy_of_the_start(tmp_path: Path, digits: Architecture, plain: dict[str, Estimate]):
    adapted = ("stages.refine.fake_score.kind=lora", "stages.refine.fake_score.rank=4")
    own = ("stages.sfd_2.objective.taught_by=start", "stages.sfd_2.objective.start_intervals=4")
    student = ("stages.sketch.student.kind=lora", "stages.sketch.student.rank=4")
    found = memory(tiny_recipe(tmp_path, *adapted, *own, *student), digits)
    t = parameters(digits.network)
    ends = sum(sum(module.weight.shape) for module in digits.network.modules() if isinstance(module, nn.Linear))
    assert plain["refine"].weights - found["refine"].weights == 16 * t - (4 * t + 16 * 4 * ends)
    assert plain["sketch"].weights - found["sketch"].weights == 16 * t - (4 * t + 16 * 4 * ends)
    assert found["sfd_2"].weights - plain["sfd_2"].weights == 4 * (t + parameters(ScalarEmbedding(64)))


def test_a_generators_graphs_wait_for_the_other_turns(tmp_path: Path, digits: Architecture, plain: dict[str, Estimate]):
    steps = "stages.refine.objective.intervals=3"
    three = memory(tiny_recipe(tmp_path, steps), digits)["refine"]
    last = memory(tiny_recipe(tmp_path, steps, "stages.refine.objective.gradient_steps=1"), digits)["refine"]
    assert three.activations - plain["refine"].activations == 2 * training_bytes(digits, 16).kept
    assert last == plain["refine"]


def test_workers_share_the_rows_and_actors_a_gpu(tmp_path: Path, digits: Architecture, plain: dict[str, Estimate]):
    spread = memory(tiny_recipe(tmp_path, "train.num_workers=2", "precompute.gpus_per_actor=0.5"), digits)
    assert spread["sketch"].activations == training_bytes(digits, 8).peak < plain["sketch"].activations
    assert spread["precompute"].peak == 2 * plain["precompute"].peak
    states = 5 * 16 * 64 * 4
    assert plain["precompute"].activations == inference_bytes(digits, 16) + states
