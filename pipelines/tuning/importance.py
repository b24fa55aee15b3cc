"""Which parameters of a search matter, by Optuna's functional analysis of variance."""

import warnings
from collections.abc import Sequence
from typing import Any

from pipelines.tuning.samplers import distribution, words
from pipelines.tuning.trial import Trial
from pipelines.tuning.work import Work

_LEAST_TRIALS = 8
"""Below so many, a forest says more about chance than about parameters."""


def study_of(work: Work, trials: Sequence[Trial]) -> Any:
    """The draws that were trained to their end, as Optuna has them."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="minimize" if work.mode == "min" else "maximize")
    distributions = {name: distribution(one) for name, one in work.space.parameters.items()}
    for trial in trials:
        if trial.state == "done" and set(trial.values) == set(distributions) and not trial.parent:
            params = words(work, trial.values)
            study.add_trial(optuna.trial.create_trial(params=params, distributions=distributions, value=trial.score))
    return study


def importances(work: Work, trials: Sequence[Trial]) -> dict[str, float]:
    """Share of the scores' variance that each parameter explains; empty where there are too few trials to tell."""
    import optuna

    study = study_of(work, trials)
    if len(study.trials) < _LEAST_TRIALS or len({trial.value for trial in study.trials}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))
