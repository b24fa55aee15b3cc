"""A run's phases: timed, billed, and told to the person who watches."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from rich.console import Console

from pipelines.artifacts import RunDir
from pipelines.assembly import Assembly
from pipelines.costs import Bill
from pipelines.progress import bar
from pipelines.recipe import Recipe
from pipelines.report import Phase


@dataclass
class Timed:
    """A phase while it lasts."""

    reused: bool = False
    """Whether it was found finished."""


class Phases(Assembly):
    """The parts of a recipe, with somebody who watches."""

    def __init__(self, recipe: Recipe, run_dir: RunDir, console: Console) -> None:
        super().__init__(recipe, run_dir)
        self.console = console
        self.phases: list[Phase] = []
        self.bill = Bill(run_dir.path / "costs")

    def progress(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A bar."""
        return bar(self.console, title, total)

    @contextmanager
    def phase(self, name: str, *, billed: bool = True) -> "Iterator[Timed]":
        """Time a part of the run and say that it is done, or was before."""
        phase, started = Timed(), time.perf_counter()
        with self.bill.phase(name) if billed else nullcontext():
            yield phase
            if phase.reused:
                self.bill.forget(name)
        self.record(name, time.perf_counter() - started, reused=phase.reused)

    def record(self, name: str, seconds: float, *, reused: bool) -> None:
        self.phases.append(Phase(name=name, wall_seconds=seconds, reused=reused))
        how = "[dim]reused[/]" if reused else f"{seconds:.1f} s"
        self.say(f"  {name:<12} {how}")

    def say(self, text: str) -> None:
        """One line to the person who watches."""
        self.console.print(text, highlight=False)
