"""Progress: a bar for a person at a terminal, nothing in a log."""

import io
import re

import pytest
from rich.console import Console

from pipelines.progress import bar, rate


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with bar(console, "train sketch", 600) as show:
        show(0)
        show(150)
        console.print("a line in between")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_a_terminal_gets_title_count_and_time_left():
    text = shown(terminal=True)
    assert "train sketch" in text and "150/600" in text and re.search(r"--:--|\d+:\d\d", text)
    assert "a line in between" in text


def test_a_log_gets_only_the_lines():
    assert shown(terminal=False) == "a line in between\n"


def test_the_bar_goes_away_after_an_error():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80)
    with pytest.raises(ValueError, match="stop"), bar(console, "work", 10) as show:
        show(3)
        raise ValueError("stop")
    assert "\x1b[?25h" in out.getvalue()  # the cursor is back


@pytest.mark.parametrize(
    ("speed", "text"),
    [(12345.6, "12,346/s"), (10, "10/s"), (2.34, "2.3/s"), (0.5, "2.0 s each"), (0.01, "100.0 s each")],
)
def test_rates_are_written_as_the_handier_number(speed: float, text: str):
    assert rate(speed) == text
