"""Who stops trials early, told of the trials of earlier sessions as if it had seen them."""

from collections.abc import Sequence
from typing import Any

from pipelines.tuning.config import SCORE, STEP, SearchConfig
from pipelines.tuning.trial import Trial
from pipelines.tuning.work import Work


def make_scheduler(work: Work, config: SearchConfig, ended: Sequence[Trial]) -> Any:
    """A scheduler of Ray Tune's that has heard of every trial that has ended."""
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    known: dict[str, Any] = {"time_attr": STEP, "metric": SCORE, "mode": work.mode}
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
    ended, results = _Ended(trial), [{STEP: int(step), SCORE: score} for step, score in trial.points]
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
