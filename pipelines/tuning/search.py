"""Ray Tune over the trials of a sweep: who draws them, who stops them early, and how many run side by side.

Ray's own record of a sweep is pickles, which nothing here reads: what a search must know again after an interruption is
in the trials' files, from which sampler and scheduler are told anew.
"""

import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from pipelines.cluster import ensure_ray, room_for
from pipelines.process import prepare_process
from pipelines.storage import remove_tree
from pipelines.train import ray_storage
from pipelines.tuning.trial import Trial, TrialFile, perform
from pipelines.tuning.work import METRICS, Work
from tune_spaces.space import Distribution, Integer, Uniform

Sampler = Literal["tpe", "cma_es", "random"]
Scheduler = Literal["none", "asha", "median"]
RAY_FOLDER = "ray-"
"""How the folder of Ray's own record begins."""
_SCORE, _STEP = "score", "step"
_DEATHS = 3
"""Deaths of a trial's process that are survived."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """How a sweep searches."""

    sampler: Sampler = "tpe"
    scheduler: Scheduler = "none"
    num_trials: int = 30
    """Trials that the sampler draws."""
    slots: int | None = None
    """Trials side by side; None: as many as there is room for."""
    cpus: float = 1.0
    """CPUs of each."""
    gpus: float = 0.0
    """GPUs of each; may be a fraction."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_trials < 0 or self.cpus <= 0 or self.gpus < 0:
            raise ValueError(
                "trials and gpus must not be negative and cpus positive; given"
                f" {self.num_trials}, {self.gpus:g} and {self.cpus:g}"
            )
        if self.slots is not None and self.slots < 1:
            raise ValueError(
                f"slots: at least one trial must run at a time; given {self.slots}. Leave it out for as many as fit"
            )


Done = Callable[[Trial], None]
"""Told of a trial when it has ended."""


class Stopped(Exception):
    """The scheduler ends this trial."""


class Rooms:
    """How many trials run side by side on the cluster that is there."""

    def __init__(self, config: SearchConfig, work: Work) -> None:
        """Start Ray, or join it.

        Raises:
            ValueError: there is no room for one trial, or not for as many as are asked for.
        """
        os.environ.update({"TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0"})
        os.environ.update({"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1"})
        train = work.recipe.train
        self.nested = train.num_workers != 0
        workers = train.least_workers
        cpus, gpus = config.cpus + workers * train.cpus_per_worker, config.gpus + workers * train.gpus_per_worker
        ensure_ray(reserved_cpus=cpus, reserved_gpus=gpus)
        room = room_for(cpus=cpus, gpus=gpus)
        if (config.slots or 1) > room:
            raise ValueError(
                f"{config.slots or 1} trials of {cpus:g} CPUs and {gpus:g} GPUs do not fit side by side: there is room"
                f" for {room}. Lower --slots, or what each of them gets"
            )
        self.slots = config.slots or min(room, max(1, config.num_trials))
        self.resources = {"cpu": config.cpus, "gpu": config.gpus}
        logging.getLogger("ray.tune").setLevel(logging.ERROR)


def perform_all(work: Work, trials: Sequence[Trial], rooms: Rooms, done: Done) -> None:
    """Perform trials that are known beforehand, each to its end."""
    from ray import tune

    space = {"place": tune.grid_search(list(range(len(trials))))}
    _fit(work, rooms, lambda config: trials[config["place"]], done, space, {})


def search(work: Work, config: SearchConfig, known: Sequence[Trial], rooms: Rooms, done: Done) -> None:
    """Draw and perform trials until there are as many as are asked for; ``known`` are those of earlier sessions."""
    drawn = [trial for trial in known if trial.kind == "search"]
    ended = [trial for trial in known if trial.state != "running" and trial.kind != "final"]
    left = config.num_trials - sum(trial.state != "running" for trial in drawn)
    if left <= 0:
        return
    searcher = _searcher(work, config, [trial for trial in drawn if trial.state == "running"], ended)
    asked = {
        "search_alg": searcher,
        "scheduler": _scheduler(work, config, [trial for trial in ended if trial.kind == "search"]),
        "num_samples": left,
    }
    _fit(work, rooms, partial(_drawn, work), done, {}, asked)


def _drawn(work: Work, config: Mapping[str, Any]) -> Trial:
    values = {name: _value(one, config[name]) for name, one in work.space.parameters.items()}
    return Trial(kind="search", values=values, changes=work.space.overrides(values), seed=work.recipe.seed)


# Sampler and scheduler


def _searcher(work: Work, config: SearchConfig, unfinished: Sequence[Trial], ended: Sequence[Trial]) -> Any:
    """Optuna, told of every trial that has ended, which begins with those that were interrupted."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parameters = work.space.parameters
    searcher = OptunaSearch(
        {name: distribution(one) for name, one in parameters.items()},
        metric=_SCORE,
        mode=METRICS[work.metric],
        sampler=_sampler(config.sampler, config.seed + len(ended)),  # else it would repeat its first draws
        points_to_evaluate=[words(work, trial.values) for trial in unfinished] or None,
    )
    for trial in ended:
        if set(trial.values) == set(parameters):  # a baseline may be no point of the space
            searcher.add_evaluated_point(words(work, trial.values), _told(trial))
    return searcher


def _told(trial: Trial) -> float:
    return float("inf") if trial.score is None else trial.score


def _sampler(name: Sampler, seed: int) -> Any:
    from optuna import samplers

    if name == "random":
        return samplers.RandomSampler(seed=seed)
    if name == "cma_es":
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def distribution(one: Distribution) -> Any:
    """A parameter as Optuna has it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(one, Uniform):
        return FloatDistribution(one.low, one.high, log=one.log)
    if isinstance(one, Integer):
        return IntDistribution(one.low, one.high)
    return CategoricalDistribution([_word(value) for value in one.values])


def _word(value: Any) -> Any:
    """A choice as Optuna takes it: lists and mappings as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


def _value(one: Distribution, word: Any) -> Any:
    """What a word of Optuna's stands for."""
    if isinstance(one, Uniform | Integer):
        return word
    return next(value for value in one.values if _word(value) == word and type(_word(value)) is type(word))


def words(work: Work, values: Mapping[str, Any]) -> dict[str, Any]:
    """A draw as Optuna has it."""
    numeric = (Uniform, Integer)
    return {
        name: values[name] if isinstance(one, numeric) else _word(values[name])
        for name, one in work.space.parameters.items()
    }


def _scheduler(work: Work, config: SearchConfig, ended: Sequence[Trial]) -> Any:
    """Who stops trials early, told of the trials that have ended as if it had seen them."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    known: dict[str, Any] = {"time_attr": _STEP, "metric": _SCORE, "mode": METRICS[work.metric]}
    if config.scheduler == "asha":
        scheduler = ASHAScheduler(**known, max_t=work.num_steps + 1, grace_period=work.every, reduction_factor=2)
    elif config.scheduler == "median":
        scheduler = MedianStoppingRule(**known, grace_period=work.every, min_samples_required=3)
    else:
        return FIFOScheduler()
    for trial in ended:
        _retell(scheduler, trial)
    return scheduler


class _Ended:
    """A trial of an earlier session, as far as a scheduler asks."""

    def __init__(self, trial: Trial) -> None:
        self.trial_id = trial.key


def _retell(scheduler: Any, trial: Trial) -> None:
    ended, results = _Ended(trial), [{_STEP: int(step), _SCORE: score} for step, score in trial.points]
    others = _NoOthers()
    scheduler.on_trial_add(others, ended)
    for result in results:
        scheduler.on_trial_result(others, ended, result)
    if results:
        scheduler.on_trial_complete(others, ended, results[-1])


class _NoOthers:
    """What a scheduler asks for trials that wait, while it is told of those that have ended."""

    def get_live_trials(self) -> list[Any]:
        return []


# Ray Tune


def _fit(
    work: Work,
    rooms: Rooms,
    trial_of: Callable[[Mapping[str, Any]], Trial],
    done: Done,
    space: dict[str, Any],
    asked: dict[str, Any],
) -> None:
    from ray import tune

    own = ("metric", "mode")
    folder = work.sweep / f"{RAY_FOLDER}{uuid.uuid4().hex}"
    trainable = tune.with_parameters(_trainable, work=work, trial_of=trial_of)
    tuner = tune.Tuner(
        tune.with_resources(trainable, rooms.resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            **{key: value for key, value in asked.items() if key not in own},
            max_concurrent_trials=rooms.slots,
            reuse_actors=not rooms.nested,
        ),
        run_config=tune.RunConfig(
            **ray_storage(folder),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=_DEATHS),
            callbacks=[_listener(work, trial_of, done)],
        ),
    )
    try:
        tuner.fit()
    finally:
        remove_tree(folder)


def _trainable(config: dict[str, Any], *, work: Work, trial_of: Callable[[Mapping[str, Any]], Trial]) -> None:
    """A trial in a process of Ray's."""
    from pipelines.cluster import quiet

    quiet()
    prepare_process(work.cpus)
    try:
        perform(work, trial_of(config), _report)
    except Stopped:
        sys.exit(0)


def _report(step: int, score: float) -> None:
    """Tell Ray Tune, which ends this thread where it has heard enough."""
    from ray import tune

    try:
        tune.report({_STEP: step, _SCORE: score})
    except SystemExit:
        raise Stopped from None


def _listener(work: Work, trial_of: Callable[[Mapping[str, Any]], Trial], done: Done) -> Any:
    """What tells the driver of trials that have ended, and settles what is known of those that ended early."""
    from ray.tune.progress_reporter import TrialProgressCallback

    class Listener(TrialProgressCallback):
        """In the place of the one that prints a line a trial, however quiet Ray is told to be."""

        def __reduce__(self) -> tuple[Any, ...]:
            """Ray pickles a sweep for a resume that is not used here; what watches it cannot be."""
            return TrialProgressCallback, ()

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
            """Scores are in the trials' files."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            file = TrialFile(work.sweep, trial_of(trial.config))
            done(file.write(state="stopped") if file.trial.state == "running" else file.trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if trial.num_failures > _DEATHS:
                reason = f"its process died {trial.num_failures} times; the last time: {_last_line(trial)}"
                done(
                    TrialFile(work.sweep, trial_of(trial.config)).write(mistake=reason)
                )  # not its own fault: it may go on

    return Listener()


def _last_line(trial: Any) -> str:
    lines = str(trial.get_pickled_error() or "Ray does not say why").strip().splitlines()
    return lines[-1] if lines else "Ray does not say why"
