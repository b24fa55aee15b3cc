"""How a sweep searches, and what its trials tell Ray Tune."""

from dataclasses import dataclass
from typing import Literal

Sampler = Literal["tpe", "cma_es", "random"]
Scheduler = Literal["none", "asha", "median", "pbt"]
SCORE, STEP = "score", "step"


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
        if self.scheduler == "pbt" and self.sampler != "tpe":
            raise ValueError(f"pbt draws and changes trials by itself: leave the sampler out; given {self.sampler}")
        if self.slots is not None and self.slots < 1:
            raise ValueError(
                f"slots: at least one trial must run at a time; given {self.slots}. Leave it out for as many as fit"
            )
