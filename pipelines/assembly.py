"""What a recipe's parts become in a run directory: stages as jobs, teacher and students as generators, their judge."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from itertools import product
from pathlib import Path

from hd_core.guidance import branches
from hd_core.objectives.turns import first_step_is_analytical
from pipelines.artifacts import fingerprint, read_json, write_json
from pipelines.cache import cache_folder
from pipelines.clip import Clip
from pipelines.evaluate import FLOW_MAP, Evaluator, Generator, teacher_generators
from pipelines.extractor import Extractor
from pipelines.feature_shards import load_feature_makers
from pipelines.features import BUILT_IN, load_extractor
from pipelines.generators import texts_of
from pipelines.inputs import Inputs
from pipelines.peer_pictures import drawn_by
from pipelines.peers import PIPELINE, PeerConfig
from pipelines.perceptual import LPIPS, load_perceptual
from pipelines.process import default_device
from pipelines.recipe import TEACHER
from pipelines.references import Library, Reference
from pipelines.shards import ShardSet
from pipelines.stages import StageJob, measured_steps, sampling_grid, stage_inputs


class Assembly(Inputs):
    """The parts of one recipe in one run directory, each put together when it is first asked for."""

    @cached_property
    def extractor(self) -> Extractor:
        return self._extractor(self.recipe.evaluate.features)

    @cached_property
    def second_extractor(self) -> Extractor | None:
        name = self.recipe.evaluate.second_features
        return self._extractor(name) if name else None

    @cached_property
    def clip(self) -> Clip | None:
        name = self.recipe.evaluate.clip
        return Clip.of(name, default_device()) if name else None

    @cached_property
    def _perceptual_nets(self) -> dict[str, str]:
        """Fingerprint of each net of a perceptual distance, by its name: loading one takes seconds, so once a run."""
        names = {stage.perceptual for stage in self.recipe.stages.values() if stage.perceptual}
        return {name: load_perceptual(name).fingerprint for name in sorted(names)}

    def _extractor(self, name: str) -> Extractor:
        extractor = load_extractor(name, default_device())
        extractor.check(self.splits.train.shape)
        return extractor

    # Stages

    def job(self, name: str) -> StageJob:
        """What a worker needs to train a stage."""
        recipe, stage = self.recipe, self.recipe.stages[name]
        needs = stage.objective.needs
        upstream = {"start": self._start_identity(name)}
        if "trajectories" in needs:
            upstream["trajectories"] = self.trajectories.spec.fingerprint
        if stage.needs_images:
            upstream["images"] = self.images.spec.fingerprint
        latents = self.latents if "images" in needs else None
        if latents:
            upstream["latents"] = latents.spec.fingerprint
        if self.prompts:
            upstream["prompts"] = self.prompts.spec.fingerprint
        if stage.probe.every:
            upstream["probe_features"] = self.extractor.fingerprint
        if stage.perceptual:
            upstream["perceptual"] = self._perceptual_nets[stage.perceptual]
        upstream |= {"teacher": self.teacher.fingerprint, "guidance_scale": f"{stage.guided(recipe.teacher):g}"}
        return StageJob(
            name=name,
            stage=stage,
            train=recipe.train,
            teacher=recipe.teacher,
            seed=recipe.seed,
            folder=str(self.dir.stage(name).resolve()),
            start_weights="" if stage.start == TEACHER else str(self._weights(stage.start)),
            trajectories=self.trajectories if "trajectories" in needs else None,
            images=self.images if stage.needs_images else None,
            inputs=stage_inputs(stage, recipe.train, upstream, recipe.seed, name),
            features=_portable(recipe.evaluate.features) if stage.probe.every else "",
            validation=self.validation if stage.probe.every else None,
            judged_by=self.judged_by if stage.probe.every else None,
            perceptual=_portable(stage.perceptual),
            start_knows_steps=stage.start != TEACHER and recipe.knows_steps(stage.start),
            latents=latents,
            prompts=self.prompts,
        )

    def _start_identity(self, name: str) -> str:
        """What a stage starts from, as an identity that is known before that exists."""
        start = self.recipe.stages[name].start
        return "teacher" if start == TEACHER else fingerprint(self.job(start).inputs)

    def _weights(self, name: str) -> Path:
        return (self.dir.stage(name) / "student.safetensors").resolve()

    # Generators

    def generators(self) -> list[Generator]:
        """All that the report has a row for, in order."""
        recipe = self.recipe
        from_teacher = teacher_generators(recipe.evaluate, self.teacher, recipe.teacher.guidance_scale)
        students = (student for name in recipe.stages for student in self.students(name))
        return [*from_teacher, *students, *(self.peer(name) for name in recipe.evaluate.peers)]

    def peer(self, name: str) -> Generator:
        """A generator of others, at its number of network calls.

        Raises:
            ValueError: there are no such pictures, or the pipeline cannot be loaded.
        """
        config = self.recipe.evaluate.peers[name]
        if not config.is_pipeline:
            return drawn_by(name, config)
        identity = config.identity
        return Generator(
            label=name,
            stage="",
            solver=PIPELINE,
            grid=(),
            calls_per_image=self._calls(config, identity),
            train_seconds=0.0,
            identity=identity,
            guidance_scale=config.guidance_scale or 1.0,
            peer=config,
        )

    def _calls(self, config: PeerConfig, identity: str) -> int:
        """Network calls of a pipeline for a picture: counted once, since it must be loaded for that."""
        file = cache_folder("peers") / f"{identity}.json"
        known = read_json(file)
        if known is None:
            labels = self.evaluation_labels(range(1)).tolist()
            known = {"calls": config.load("cpu").calls(labels, texts_of(self.reader, labels))}
            write_json(file, known)
        return known["calls"]

    def require_trained(self, name: str) -> None:
        """Raises ValueError where a stage is not trained yet."""
        if self.job(name).finished() is None:
            raise ValueError(f"stage {name} is not trained in {self.dir.path}: run `hdistill train` first")

    def students(self, name: str) -> Iterator[Generator]:
        """A trained stage at every number of steps and guidance that is measured."""
        stage, asked = self.recipe.stages[name], self.recipe.evaluate
        for guidance_scale, steps in product(asked.guidance_scales, measured_steps(stage, asked.step_counts)):
            yield self.student(name, steps, guidance_scale)

    def student(self, name: str, steps: int | None = None, guidance_scale: float = 1.0) -> Generator:
        """A trained stage as a generator, of its own number of steps where none is asked for.

        Raises:
            ValueError: its student is not told how many steps there are, or cannot walk so many.
        """
        stage = self.recipe.stages[name]
        grid = tuple(sampling_grid(name, stage, steps).tolist())
        afs = first_step_is_analytical(stage.objective)
        manifests = [read_json(self.dir.stage(link) / "stage.json") for link in self.recipe.chain(name)]
        return Generator(
            label=stage.label or name,
            stage=name,
            solver=FLOW_MAP,
            grid=grid,
            calls_per_image=(len(grid) - 1 - afs) * branches(guidance_scale),
            train_seconds=sum(manifest["train_seconds"] for manifest in manifests if manifest),
            identity=manifests[-1]["sha256"] if manifests[-1] else "",
            weights=str(self._weights(name)),
            afs=afs,
            knows_steps=self.recipe.knows_steps(name),
            guidance_scale=guidance_scale,
        )

    @cached_property
    def reference(self) -> Reference:
        asked = self.recipe.evaluate
        return self._library.reference(_portable(asked.features), self.extractor, asked.num_samples, asked.statistics)

    @cached_property
    def second_reference(self) -> Reference | None:
        asked, extractor = self.recipe.evaluate, self.second_extractor
        if extractor is None:
            return None
        return self._library.reference(_portable(asked.second_features), extractor, asked.num_samples, "")

    @cached_property
    def judged_by(self) -> ShardSet:
        """Features of the real images that probes score against."""
        return self._library.judged_by(self.extractor)

    def make_judged_by(self) -> None:
        """See that those features are all there."""
        self._library.make_judged_by(_portable(self.recipe.evaluate.features), self.extractor)

    @property
    def _library(self) -> Library:
        folder = self.dir.references
        return Library(folder=folder, splits=self.splits, actors=self.recipe.evaluate.actors, progress=self.progress)

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Shows how far long work is; nobody watches here."""
        del title, total
        return nullcontext(lambda _: None)

    def evaluator(self) -> Evaluator:
        """Measures this run's generators."""
        elsewhere = {"teacher": self.recipe.teacher, "prompts": self.prompts, "nets": self.nets}
        return Evaluator(
            self.recipe.evaluate,
            self.reader,
            self.reference,
            self.second_reference,
            self.splits.fingerprint,
            self.recipe.seed,
            self.dir.evaluation,
            self.evaluation_labels,
            partial(load_feature_makers, clip=self.clip.name if self.clip else "", **elsewhere),
            self.clip,
        )

    @property
    def nets(self) -> list[str]:
        """How processes elsewhere load the feature nets of evaluation."""
        asked = self.recipe.evaluate
        return [_portable(net) for net in (asked.features, asked.second_features) if net]


def _portable(net: str) -> str:
    """A feature net's name, or its folder as a worker in another directory finds it."""
    return net if net in ("", LPIPS, *BUILT_IN) else str(Path(net).expanduser().resolve())
