"""What a stage may be made of: a fake score of low rank, a guidance of its own, and chains of stages of every kind."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hd_core.objectives.turns import Batch
from hd_core.step import TrainState, only
from hd_core.types import Condition
from pipelines import recipe as recipes
from pipelines.cast import build, new_student
from pipelines.checkpoints import load_weights, save_weights
from pipelines.recipe import Recipe
from pipelines.run import Run
from pipelines.stages import StageJob, TuningConfig
from pipelines.teachers import Teacher
from pipelines.trainer import StageTrainer, Watch
from tests.pipelines import tiny
from tests.pipelines.tiny import trained, trainer_of

RECIPE = """\
seed: 5
data: {held_out: 1697}
precompute: {num_samples: 16, shard_rows: 16, intervals: 4, batch_size: 16}
stages:
  low_rank:
    objective: {name: dmd, update_ratio: 2, adversarial: {weight: 0.0}}
    num_steps: 5
    batch_size: 8
    log_every: 1
    checkpoint_every: 2
    fake_score: {kind: lora, rank: 3, alpha: 6.0}
    optimizers: {fake_score: {learning_rate: 1e-2, weight_decay: 0.1}}
  sfd_2:
    objective: {name: sfd, intervals: 2}
    num_steps: 2
    batch_size: 8
  two_steps:
    start: sfd_2
    objective: {name: dmd, intervals: 2, update_ratio: 2}
    num_steps: 3
    batch_size: 8
  flow:
    objective: {name: meanflow}
    num_steps: 2
    batch_size: 8
  one_step:
    start: flow
    objective: {name: dmd, update_ratio: 2, regression_weight: 0.5}
    num_steps: 3
    batch_size: 8
evaluate: {num_samples: 40, batch_size: 40, pictures: 4, solvers: {euler: [1]}}
"""


def recipe_in(folder: Path, *settings: str) -> Recipe:
    (folder / "small.yaml").write_text(RECIPE)
    return recipes.load(str(folder / "small.yaml"), settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("options")
    recipe = recipe_in(folder)
    tiny.make_trajectories(recipe, folder / "run")
    run = tiny.open_run(recipe, folder / "run")
    run.write_images()
    return run


@pytest.fixture(scope="module")
def teacher(run: Run) -> Teacher:
    return run.teacher


def asked(rows: int = 6) -> tuple[Tensor, Tensor, Condition]:
    """Points, times and classes."""
    source = torch.Generator().manual_seed(1)
    x, t = torch.randn(rows, 1, 8, 8, generator=source), torch.rand(rows, generator=source)
    return x, t, Condition(labels=torch.arange(rows))


# A fake score of low rank


@pytest.fixture
def low_rank(run: Run) -> StageJob:
    return run.job("low_rank")


@pytest.fixture(scope="module")
def follower(run: Run, tmp_path_factory: pytest.TempPathFactory) -> StageTrainer:
    """A worker that has trained with a fake score of low rank."""
    return trained(replace(run.job("low_rank"), folder=str(tmp_path_factory.mktemp("whole"))))


def fake_score(state: TrainState) -> nn.Module:
    return state.players["fake_score"].network


def base_and_adapters(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by the teacher's own names, and those of the adapters by theirs."""
    state = network.state_dict()
    base = {key.replace("base_layer.", ""): value for key, value in state.items() if ".lora_" not in key}
    return base, {key: value for key, value in state.items() if ".lora_" in key}


class TestLowRank:
    def test_it_starts_as_the_teacher(self, low_rank: StageJob, teacher: Teacher):
        state, cast = build(low_rank, teacher)
        with torch.no_grad():
            torch.testing.assert_close(cast.fake(*asked()), teacher.backbone(*asked()), rtol=1e-6, atol=1e-6)
        base, _ = base_and_adapters(fake_score(state))
        expected = teacher.backbone.state_dict()
        assert base.keys() == expected.keys()
        assert all(torch.equal(base[key], expected[key]) for key in base)

    def test_adapters_have_the_rank_and_scale_that_were_asked_for(self, low_rank: StageJob, teacher: Teacher):
        """Every linear layer ``W`` acts as ``W + (alpha / rank) B A``."""
        network = fake_score(build(low_rank, teacher)[0])
        layers = {name: layer for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
        linears = [name for name, layer in teacher.backbone.named_modules() if isinstance(layer, nn.Linear)]
        assert sorted(layers) == sorted(linears)
        layer: Any = layers["blocks.0.qkv"]
        down, up, x = layer.lora_A["default"], layer.lora_B["default"], torch.randn(2, layer.in_features)
        assert down.weight.shape == (3, layer.in_features) and up.weight.shape == (layer.out_features, 3)
        nn.init.normal_(up.weight)
        expected = layer.base_layer(x) + 6.0 / 3 * (x @ down.weight.T @ up.weight.T)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)

    def test_only_the_adapters_move(self, follower: StageTrainer, teacher: Teacher):
        """Not even by weight decay."""
        fresh, _ = build(follower.job, teacher)
        (base, adapters), (_, before) = (base_and_adapters(fake_score(state)) for state in (follower.state, fresh))
        expected = teacher.backbone.state_dict()
        assert [key for key in base if not torch.equal(base[key], expected[key])] == []
        still = [key for key in adapters if torch.equal(adapters[key], before[key])]
        assert adapters and not still
        with torch.no_grad():
            assert (follower.cast.fake(*asked()) - teacher.backbone(*asked())).abs().max() > 1e-4

    def test_the_optimiser_knows_the_adapters_alone(self, follower: StageTrainer):
        player = follower.state.players["fake_score"]
        named = {id(p): name for name, p in player.network.named_parameters()}
        held = [named[id(p)] for group in player.optimizer.param_groups for p in group["params"]]
        assert held and all(".lora_" in name for name in held)
        assert sum(p.numel() for p in player.parameters) < 0.3 * sum(p.numel() for p in player.network.parameters())

    def test_between_turns_the_base_is_frozen_and_the_adapters_are_not(
        self, follower: StageTrainer, low_rank: StageJob
    ):
        for state in (follower.state, build(low_rank, follower.teacher)[0]):
            networks = [player.network for player in state.players.values()]
            for moving in networks:
                with only(moving, networks):
                    frozen = [p.requires_grad for n in networks if n is not moving for p in n.parameters()]
                    assert not any(frozen)
                    assert self._moving(fake_score(state)) == (moving is fake_score(state))
                assert self._moving(fake_score(state))
                assert all(p.requires_grad for p in state.players["student"].network.parameters())

    @staticmethod
    def _moving(network: nn.Module) -> bool:
        """Whether adapters are, by themselves; the base never is."""
        flags = {".lora_" in name: set[bool]() for name, _ in network.named_parameters()}
        for name, parameter in network.named_parameters():
            flags[".lora_" in name].add(parameter.requires_grad)
        assert flags[False] == {False} and len(flags[True]) == 1
        return flags[True] == {True}

    @pytest.mark.parametrize("step", [1, 3, 4])
    def test_a_stopped_stage_goes_on_to_the_same_bits(
        self, low_rank: StageJob, follower: StageTrainer, tmp_path: Path, step: int
    ):
        job = replace(low_rank, folder=str(tmp_path))

        def stop(at: int) -> None:
            if at == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer_of(job, Watch(progress=stop)).run()
        resumed = trained(job).state
        for name, player in follower.state.players.items():
            there, here = player.network.state_dict(), resumed.players[name].network.state_dict()
            assert [key for key in there if not torch.equal(there[key], here[key])] == []
            assert resumed.players[name].moves == player.moves
        assert job.weights.read_bytes() == follower.job.weights.read_bytes()

    def test_its_weights_are_saved_as_those_of_a_plain_network(self, follower: StageTrainer, tmp_path: Path):
        save_weights(tmp_path / "fake.safetensors", fake_score(follower.state))
        plain = copy.deepcopy(follower.teacher.backbone)
        load_weights(tmp_path / "fake.safetensors", plain)
        with torch.no_grad():
            assert torch.allclose(plain(*asked()), fake_score(follower.state)(*asked()), atol=1e-5)
            assert not torch.allclose(plain(*asked()), follower.teacher.backbone(*asked()), atol=1e-3)

    def test_new_adapters_come_from_the_seed_alone(self, low_rank: StageJob, teacher: Teacher):
        made: list[dict[str, Tensor]] = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            made.append(fake_score(build(low_rank, teacher)[0]).state_dict())
            assert torch.initial_seed() == seed
        assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())

    def test_the_lag_of_one_is_measured_on_a_copy(self, run: Run, follower: StageTrainer, tmp_path: Path):
        job = run.job("low_rank")
        probe = replace(job.stage.probe, every=2, num_samples=10, fake_score_moves=2)
        job = replace(job, stage=replace(job.stage, probe=probe), images=run.images, features="digits")
        run.make_judged_by()
        job = replace(job, judged_by=run.judged_by)
        trained(job := replace(job, folder=str(tmp_path)))
        assert job.weights.read_bytes() == follower.job.weights.read_bytes()

    def test_a_full_one_moves_as_a_whole(self, run: Run, teacher: Teacher):
        job = run.job("low_rank")
        job = replace(job, stage=replace(job.stage, fake_score=TuningConfig()))
        network = fake_score(build(job, teacher)[0])
        assert all(parameter.requires_grad for parameter in network.parameters())
        assert network.state_dict().keys() == teacher.backbone.state_dict().keys()
        assert not any(parameter.requires_grad for parameter in teacher.backbone.parameters())

    def test_mistakes_are_named(self):
        with pytest.raises(ValueError, match="rank must be at least 1 and alpha positive; given 0 and 32"):
            TuningConfig(kind="lora", rank=0)
        with pytest.raises(ValueError, match="given 32 and 0"):
            TuningConfig(kind="lora", alpha=0.0)


# A student of low rank


class TestStudentOfLowRank:
    @pytest.fixture(scope="class")
    def job(self, run: Run, tmp_path_factory: pytest.TempPathFactory) -> StageJob:
        job = run.job("sfd_2")
        stage = replace(job.stage, student=TuningConfig(kind="lora", rank=2, alpha=4.0), checkpoint_every=1)
        return replace(job, stage=stage, folder=str(tmp_path_factory.mktemp("student")))

    @pytest.fixture(scope="class")
    def whole(self, job: StageJob) -> StageTrainer:
        return trained(job)

    def test_it_moves_by_adapters_and_new_embeddings_alone(self, whole: StageTrainer, teacher: Teacher):
        network = whole.state.players["student"].network
        moving = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
        assert moving and all(".lora_" in name or name.startswith("interval.") for name in moving)
        base, _ = base_and_adapters(network.backbone)  # pyright: ignore[reportArgumentType]
        assert all(torch.equal(value, base[key]) for key, value in teacher.backbone.state_dict().items())

    def test_what_it_passes_on_is_a_plain_student(self, whole: StageTrainer, teacher: Teacher):
        """Its adapters are in the weights: the average with adapters and the file without them say the same."""
        student = new_student(teacher)
        load_weights(whole.job.weights, student)
        x, t, condition = asked()
        with torch.no_grad():
            average, passed_on = (network(x, t, 0 * t, condition) for network in (whole.state.average, student))
            fresh = new_student(teacher)(x, t, 0 * t, condition)
        assert torch.allclose(average, passed_on, atol=1e-5)
        assert (fresh - passed_on).abs().max() > 1e-3

    def test_a_checkpoint_holds_only_what_moves_and_goes_on_to_the_same_bits(
        self, job: StageJob, whole: StageTrainer, tmp_path: Path
    ):
        job = replace(job, folder=str(tmp_path))

        def stop(at: int) -> None:
            if at == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trainer_of(job, Watch(progress=stop)).run()
        (file,) = job.checkpoints.glob("*.safetensors")
        assert not any("base_layer" in key for key in load_file(file))
        assert trained(job).job.weights.read_bytes() == whole.job.weights.read_bytes()

    def test_another_stage_starts_from_it(self, run: Run, whole: StageTrainer, tmp_path: Path):
        job = replace(run.job("two_steps"), start_weights=str(whole.job.weights), folder=str(tmp_path))
        trained(job)


def test_gradient_checkpointing_trains_the_same_student(run: Run, tmp_path: Path):
    plain, again = (
        trained(replace(run.job("low_rank"), train=train, folder=str(tmp_path / name)))
        for name, train in (
            ("plain", run.recipe.train),
            ("again", replace(run.recipe.train, gradient_checkpointing=True)),
        )
    )
    one, other = load_file(plain.job.weights), load_file(again.job.weights)
    assert all(torch.allclose(value, other[key], rtol=1e-5, atol=1e-7) for key, value in one.items())


def test_exact_derivatives_refuse_gradient_checkpointing(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"stages\.flow\.objective: derivative exact cannot go through train\.gradient"
    ):
        recipe_in(tmp_path, "train.gradient_checkpointing=true", "stages.flow.objective.derivative=exact")


# Guidance of a stage's own


def test_guidance_of_a_stage_is_that_stages_alone(run: Run, teacher: Teacher, tmp_path: Path):
    """``v_null + w (v - v_null)`` with the stage's ``w``; the others keep the recipe's."""
    other = tiny.open_run(recipe_in(tmp_path, "stages.low_rank.guidance_scale=2.5"), run.dir.path)
    x, t, condition = asked()
    with torch.no_grad():
        v, null = teacher.backbone(x, t, condition), teacher.backbone(x, t, Condition(labels=torch.full((6,), 10)))
        for job, scale in (
            (run.job("low_rank"), 1.0),
            (other.job("low_rank"), 2.5),
            (other.job("flow"), 1.0),
        ):
            found = build(job, teacher)[1].teacher(x, t, condition)
            torch.testing.assert_close(found, null + scale * (v - null), rtol=1e-4, atol=1e-4)
    assert (v - null).abs().max() > 0.1
    assert run.job("low_rank").inputs["guidance_scale"] != other.job("low_rank").inputs["guidance_scale"]
    for name in ("sfd_2", "two_steps", "flow", "one_step"):
        assert run.job(name).inputs == other.job(name).inputs
    assert run.trajectories.spec == other.trajectories.spec


def test_without_its_own_a_stage_has_the_recipes(run: Run, teacher: Teacher, tmp_path: Path):
    recipe = recipe_in(tmp_path, "teacher.guidance_scale=2.5")
    explicit = recipe_in(tmp_path, "teacher.guidance_scale=2.5", "stages.low_rank.guidance_scale=2.5")
    jobs = [tiny.open_run(made, run.dir.path).job("low_rank") for made in (recipe, explicit)]
    assert jobs[0].inputs == jobs[1].inputs != run.job("low_rank").inputs
    velocities = [build(job, teacher)[1].teacher for job in jobs]
    with torch.no_grad():
        assert torch.equal(velocities[0](*asked()), velocities[1](*asked()))


@pytest.mark.parametrize("scale", [-0.5, float("inf"), float("nan")])
def test_an_impossible_guidance_is_refused(run: Run, scale: float):
    with pytest.raises(ValueError, match=f"guidance_scale must be a number of at least 0, or null; given {scale}"):
        replace(run.job("low_rank").stage, guidance_scale=scale)


# Chains


@pytest.fixture(scope="module")
def chains(run: Run) -> Run:
    """With every chain trained."""
    for name in ("sfd_2", "two_steps", "flow", "one_step"):
        trained(run.job(name))
    return run


@pytest.mark.parametrize(("name", "start", "nfe"), [("two_steps", "sfd_2", 2), ("one_step", "flow", 1)])
def test_a_chain_trains_from_its_start_and_is_measured_at_its_steps(chains: Run, name: str, start: str, nfe: int):
    state, _ = build(chains.job(name), chains.teacher)
    begun, before = state.players["student"].network.state_dict(), load_file(chains.job(start).weights)
    assert all(torch.equal(begun[key], before[key]) for key in before)
    after = load_file(chains.job(name).weights)
    assert any(not torch.equal(after[key], before[key]) for key in before)
    (row,) = chains.evaluator().measure([chains.student(name)])
    assert (row.nfe, row.stage, row.num_samples) == (nfe, name, 40)
    assert 0 < row.fid < float("inf")


def test_a_two_step_generator_is_sampled_as_it_was_trained(chains: Run):
    """Longhand: two jumps, of half the way each."""
    generator = chains.student("two_steps")
    assert generator.grid == (1.0, 0.5, 0.0) and generator.calls_per_image == 2
    trainer = trainer_of(chains.job("two_steps"))
    x, _, condition = asked()
    with torch.no_grad():
        objective: Any = trainer.job.stage.objective
        found = objective.generate(trainer.state.average, Batch(noise=x, condition=condition))
        ones = torch.ones(6)
        middle = x - 0.5 * trainer.state.average(x, ones, 0.5 * ones, condition)
        expected = middle - 0.5 * trainer.state.average(middle, 0.5 * ones, 0 * ones, condition)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
