"""Ray Tune over the trials of a sweep: who draws them, who stops them early, and how many run side by side.

Ray's own record of a sweep is pickles, which nothing here reads: what a search must know again after an interruption is
in the trials' files, from which sampler and scheduler are told anew.
"""

import logging
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from pipelines.cluster import ensure_ray, room_for
from pipelines.process import give_memory_back, prepare_process
from pipelines.storage import remove_tree
from pipelines.train import ray_storage
from pipelines.tuning.attempt import perform
from pipelines.tuning.config import SCORE, STEP, SearchConfig
from pipelines.tuning.samplers import drawn, make_searcher
from pipelines.tuning.schedulers import make_scheduler
from pipelines.tuning.trial import Trial, TrialFile
from pipelines.tuning.work import Work

RAY_FOLDER = "ray-"
"""How the folder of Ray's own record begins."""
_RAY_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_DEATHS = 3
"""Deaths of a trial's process that are survived."""

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
        os.environ.update(_RAY_SETTINGS)
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


def perform_all(work: Work, trials: Sequence[Trial], rooms: Rooms, done: Done, until: int | None = None) -> None:
    """Perform trials that are known beforehand, each to its end or to its score at an iteration."""
    from ray import tune

    space = {"place": tune.grid_search(list(range(len(trials))))}
    _fit(work, rooms, lambda config: trials[config["place"]], done, space, {}, until)


def search(work: Work, config: SearchConfig, known: Sequence[Trial], rooms: Rooms, done: Done) -> None:
    """Draw and perform trials until there are as many as are asked for; ``known`` are those of earlier sessions.

    The sampler learns from what it has drawn and from the baselines its parameters can say; not from chance, which
    it is held against.
    """
    own = [trial for trial in known if trial.kind == "search"]
    ended = [trial for trial in own if trial.is_over]
    if len(ended) >= config.num_trials:
        return
    unfinished = [trial for trial in own if not trial.is_over]
    asked = {
        "search_alg": make_searcher(work, config, unfinished, ended, baselines_as_draws(work, known)),
        "scheduler": make_scheduler(work, config, ended),
        "num_samples": config.num_trials - len(ended),
    }
    _fit(work, rooms, partial(trial_drawn, work), done, {}, asked)


def baselines_as_draws(work: Work, known: Sequence[Trial]) -> list[Trial]:
    """The baselines that have a score, each as the draw that it would have been."""
    scored = [trial for trial in known if trial.kind == "baseline" and trial.state == "done"]
    said = [(trial, work.space.as_draw(trial.values)) for trial in scored]
    return [replace(trial, values=values) for trial, values in said if values is not None]


def trial_drawn(work: Work, config: Mapping[str, Any]) -> Trial:
    """The trial of a draw in Optuna's words."""
    values = drawn(work, config)
    return Trial(kind="search", values=values, changes=work.space.overrides(values), seed=work.recipe.seed)


# Ray Tune


def _fit(
    work: Work,
    rooms: Rooms,
    trial_of: Callable[[Mapping[str, Any]], Trial],
    done: Done,
    space: dict[str, Any],
    asked: dict[str, Any],
    until: int | None = None,
) -> None:
    from ray import tune

    folder = work.sweep / f"{RAY_FOLDER}{uuid.uuid4().hex}"
    trainable = tune.with_parameters(_trainable, work=work, trial_of=trial_of, until=until)
    tuner = tune.Tuner(
        tune.with_resources(trainable, rooms.resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            **asked,
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


def _trainable(
    config: dict[str, Any], *, work: Work, trial_of: Callable[[Mapping[str, Any]], Trial], until: int | None
) -> None:
    """A trial in a process of Ray's."""
    from pipelines.cluster import quiet

    quiet()
    prepare_process(work.cpus)
    give_memory_back()  # what a trial left that was stopped in this process
    try:
        perform(work, trial_of(config), _report, until)
    except Stopped:
        sys.exit(0)


def _report(step: int, score: float) -> None:
    """Tell Ray Tune, which ends this thread where it has heard enough."""
    from ray import tune

    try:
        tune.report({STEP: step, SCORE: score})
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
                done(TrialFile(work.sweep, trial_of(trial.config)).write(mistake=reason))  # it may go on another time

    return Listener()


def _last_line(trial: Any) -> str:
    lines = str(trial.get_pickled_error() or "Ray does not say why").strip().splitlines()
    return lines[-1] if lines else "Ray does not say why"
