"""Optuna as a sweep's sampler: parameters and draws as it has them, and what it is to know from earlier sessions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.tuning.config import SCORE, Sampler, SearchConfig
from pipelines.tuning.trial import Trial
from pipelines.tuning.work import Work
from tune_spaces.space import Distribution, Integer, Uniform


def make_searcher(
    work: Work,
    config: SearchConfig,
    unfinished: Sequence[Trial],
    ended: Sequence[Trial],
    baselines: Sequence[Trial] = (),
) -> Any:
    """Optuna, told of baselines and of every trial that has ended, which begins with those that were interrupted."""
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parameters = work.space.parameters
    searcher = OptunaSearch(
        {name: distribution(one) for name, one in parameters.items()},
        metric=SCORE,
        mode=work.mode,
        sampler=_sampler(config.sampler, config.seed + len(ended)),  # else it would repeat its first draws
        points_to_evaluate=[words(work, trial.values) for trial in unfinished] or None,
    )
    for trial in [*baselines, *ended]:
        searcher.add_evaluated_point(words(work, trial.values), work.worst if trial.score is None else trial.score)
    return searcher


def drawn(work: Work, config: Mapping[str, Any]) -> dict[str, Any]:
    """The draw that stands in Optuna's words."""
    return {name: _value(one, config[name]) for name, one in work.space.parameters.items()}


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
    return {name: _word(values[name]) for name in work.space.parameters}
