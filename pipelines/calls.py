"""What an iteration of each objective costs, in passes of a network over one row."""

import statistics

from hd_core.guidance import branches
from hd_core.objectives.dmd import DMD
from pipelines.stages import StageConfig


def calls_per_row(stage: StageConfig, scale: float = 1.0) -> int:
    """Passes of one iteration over a row, to the nearest whole; a backward pass counts as two forward ones.

    ``scale`` is the guidance of the teacher that the stage asks.
    """
    objective = stage.objective
    if objective.name == "mean_velocity":
        return 3
    if objective.name == "meanflow":
        return 3 + branches(scale) + round(2 * (1 - objective.equal_share))  # the derivative is taken where r < t
    if objective.name == "sfd":
        taught = 0 if objective.taught_by == "teacher" else objective.start_intervals - objective.start_afs
        return round(3 * (statistics.mean(objective.counts) - objective.afs)) + taught
    return _calls_of_dmd(objective, branches(scale), stage.fake_score.kind == "lora")


def calls_of_training(stage: StageConfig, scale: float = 1.0) -> int:
    """Passes over a row of the batch, of all iterations together."""
    return sum(steps * calls_per_row(as_what, scale) for steps, as_what in stage.spans())


def _calls_of_dmd(objective: DMD, teacher: int, low_rank: bool) -> int:
    sampling, adversarial = objective.intervals - objective.afs, objective.adversarial
    judged = 2 + bool(adversarial.r1_weight) if adversarial.weight else 0
    through_judge = 3 + (adversarial.loss == "relativistic") if adversarial.weight else 0
    # The samples are there when the generator moves; its turn adds their backward pass and two scores.
    generator = 2 * (objective.gradient_steps or sampling) + 1 + teacher + through_judge
    fake = 2 if low_rank else 3  # a frozen base needs no gradients of its weights
    return round(sampling + fake + judged + generator / objective.update_ratio)
