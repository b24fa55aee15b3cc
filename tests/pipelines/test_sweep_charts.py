"""What a few bad scores do to a sweep's pictures: they leave the height to the others."""

from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.tuning import sweep_charts
from pipelines.tuning.trial import Trial


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of what is drawn, in the place of a PNG."""
    found: list[Axes] = []

    def keep(figure: Figure) -> bytes:
        found.append(figure.axes[0])
        return b""

    monkeypatch.setattr(sweep_charts, "to_png", keep)
    return found


def trial(number: int, *scores: float, state: Any = "done", **known: Any) -> Trial:
    points = [[50.0 * (rung + 1), score] for rung, score in enumerate(scores)]
    changes = {"number": number}
    return Trial(kind="search", values={}, changes=changes, seed=0, state=state, points=points, ended=number, **known)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize(("worst", "scale"), [(8.0, "linear"), (80.0, "log")])
def test_a_history_with_a_bad_score_is_logarithmic_with_plain_numbers(drawn: list[Axes], worst: float, scale: str):
    sweep_charts.history([trial(1, 3.5), trial(2, worst), trial(3, 3.2)], "probe/fid", "min")
    assert drawn[0].get_yscale() == scale
    formatter = drawn[0].yaxis.get_major_formatter()
    assert formatter(20, 0) == "20"


def test_a_history_that_goes_below_zero_stays_linear(drawn: list[Axes]):
    sweep_charts.history([trial(1, -0.5), trial(2, 80.0)], "probe/fid", "min")
    assert drawn[0].get_yscale() == "linear"


def population() -> list[Trial]:
    good = [trial(number, 4.0 - 0.1 * number, 3.9 - 0.1 * number) for number in range(7)]
    return [*good, trial(7, 131.0, state="stopped"), trial(8, 8.9, state="stopped")]


def test_those_far_behind_are_at_the_edge_with_their_scores(drawn: list[Axes]):
    sweep_charts.population_paths(population(), "probe/fid", "min")
    low, high = drawn[0].get_ylim()
    assert 3.0 < low < 3.3 and 4.0 < high < 4.3
    assert texts(drawn[0]) == ["8.9, 131"]


def test_where_more_is_better_the_edge_is_below(drawn: list[Axes]):
    members = [trial(number, 0.9 + 0.01 * number) for number in range(7)]
    sweep_charts.population_paths([*members, trial(9, 0.1, state="stopped")], "probe/diversity", "max")
    low, high = drawn[0].get_ylim()
    assert low > 0.8 and high > 0.96 and texts(drawn[0]) == ["0.1"]


def test_equal_scores_have_an_axis(drawn: list[Axes]):
    sweep_charts.population_paths([trial(1, 3.0), trial(2, 3.0)], "probe/fid", "min")
    assert drawn[0].get_ylim() == (2.0, 4.0) and not texts(drawn[0])
