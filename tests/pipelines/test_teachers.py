"""Every teacher against diffusers' own scheduler and against longhand, and every way a folder can be wrong."""

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hd_core.networks.dit import DiT, DiTConfig
from hd_core.networks.features import FeatureTaps
from hd_core.networks.student import FlowMapStudent
from hd_core.paths import velocity_to
from hd_core.solvers import euler, last
from hd_core.types import Condition
from pipelines import teachers
from pipelines.discrete_time import DiscretePath
from pipelines.prompts_table import PromptTable
from pipelines.teachers import Teacher, TeacherConfig, load_teacher, save_native
from pipelines.torchvision_ops import declare_missing_operators

declare_missing_operators()
from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    UNet2DModel,
)

from tests.pipelines.diffusers_folders import PIPELINES, dit_model, seeded, unet_model  # noqa: E402

torch.set_num_threads(1)

ROWS = 3
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A tiny diffusers model with a schedule beside it."""

    model: Callable[[], Any]
    prediction: str = "epsilon"
    betas: str = "linear"
    guidance: float = 1.0


def dit(out_channels: int = 2) -> DiTTransformer2DModel:
    return dit_model(classes=5, out_channels=out_channels)


def unet(classes: int | None = None) -> UNet2DModel:
    return unet_model(channels=2, classes=classes)


CASES = {
    "dit": Case(model=dit),
    "dit_guided": Case(model=dit, guidance=2.5),
    "dit_learned_sigma": Case(model=lambda: dit(4), guidance=1.5, betas="scaled_linear"),
    "dit_v_prediction": Case(model=dit, guidance=2.0, prediction="v_prediction"),
    "unet": Case(model=unet),
    "unet_cosine": Case(model=unet, betas="squaredcos_cap_v2"),
    "unet_v_prediction": Case(model=unet, prediction="v_prediction"),
    "unet_classes": Case(model=lambda: unet(5)),
}
BACKBONES = ("dit_learned_sigma", "unet", "unet_classes", "native", "stable_diffusion", "sana")


def ddim(case: Case, **changes: Any) -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule=case.betas, prediction_type=case.prediction, clip_sample=False, **{"steps_offset": 1, **changes}
    )


def saved(case: Case, folder: Path, **scheduler: Any) -> tuple[Any, DDIMScheduler]:
    """Write a pipeline's folder as diffusers does."""
    model, schedule = seeded(case.model), ddim(case, **scheduler)
    part = "transformer" if isinstance(model, DiTTransformer2DModel) else "unet"
    model.save_pretrained(folder / part)
    schedule.save_pretrained(folder / "scheduler")
    index = {"_class_name": "Any", part: ["diffusers", type(model).__name__]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return model, schedule


def native(**changes: int) -> DiT:
    return seeded(lambda: DiT(DiTConfig(**{"width": 16, "depth": 3, "heads": 2, "num_classes": 5, **changes})))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Teacher]:
    """One teacher of each backbone."""
    root = tmp_path_factory.mktemp("teachers")
    save_native(root / "native", native())
    for name in BACKBONES[:3]:
        saved(CASES[name], root / name)
    for name in BACKBONES[4:]:
        PIPELINES[name](root / name)
    found = {name: load_teacher(TeacherConfig(path=str(root / name))) for name in BACKBONES}
    return {name: reading(teacher) if teacher.text_width else teacher for name, teacher in found.items()}


def reading(teacher: Teacher) -> Teacher:
    """A teacher of text with some prompts, of five, two and seven tokens, and one of none."""
    sizes = (5, 2, 7, 1)
    rows = [noise([size, teacher.text_width], seed=size, rows=1)[0].numpy() for size in sizes]
    return teacher.reading(PromptTable(embeddings=rows, texts=("a", "b", "c", ""), num_training=3, length=9))


def some_condition(teacher: Teacher) -> Condition:
    return teacher.condition(some_labels())


def noise(shape: Sequence[int], seed: int = 3, rows: int = ROWS) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def some_labels(rows: int = ROWS) -> Tensor:
    return torch.arange(rows) % 5


def predicted(model: Any, x: Tensor, timestep: int, guidance: float) -> Tensor:
    """What diffusers' own pipelines do: one prediction, or two that are combined, without the variance half."""
    times = torch.full((len(x),), timestep)
    if isinstance(model, UNet2DModel):
        classes = some_labels(len(x)) if model.config.num_class_embeds else None
        return model(x, times, class_labels=classes).sample
    outputs = [model(x, times, class_labels=c).sample[:, :2] for c in (some_labels(len(x)), torch.full((len(x),), 5))]
    return outputs[1] + guidance * (outputs[0] - outputs[1])


def assert_near(actual: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("to_one", [True, False])
@torch.no_grad()
def test_euler_is_diffusers_ddim(name: str, steps: int, to_one: bool, tmp_path: Path) -> None:
    """The same noise through their DDIM and our Euler on the same timesteps gives the same sample.

    Their last step goes to alpha = 1, which is our t = 0, or (set_alpha_to_one=False) to timestep 0, where their
    sample is ours scaled by alpha + sigma.
    """
    case = CASES[name]
    model, scheduler = saved(case, tmp_path, set_alpha_to_one=to_one)
    teacher = load_teacher(TeacherConfig(path=str(tmp_path)))
    scheduler.set_timesteps(steps)
    start = theirs = noise(teacher.shape)
    for timestep in scheduler.timesteps.tolist():
        theirs = scheduler.step(predicted(model, theirs, timestep, case.guidance), timestep, theirs).prev_sample

    alphas = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]]).double()
    scales = alphas.sqrt() + (1 - alphas).sqrt()
    velocity, condition = teacher.velocity(case.guidance), Condition(labels=some_labels())
    ours = last(euler(velocity, start / scales[0].float(), (1 - alphas).sqrt() / scales, condition))
    assert_near(ours * scales[-1].float(), theirs)


@pytest.mark.parametrize("name", [name for name in CASES if name != "dit_guided"])
@torch.no_grad()
def test_velocity_is_the_longhand_conversion(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, scheduler = saved(case, tmp_path)
    teacher = load_teacher(TeacherConfig(path=str(tmp_path)))
    for timestep in (0, 1, 250, 731, 999):
        squared = scheduler.alphas_cumprod[timestep].double().item()
        alpha, sigma = squared**0.5, (1 - squared) ** 0.5
        x_t = noise(teacher.shape, seed=timestep)
        x = (alpha + sigma) * x_t
        output = predicted(model, x, timestep, 1.0)
        if case.prediction == "epsilon":
            eps, x_0 = output, (x - sigma * output) / alpha
        else:
            eps, x_0 = alpha * output + sigma * x, alpha * x - sigma * output
        t = torch.full((ROWS,), sigma / (alpha + sigma))
        actual = teacher.velocity()(x_t, t, Condition(labels=some_labels()))
        assert_near(actual, eps - x_0, 2e-5)
        assert_near(actual, velocity_to(x_t, x_0, t), 1e-3 if timestep < 2 else 2e-5)


def test_table_is_inverted_continuously() -> None:
    """Entries come back exactly from float32; between them the timestep is linear in log-SNR and monotone."""
    table = DDPMScheduler().alphas_cumprod
    path = DiscretePath(table, "epsilon")
    at_entries = path.point(path.times.float())
    assert torch.equal(at_entries.timestep, torch.arange(1000, dtype=torch.float64))
    assert torch.equal(at_entries.t, path.times)
    assert torch.allclose(at_entries.alpha**2, table.double(), rtol=1e-12, atol=0)
    assert torch.allclose(at_entries.alpha**2 + at_entries.sigma**2, torch.ones(1000, dtype=torch.float64))

    snr = torch.log(path.times[500:502] / (1 - path.times[500:502]))
    between = torch.sigmoid(0.75 * snr[0] + 0.25 * snr[1])
    assert path.point(between[None]).timestep.item() == pytest.approx(500.25, abs=1e-9)
    fine = path.point(torch.linspace(0.0, 1.0, 5001))
    assert bool((fine.timestep.diff() >= 0).all())
    assert fine.timestep[0] == 0 and fine.timestep[-1] == 999


def test_derivative_in_time_survives_the_table() -> None:
    """At an entry, where the value is snapped, and between entries: d timestep / dt is positive and agrees."""
    path = DiscretePath(DDPMScheduler().alphas_cumprod, "epsilon")
    t = torch.stack([path.times[400], path.times[400] + 1e-6]).requires_grad_()
    (slope,) = torch.autograd.grad(path.point(t).timestep.sum(), t)
    assert slope[0] > 0 and slope[0] == pytest.approx(slope[1].item(), rel=0.02)
    _, tangent = torch.func.jvp(lambda s: path.point(s).timestep, (t.detach(),), (torch.ones(2, dtype=t.dtype),))
    assert torch.allclose(tangent, slope)


@pytest.mark.parametrize("name", ["unet", "dit_v_prediction"])
@torch.no_grad()
def test_one_step_from_pure_noise_is_diffusers_euler(name: str, tmp_path: Path) -> None:
    """Their sampler starts from sigma_max times the noise, of which the network sees sigma; so does ours at t = 1."""
    case = CASES[name]
    model, ddim_scheduler = saved(case, tmp_path)
    teacher = load_teacher(TeacherConfig(path=str(tmp_path)))
    scheduler = EulerDiscreteScheduler.from_config(ddim_scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    start = noise(teacher.shape)
    sample = start * scheduler.init_noise_sigma
    (timestep,) = scheduler.timesteps
    output = predicted(model, scheduler.scale_model_input(sample, timestep), int(timestep), 1.0)
    theirs = scheduler.step(output, timestep, sample).prev_sample
    assert_near(start - teacher.velocity()(start, torch.ones(ROWS), Condition(labels=some_labels())), theirs)


@torch.no_grad()
def test_outside_of_the_table(loaded: dict[str, Teacher]) -> None:
    """Beyond the last timestep its data prediction is held, of the noise at the last timestep's level."""
    teacher = loaded["unet"]
    x, condition = noise(teacher.shape), Condition(labels=some_labels())
    path: Any = teacher.backbone.path
    t_end = path.times[-1].item()
    held = t_end * x - t_end * teacher.velocity()(t_end * x, torch.full((ROWS,), t_end), condition)
    for t in (t_end + 0.5 * (1 - t_end), 1.0):
        x_0 = t * x - t * teacher.velocity()(t * x, torch.full((ROWS,), t), condition)
        assert_near(x_0, held, 1e-4)
    assert teacher.velocity()(x, torch.zeros(ROWS), condition).isfinite().all()


@pytest.mark.parametrize("name", BACKBONES)
class TestEveryBackbone:
    """What students, discriminators and fake scores rely on."""

    def test_is_frozen(self, name: str, loaded: dict[str, Teacher]) -> None:
        backbone = loaded[name].backbone
        assert not backbone.training and not any(p.requires_grad for p in backbone.parameters())
        assert len(loaded[name].fingerprint) == 64

    @torch.no_grad()
    def test_extra_of_zero_changes_nothing(self, name: str, loaded: dict[str, Teacher]) -> None:
        teacher = loaded[name]
        arguments = noise(teacher.shape), torch.tensor([0.1, 0.5, 1.0]), some_condition(teacher)
        width: Any = teacher.backbone.embedding_width
        plain = teacher.backbone(*arguments)
        assert plain.shape == (ROWS, *teacher.shape)
        assert torch.equal(plain, teacher.backbone(*arguments, None))
        assert torch.equal(plain, teacher.backbone(*arguments, torch.zeros(ROWS, width)))
        shifted = teacher.backbone(*arguments, torch.ones(ROWS, width))
        assert bool(((plain - shifted).flatten(1).abs().amax(1) > 1e-4).all())
        assert torch.equal(plain, teacher.backbone(*arguments))

    @torch.no_grad()
    def test_fresh_student_is_its_teacher(self, name: str, loaded: dict[str, Teacher]) -> None:
        teacher = loaded[name]
        student = FlowMapStudent(copy.deepcopy(teacher.backbone))
        x, t, condition = noise(teacher.shape), torch.tensor([0.2, 0.7, 1.0]), some_condition(teacher)
        assert torch.equal(student(x, t, 0.5 * t, condition), teacher.velocity()(x, t, condition))

    def test_copy_is_independent(self, name: str, loaded: dict[str, Teacher]) -> None:
        """A copy has its own weights and hooks: changing and training it leaves the teacher alone."""
        teacher = loaded[name]
        x, t, condition = noise(teacher.shape), torch.tensor([0.2, 0.7, 1.0]), some_condition(teacher)
        before = teacher.backbone(x, t, condition)
        student = FlowMapStudent(copy.deepcopy(teacher.backbone)).requires_grad_(True).train()
        state = torch.random.get_rng_state()
        student(x, t, 0 * t, condition).square().mean().backward()
        assert torch.equal(state, torch.random.get_rng_state())  # no label is dropped behind our back
        assert all(p.grad is not None for p in student.interval.mlp[-1].parameters())
        assert any(float(p.grad.abs().sum()) > 0 for p in student.interval.mlp[-1].parameters() if p.grad is not None)
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.1)
        assert not torch.equal(student(x, t, 0 * t, condition), before)
        assert torch.equal(teacher.backbone(x, t, condition), before)

    @torch.no_grad()
    def test_extra_is_added_to_every_time_embedding(self, name: str, loaded: dict[str, Teacher]) -> None:
        """The same for all rows, it is what a changed bias of the embeddings' last layers would be: none is missed."""
        teacher = loaded[name]
        arguments = noise(teacher.shape), torch.tensor([0.2, 0.7, 1.0]), some_condition(teacher)
        width: Any = teacher.backbone.embedding_width
        extra = noise([width], seed=9, rows=1)
        changed = copy.deepcopy(teacher.backbone)
        suffixes = ("time.mlp.2", "timestep_embedder.linear_2", "time_embedding.linear_2")
        embedders: list[Any] = [module for key, module in changed.named_modules() if key.endswith(suffixes)]
        assert len(embedders) == (3 if name == "dit_learned_sigma" else 1)
        for layer in embedders:
            layer.bias += extra[0]
        assert_near(teacher.backbone(*arguments, extra.expand(ROWS, width)), changed(*arguments), 1e-5)

    @torch.no_grad()
    def test_taps_give_tokens(self, name: str, loaded: dict[str, Teacher]) -> None:
        teacher = loaded[name]
        assert len(teacher.blocks) == len(teacher.feature_widths)
        layers = list(range(len(teacher.blocks)))
        arguments = noise(teacher.shape), torch.tensor([0.1, 0.5, 0.9]), some_condition(teacher)
        before = teacher.backbone(*arguments)
        features = FeatureTaps(teacher.backbone, teacher.blocks, layers)(*arguments)
        assert [f.shape[2] for f in features] == teacher.feature_widths
        assert all(f.ndim == 3 and f.shape[0] == ROWS and f.shape[1] in (16, 64) for f in features)
        (reversed_first, *_) = FeatureTaps(teacher.backbone, teacher.blocks, layers[::-1])(*arguments)
        assert torch.equal(reversed_first, features[-1])
        assert torch.equal(before, teacher.backbone(*arguments))

    def test_guidance(self, name: str, loaded: dict[str, Teacher]) -> None:
        teacher = loaded[name]
        x, t, condition = noise(teacher.shape), torch.tensor([0.2, 0.7, 1.0]), some_condition(teacher)
        if teacher.null_condition is None:
            with pytest.raises(ValueError, match="needs a null condition"):
                teacher.velocity(2.0)
            return
        null = teacher.null_condition.map(lambda row: row.expand(ROWS, *row.shape[1:]))
        plain, empty = teacher.velocity()(x, t, condition), teacher.velocity()(x, t, null)
        assert_near(teacher.velocity(2.0)(x, t, condition), 2 * plain - empty, 1e-5)
        assert torch.equal(teacher.velocity(1.0)(x, t, condition), plain)


@torch.no_grad()
def test_tokens_are_the_images_of_the_block(loaded: dict[str, Teacher]) -> None:
    """Row-major cells, channels as features."""
    teacher = loaded["unet"]
    images: list[Tensor] = []
    block: Any = teacher.backbone.model.up_blocks[0]
    handle = block.register_forward_hook(lambda _m, _i, output: images.append(output))
    (tokens,) = FeatureTaps(teacher.backbone, teacher.blocks, [3])(
        noise(teacher.shape), torch.full((ROWS,), 0.5), Condition(labels=some_labels())
    )
    if not images:  # the tap stops the network before later hooks run
        teacher.backbone(noise(teacher.shape), torch.full((ROWS,), 0.5), Condition(labels=some_labels()))
    handle.remove()
    height = images[0].shape[2]
    assert torch.equal(tokens[1, 2 * height + 1], images[0][1, :, 2, 1])


@pytest.mark.parametrize("name", BACKBONES)
def test_gradient_checkpointing_changes_no_gradient(name: str, loaded: dict[str, Teacher]) -> None:
    """What is computed again sees the interval again, though the call that knew it has ended."""
    teacher = loaded[name]
    student = FlowMapStudent(copy.deepcopy(teacher.backbone)).requires_grad_(True).train()
    nn.init.normal_(student.interval.mlp[-1].weight)  # pyright: ignore[reportArgumentType]
    t = torch.tensor([0.2, 0.7, 1.0])
    arguments = noise(teacher.shape), t, 0.5 * t, some_condition(teacher)
    (plain, grads), saved_bytes = gradients(student, *arguments), bytes_kept(student, *arguments)
    student.backbone.checkpoint_blocks()  # pyright: ignore[reportCallIssue]
    assert bytes_kept(student, *arguments) < 0.7 * saved_bytes
    again, regained = gradients(student, *arguments)
    assert torch.equal(plain, again)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(grads, regained, strict=True))
    assert sum(float(grad.abs().sum()) for grad in grads) > 0


def gradients(student: FlowMapStudent, *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    student.zero_grad(set_to_none=True)
    output = student(*arguments)
    output.square().mean().backward()
    return output.detach(), [p.grad.clone() for p in student.parameters() if p.grad is not None]


def bytes_kept(student: FlowMapStudent, *arguments: Any) -> int:
    """What the forward pass keeps for the backward one, parameters excepted."""
    parameters = {p.data_ptr() for p in student.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in parameters:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        student(*arguments)
    return sum(kept.values())


def test_native_round_trip_is_bit_exact(tmp_path: Path) -> None:
    model = native()
    save_native(tmp_path / "teacher", model, readme="A teacher.\n")
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == [
        "teacher/README.md",
        "teacher/model_index.json",
        "teacher/scheduler/scheduler_config.json",
        "teacher/transformer/config.json",
        f"teacher/transformer/{WEIGHTS}",
    ]
    teacher = load_teacher(TeacherConfig(path=str(tmp_path / "teacher")))
    own, read = model.state_dict(), teacher.backbone.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[key], read[key]) for key in own)
    assert isinstance(teacher.backbone, DiT) and teacher.backbone.config == model.config
    assert (teacher.shape, teacher.num_classes, teacher.feature_widths) == ((1, 8, 8), 5, [16] * 3)
    x, t = noise(teacher.shape), torch.tensor([0.0, 0.3, 1.0])
    condition = Condition(labels=some_labels())
    assert torch.equal(teacher.velocity()(x, t, condition), model(x, t, condition))


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    save_native(tmp_path / "a", native())
    save_native(tmp_path / "b", native(), readme="another text")
    save_native(tmp_path / "c", native(heads=4))
    marks = [load_teacher(TeacherConfig(path=str(tmp_path / name))).fingerprint for name in ("a", "b", "c")]
    assert marks[0] == marks[1] != marks[2]
    assert load_teacher(TeacherConfig(path=str(tmp_path / "a" / "transformer"))).fingerprint == marks[0]
    file = tmp_path / "b" / "transformer" / WEIGHTS
    state = load_file(file)
    state["position"][0, 0, 0] += 1e-6
    save_file(state, file)
    assert load_teacher(TeacherConfig(path=str(tmp_path / "b"))).fingerprint != marks[0]


def test_schedule_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    saved(CASES["unet"], tmp_path / "a")
    saved(CASES["unet_v_prediction"], tmp_path / "b")
    marks = [load_teacher(TeacherConfig(path=str(tmp_path / name))).fingerprint for name in ("a", "b")]
    assert marks[0] != marks[1]


def test_save_native_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_native(tmp_path / "teacher", native())
    with pytest.raises(ValueError, match="exists already"):
        save_native(tmp_path / "teacher", native())

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(teachers, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_native(tmp_path / "other", native())
    assert [entry.name for entry in tmp_path.iterdir()] == ["teacher"]


def test_native_without_classes(tmp_path: Path) -> None:
    save_native(tmp_path / "teacher", native(num_classes=0))
    teacher = load_teacher(TeacherConfig(path=str(tmp_path / "teacher")))
    assert teacher.num_classes == 0 and teacher.null_condition is None


def test_embedded_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teachers, "EMBEDDED", tmp_path / "embedded")
    monkeypatch.chdir(tmp_path)
    save_native(tmp_path / "embedded" / "digits", native())
    save_native(tmp_path / "digits", native(depth=1))
    assert len(load_teacher(TeacherConfig()).blocks) == 3
    assert len(load_teacher(TeacherConfig(path="./digits")).blocks) == 1
    with pytest.raises(
        ValueError, match=r"(?s)no teacher 'digit'.*embedded \(digits\).*did you mean digits\?.*must hold"
    ):
        load_teacher(TeacherConfig(path="digit"))
    with pytest.raises(ValueError, match="no folder facebook/DiT-XL-2-256, it is not in the hub's cache") as error:
        load_teacher(TeacherConfig(path="facebook/DiT-XL-2-256"))
    assert str(error.value).count("\n") < 2


@pytest.mark.parametrize("layout", ["model alone", "all in one folder"])
def test_other_layouts(layout: str, tmp_path: Path) -> None:
    """The model's own folder finds the scheduler beside it; the oldest U-Nets have everything in one folder."""
    model, scheduler = saved(CASES["unet"], tmp_path / "pipeline")
    folder = tmp_path / "pipeline" / "unet"
    if layout == "all in one folder":
        folder = tmp_path / "flat"
        model.save_pretrained(folder)
        scheduler.save_pretrained(folder)
        (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DModel"]}))
    assert load_teacher(TeacherConfig(path=str(folder))).shape == (2, 8, 8)


def test_first_published_dit_config(tmp_path: Path) -> None:
    """Its class was called Transformer2DModel, and its config has fields that the class no longer knows."""
    saved(CASES["dit"], tmp_path)
    expected = load_teacher(TeacherConfig(path=str(tmp_path)))
    edit_json(tmp_path / "transformer/config.json", _class_name="Transformer2DModel", cross_attention_dim=None)
    actual = load_teacher(TeacherConfig(path=str(tmp_path)))
    x, t, condition = noise(actual.shape), torch.tensor([0.2, 0.7, 1.0]), Condition(labels=some_labels())
    assert torch.equal(actual.velocity()(x, t, condition), expected.velocity()(x, t, condition))


def test_sharded_weights(tmp_path: Path) -> None:
    model, _ = saved(CASES["dit"], tmp_path)
    whole = load_teacher(TeacherConfig(path=str(tmp_path)))
    (tmp_path / "transformer" / WEIGHTS).unlink()
    model.save_pretrained(tmp_path / "transformer", max_shard_size="10KB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1
    shards = load_teacher(TeacherConfig(path=str(tmp_path)))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.backbone.parameters(), shards.backbone.parameters(), strict=True)
    )
    next((tmp_path / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match="missing from the folder"):
        load_teacher(TeacherConfig(path=str(tmp_path)))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


def only_pickle(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"never opened")


NATIVE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "must hold model_index.json, or .*config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not readable JSON"),
    "listed config": (lambda f: (f / "config.json").write_text("[]"), "must hold a JSON object"),
    "unknown field": (lambda f: edit_json(f / "config.json", colour=3), "no DiT config at colour: .* channels, depth"),
    "wrong type": (lambda f: edit_json(f / "config.json", width="16"), "no DiT config at width"),
    "unknown class": (lambda f: edit_json(f / "config.json", _class_name="Flux"), "Flux, .*there is one for DiT, "),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "broken weights": (lambda f: (f / WEIGHTS).write_bytes(b"12345678901234"), "cannot be read"),
    "pickle": (
        lambda f: only_pickle(f, "diffusion_pytorch_model.bin"),
        "has only diffusion_pytorch_model.bin: pickled",
    ),
    "checkpoint": (lambda f: only_pickle(f, "model.pt"), "(?s)only model.pt: pickled .* never loaded.*save_pretrained"),
    "missing": (lambda f: edit_weights(f / WEIGHTS, lambda s: s.pop("position")), r"1 missing \(position\)"),
    "unknown": (
        lambda f: edit_weights(f / WEIGHTS, lambda s: s.update(more=torch.zeros(1))),
        r"do not fit its config.json: 1 unknown \(more\)",
    ),
    "misshapen": (
        lambda f: edit_weights(f / WEIGHTS, lambda s: s.update(position=torch.zeros(1))),
        r"1 misshapen \(position\)",
    ),
}


@pytest.mark.parametrize("fault", NATIVE_FAULTS)
def test_faulty_native_folder(fault: str, tmp_path: Path) -> None:
    save_native(tmp_path / "teacher", native())
    breaking, message = NATIVE_FAULTS[fault]
    breaking(tmp_path / "teacher" / "transformer")
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(TeacherConfig(path=str(tmp_path / "teacher")))
    assert str(error.value).count("\n") < 2


DIFFUSERS_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no schedule": (lambda f: (f / "scheduler/scheduler_config.json").unlink(), "has no schedule"),
    "flow schedule": (
        lambda f: (f / "scheduler/scheduler_config.json").write_text('{"num_train_timesteps": 1000}'),
        "must be a DDPM schedule",
    ),
    "zero snr": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
        "without rescale_betas_zero_snr",
    ),
    "odd betas": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", beta_schedule="odd"),
        "is no DDPM schedule",
    ),
    "sample": (
        lambda f: edit_json(f / "scheduler/scheduler_config.json", prediction_type="sample"),
        "prediction_type sample; there is epsilon and v_prediction",
    ),
    "no size": (lambda f: edit_json(f / "unet/config.json", sample_size=None), "sample_size None"),
    "fourier": (lambda f: edit_json(f / "unet/config.json", time_embedding_type="fourier"), "fourier|cannot be loaded"),
    "pickle": (lambda f: only_pickle(f / "unet", "diffusion_pytorch_model.bin"), "pickled weights are never loaded"),
    "missing": (lambda f: edit_weights(f / "unet" / WEIGHTS, lambda s: s.pop("conv_in.bias")), "1 missing"),
    "unknown": (lambda f: edit_weights(f / "unet" / WEIGHTS, lambda s: s.update(x=torch.zeros(1))), "1 unknown"),
    "misshapen": (
        lambda f: edit_weights(f / "unet" / WEIGHTS, lambda s: s.update({"conv_in.bias": torch.zeros(9)})),
        "cannot be loaded|misshapen",
    ),
    "broken weights": (lambda f: (f / "unet" / WEIGHTS).write_bytes(b"12345678901234"), "cannot be loaded"),
}


@pytest.mark.parametrize("fault", DIFFUSERS_FAULTS)
def test_faulty_diffusers_folder(fault: str, tmp_path: Path) -> None:
    saved(CASES["unet"], tmp_path)
    breaking, message = DIFFUSERS_FAULTS[fault]
    breaking(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        load_teacher(TeacherConfig(path=str(tmp_path)))
    assert str(error.value).count("\n") < 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "a teacher needs a path"),
        ({"guidance_scale": -1.0}, "at least 0; given -1"),
        ({"guidance_scale": float("nan")}, "at least 0; given nan"),
    ],
)
def test_config_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherConfig(**fields)


def test_declared_operators_let_everything_import() -> None:
    """In a fresh process, since this one has them already: torchvision, clean-fid and diffusers import after it.

    A torch built for CUDA (here one that says so) keeps what it has.
    """
    program = """
        import torch
        from pipelines.torchvision_ops import declare_missing_operators
        built_for, torch.version.cuda = torch.version.cuda, "13.0"
        declare_missing_operators()
        assert not hasattr(torch.ops.torchvision, "nms")
        torch.version.cuda = built_for
        declare_missing_operators()
        declare_missing_operators()
        import torchvision
        from cleanfid import fid
        from diffusers import DiTTransformer2DModel, UNet2DModel
        declare_missing_operators()
        print(hasattr(torch.ops.torchvision, "nms"))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False, timeout=240
    )
    assert result.stdout.strip() == "True", result.stderr
