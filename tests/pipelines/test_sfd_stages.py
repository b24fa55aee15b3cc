"""Stages of SFD: any number of steps, taught by what they start from, a perceptual term, guidance when sampled."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hd_core.guidance import guided_map
from hd_core.random import fold_in, sample_noise
from hd_core.types import Condition
from hd_core.walk import afs_velocity, walk, walk_states
from pipelines import recipe as recipes
from pipelines.cast import build
from pipelines.evaluate import load_student, make_sampler
from pipelines.features import DIGITS_WEIGHTS, DigitsFeatureNet
from pipelines.perceptual import load_perceptual
from pipelines.precompute import noise_seed, trajectory_labels
from pipelines.run import Run
from pipelines.sample import draw
from pipelines.trainer import Watch
from tests.pipelines import tiny
from tests.pipelines.tiny import trained, trainer_of

RECIPE = """\
seed: 5
data: {held_out: 1697}
precompute: {num_samples: 48, shard_rows: 24, intervals: 6, batch_size: 16, null_share: 0.25}
stages:
  plain:
    objective: {name: sfd, intervals: 3, states: teacher}
    num_steps: 2
    batch_size: 8
  any:
    label: sfd_v
    objective: {name: sfd, intervals: 3, step_counts: [2, 3, 6], afs: true}
    num_steps: 6
    batch_size: 8
    optimizers: {student: {learning_rate: 1e-2}}
  one:
    start: any
    objective:
      {name: sfd, intervals: 2, afs: true, taught_by: start, start_intervals: 6, start_afs: true, perceptual_weight: 2}
    perceptual: digits
    num_steps: 5
    checkpoint_every: 2
    batch_size: 8
    optimizers: {student: {learning_rate: 1e-2}}
  refine:
    start: one
    label: hd
    objective: {name: dmd, intervals: 2, afs: true, update_ratio: 2, adversarial: {weight: 0.0}}
    num_steps: 3
    batch_size: 8
evaluate:
  num_samples: 40
  batch_size: 40
  pictures: 4
  solvers: {euler: [1]}
  step_counts: [3, 4]
  guidance_scales: [1.0, 2.0]
"""
CHAIN = ("any", "one", "refine")


def recipe_with(folder: Path, *settings: str) -> recipes.Recipe:
    (folder / "small.yaml").write_text(RECIPE)
    return recipes.load(str(folder / "small.yaml"), settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """With every stage trained."""
    run = tiny.prepared_run(tmp_path_factory.mktemp("sfd"), RECIPE)
    for name in run.recipe.stages:
        trained(run.job(name))
    yield run


# Any number of steps


def test_the_embedding_of_steps_is_in_a_chain_from_the_stage_that_learns_it_on(run: Run):
    for name, knows in {"plain": False, "any": True, "one": True, "refine": True}.items():
        keys = load_file(run.job(name).weights)
        assert any(key.startswith("steps.") for key in keys) == knows == run.recipe.knows_steps(name)
    assert not run.job("any").start_knows_steps
    assert run.job("one").start_knows_steps and run.job("refine").start_knows_steps


def test_it_starts_at_zero_or_as_its_authors_have_it(run: Run):
    job = run.job("any")
    for start in ("zero", "random"):
        state, _ = build(replace(job, stage=replace(job.stage, step_embedding=start)), run.teacher)
        last = state.players["student"].network.get_parameter("steps.mlp.2.weight")
        assert bool((last == 0).all()) == (start == "zero")


def test_it_has_learned_to_tell_the_counts_apart(run: Run):
    student = load_student(run.student("any"), run.teacher)
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 0.5)
    condition = Condition(labels=torch.tensor([1, 2, 3]))
    told = [student(x, t, t / 2, condition.on_walk(x, steps)) for steps in (2, 6)]
    assert (told[0] - told[1]).abs().max() > 1e-4


def test_a_row_for_every_count_and_guidance(run: Run):
    """Trained for 2, 3 and 6 steps and also asked for at 4; the first step of each is analytical."""
    found = {(g.stage, len(g.grid) - 1, g.guidance_scale): g.calls_per_image for g in run.generators() if g.stage}
    expected = {("plain", 3, 1.0): 3, ("plain", 3, 2.0): 6}
    for steps in (2, 3, 4, 6):
        expected |= {("any", steps, 1.0): steps - 1, ("any", steps, 2.0): 2 * (steps - 1)}
    for name in ("one", "refine"):
        expected |= {(name, 2, 1.0): 1, (name, 2, 2.0): 2}
    assert found == expected
    keys = [generator.key for generator in run.generators()]
    assert len(set(keys)) == len(keys)


def test_rows_are_measured_and_found_again(run: Run):
    rows = run.evaluate()
    assert [row.nfe for row in rows if row.stage == "any"] == [1, 2, 3, 5, 2, 4, 6, 10]
    by_label = {row.label: row for row in rows}
    assert {"SFD-v, 2 calls", "SFD-v, guided 2, 2 calls", "HD, 1 call"} <= by_label.keys()
    assert by_label["SFD-v, 2 calls"].fid != by_label["SFD-v, guided 2, 2 calls"].fid
    evaluator = run.evaluator()
    assert [evaluator.finished(generator) for generator in run.generators()] == rows


def test_a_student_of_one_number_of_steps_is_not_asked_for_another(run: Run, tmp_path: Path):
    with pytest.raises(ValueError, match="stage plain is sampled in its own number of steps only"):
        draw(run, "plain", num=1, label=None, seed=0, out=tmp_path / "out", steps=2)
    with pytest.raises(ValueError, match="stage any takes at least 2 steps; given 1"):
        draw(run, "any", num=1, label=None, seed=0, out=tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()


def test_the_sampler_longhand_with_guidance(run: Run, tmp_path: Path):
    generator = run.student("any", 4, 3.0)
    student = load_student(run.student("any"), run.teacher)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    found = make_sampler(generator, run.teacher)(x, Condition(labels=labels))
    told, null = (Condition(labels=value).on_walk(x, 4) for value in (labels, torch.tensor([10, 10])))
    expected, ones = x - 0.25 * afs_velocity(x, torch.ones(2)), torch.ones(2)
    with torch.no_grad():
        for t in (0.75, 0.5, 0.25):
            u, u_null = (student(expected, t * ones, (t - 0.25) * ones, c) for c in (told, null))
            expected = expected - 0.25 * (u_null + 3 * (u - u_null))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    draw(run, "any", num=2, label=1, seed=0, out=tmp_path / "out", steps=4, guidance_scale=3.0)
    assert (tmp_path / "out" / "00001.png").is_file()


# Taught by what it starts from


def test_the_second_stage_is_taught_by_the_weights_it_starts_from(run: Run):
    job = run.job("one")
    assert job.trajectories is None
    state, cast = build(job, run.teacher)
    start, origin = load_file(job.start_weights), cast.origin
    assert isinstance(origin, nn.Module) and not any(p.requires_grad for p in origin.parameters())
    assert all(torch.equal(value, start[key]) for key, value in origin.state_dict().items())
    assert all(torch.equal(value, start[key]) for key, value in state.players["student"].network.state_dict().items())


@pytest.mark.parametrize("step", [1, 3])
def test_a_stopped_second_stage_goes_on_to_the_same_bits(run: Run, tmp_path: Path, step: int):
    """Its teacher is what it started from, and not what a checkpoint holds."""
    job = replace(run.job("one"), folder=str(tmp_path))

    def stop(at: int) -> None:
        if at == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer_of(job, Watch(progress=stop)).run()
    trained(job)
    assert job.weights.read_bytes() == run.job("one").weights.read_bytes()


def test_its_loss_falls_towards_its_origin(run: Run, tmp_path: Path):
    """One call comes nearer to where the origin's five calls end."""
    job = run.job("one")
    stage = replace(job.stage, num_steps=60, ema_decay=0.0, log_every=1)
    trainer = trained(replace(job, stage=stage, folder=str(tmp_path)))
    x, labels = sample_noise(77, range(40), run.teacher.shape), torch.arange(40) % 10
    before, after = (
        _distance(student, trainer.cast.origin, x, Condition(labels=labels))
        for student in (trainer.cast.origin, trainer.state.average)
    )
    assert after < 0.8 * before


@torch.no_grad()
def _distance(student: object, origin: object, x: torch.Tensor, condition: Condition) -> float:
    grids = [torch.linspace(1, 0, steps + 1, dtype=torch.float64) for steps in (2, 6)]
    *_, far = walk_states(origin, grids[1], x, condition, afs=True)  # pyright: ignore[reportArgumentType]
    near = walk(student, grids[0], x, condition, afs=True)  # pyright: ignore[reportArgumentType]
    return (near - far).abs().mean().item()


# Perceptual


def test_the_nets_distance_sees_what_its_layers_see():
    distance, net = load_perceptual("digits").distance, DigitsFeatureNet()
    net.load_state_dict(load_file(DIGITS_WEIGHTS))
    a, b = torch.randn(2, 3, 1, 8, 8).clamp(-1, 1)
    expected = torch.zeros(3)
    for x, sign in ((a, 1), (b, -1)):
        assert torch.equal(distance(x, x), torch.zeros(3)), sign
    layers: list[list[torch.Tensor]] = []
    for x in (a, b):
        seen, h = [], x
        for layer in net.convolutions:
            h = layer(h)
            if isinstance(layer, nn.SiLU):
                seen.append(h / h.norm(dim=1, keepdim=True))
        layers.append(seen)
    for one, other in zip(*layers, strict=True):
        expected += (one - other).square().sum(1).mean((1, 2))
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-4, atol=1e-5)


def test_gradient_flows_through_it_to_the_images_only():
    perceptual = load_perceptual("digits")
    x = torch.zeros(2, 1, 8, 8, requires_grad=True)
    perceptual.distance(x, torch.randn(2, 1, 8, 8)).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


def test_the_curve_shows_the_term(run: Run):
    assert '"loss/perceptual"' in run.job("one").curve.read_text()


def test_a_net_that_has_no_layers_to_look_at_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="no feature net at"):
        load_perceptual(str(tmp_path))


def test_lpips_without_its_package_or_its_weights_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "lpips", None)
        with pytest.raises(ValueError, match=re.escape("pip install hdistill[lpips]")):
            load_perceptual("lpips")

    def away(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", away)
    with pytest.raises(ValueError, match=r"VGG weights .* \(no route to host\): put\s+vgg16-397923af.pth into"):
        load_perceptual("lpips")


def test_lpips_takes_small_grey_images(monkeypatch: pytest.MonkeyPatch):
    """With VGG's weights at random: shapes, rows apart, and a gradient."""
    import lpips

    whole = lpips.LPIPS
    monkeypatch.setattr(lpips, "LPIPS", lambda **options: whole(pretrained=True, pnet_rand=True, **options))
    distance = load_perceptual("lpips").distance
    a = torch.rand(2, 1, 8, 8, requires_grad=True)
    b = a.detach().clone()
    b[1] = -b[1]
    found = distance(a, b)
    assert found.shape == (2,) and abs(found[0].item()) < 1e-6 < found[1].item()
    found.sum().backward()
    assert a.grad is not None and a.grad[1].abs().max() > 0


# Trajectories without a class, and with an analytical first step


def test_a_share_of_the_trajectories_has_no_class(run: Run):
    spec = run.trajectories.spec
    many = trajectory_labels(spec, 5, range(4000)).numpy()
    assert set(many) == set(range(11))
    assert abs((many == 10).mean() - 0.25) < 0.03
    assert np.array_equal(trajectory_labels(spec, 5, range(700, 724)).numpy(), many[700:724])
    stored = run.trajectories.read(range(run.trajectories.spec.num_shards)).labels
    assert np.array_equal(stored, many[:48])


def test_a_class_is_the_same_whatever_the_share(run: Run, tmp_path: Path):
    other = tiny.open_run(recipe_with(tmp_path, "precompute.null_share=0.0"), tmp_path / "run")
    plain, shared = (trajectory_labels(each.trajectories.spec, 5, range(200)) for each in (other, run))
    assert torch.equal(plain[shared != 10], shared[shared != 10])
    assert other.trajectories.spec.fingerprint != run.trajectories.spec.fingerprint


def test_an_analytical_first_step_of_the_teacher(run: Run, tmp_path: Path):
    recipe = recipe_with(tmp_path, "precompute.afs=true")
    shards = tiny.make_trajectories(recipe, tmp_path / "run")
    states = shards.read([0]).values.astype("float32")
    x = sample_noise(noise_seed(recipe.seed), range(24), run.teacher.shape)
    first = x - afs_velocity(x, torch.ones(24)) / 6
    np.testing.assert_allclose(states[:, 1], first.numpy(), atol=2e-3)
    assert recipe.precompute.calls_per_sample == 5
    assert np.abs(states[:, 1] - run.trajectories.read([0]).values.astype("float32")[:, 1]).max() > 0.01


def test_noise_does_not_depend_on_what_is_asked_of_it():
    assert fold_in(5, "null", 3) != fold_in(5, "label", 3)


# Mistakes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "precompute.intervals=4",
            "stages.plain.objective: its times in 3 steps are not all among the 5 of",
        ),
        ("stages.any.objective.step_counts=[3,5]", "its times in 5 steps are not all among the 7 of precompute.grid"),
        ("stages.one.objective.start_afs=false", r"must be those that any was trained with \(start_afs true"),
        ("stages.one.objective.start_intervals=4", r"start_intervals 2 or 3 or 6\)"),
        ("stages.one.perceptual=''", "perceptual names the net of objective.perceptual_weight: set both or neither"),
        ("stages.plain.perceptual=digits", "set both or neither"),
        ("evaluate.guidance_scales=[1,1]", r"guidance_scales: each once, and none below 0; given \[1.0, 1.0\]"),
        ("evaluate.guidance_scales=[]", "guidance_scales must hold at least one"),
        ("evaluate.step_counts=[0]", "step_counts none below 1"),
        ("evaluate.step_counts=[1]", "stage any takes at least 2 steps; given 1"),
        ("precompute.null_share=1.5", r"null_share must lie in \[0, 1\]; given 1.5"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path: Path, setting: str, message: str):
    with pytest.raises(ValueError, match=message):
        recipe_with(tmp_path, setting)


def test_a_teacher_without_no_class_is_refused_before_anything_is_done(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pipelines.inputs.load_teacher", lambda _: replace(run.teacher, null_condition=None))
    with pytest.raises(ValueError, match=r'evaluate\.guidance_scales needs a teacher that knows "no class"'):
        _ = tiny.open_run(run.recipe, run.dir.path).teacher


def test_guidance_needs_a_null_condition(run: Run):
    assert run.teacher.null_condition is not None
    with pytest.raises(ValueError, match=r"guidance at scale 2\.0 needs a null condition"):
        guided_map(lambda *_: torch.zeros(1), None, 2.0)
