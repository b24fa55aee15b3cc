"""What an iteration of each objective costs, in passes of a network over one row."""

import statistics

from hd_core.objectives.dmd import DMD
from pipelines.stages import StageConfig


def calls_per_row(stage: StageConfig) -> int:
    """Passes of one iteration over a row, to the nearest whole; a backward pass counts as two forward ones."""
    objective = stage.objective
    if objective.name == "mean_velocity":
        return 3
    if objective.name == "meanflow":
        return 4 + round(2 * (1 - objective.equal_share))  # the teacher's call, and the derivative where r < t
    if objective.name == "sfd":
        taught = 0 if objective.taught_by == "teacher" else objective.start_intervals - objective.start_afs
        return round(3 * (statistics.mean(objective.counts) - objective.afs)) + taught
    return _calls_of_dmd(objective)


def _calls_of_dmd(objective: DMD) -> int:
    sampling, adversarial = objective.intervals - objective.afs, objective.adversarial
    judged = 2 + bool(adversarial.r1_weight) if adversarial.weight else 0
    through_judge = 3 + (adversarial.loss == "relativistic") if adversarial.weight else 0
    # The samples are there when the generator moves; its turn adds their backward pass and two scores.
    generator = 2 * (objective.gradient_steps or sampling) + 2 + through_judge
    return round(sampling + 3 + judged + generator / objective.update_ratio)
