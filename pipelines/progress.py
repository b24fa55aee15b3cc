"""What a person at a terminal sees of long work: a bar with rate and time left; plain lines where nobody watches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    """Units per second, or seconds per unit where that is the handier number."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(rate(speed), style="cyan")


def rate(speed: float) -> str:
    """A speed in units per second, as a person reads it."""
    if speed < 1:
        return f"{1 / speed:,.1f} s each"
    return f"{speed:,.0f}/s" if speed >= 10 else f"{speed:.1f}/s"


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show progress; the function that is handed out takes what has been done so far."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)


class Counter:
    """Turns steps of work into what has been done so far, for a bar."""

    def __init__(self, done: int, show: Callable[[int], object]) -> None:
        self._done, self._show = done, show

    def add(self, count: int) -> None:
        self._done += count
        self._show(self._done)
