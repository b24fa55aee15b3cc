"""The pictures of a stage's training: which panels there are, what they say, and where the discriminator looks."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from hd_core.objectives.adversarial import token_entropy
from pipelines import recipe as recipes
from pipelines import report_page, stage_charts, weight_sheet
from pipelines.artifacts import RunDir
from pipelines.figures import DARK, LIGHT
from pipelines.stage_charts import Panel, names_apart, panels, stability_chart
from pipelines.weight_sheet import Judged, Looks, read_looks
from tests.pipelines.tiny import open_run

RECIPE = """\
seed: 3
data: {held_out: 1597}
stages:
  refine:
    objective: {name: dmd, update_ratio: 2}
    num_steps: 5
    batch_size: 4
    log_every: 1
    probe: {every: 3, num_samples: 40, fake_score_moves: 1}
evaluate: {num_samples: 200, pictures: 16}
track: {enabled: false}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose only stage is trained for a few iterations, and that has no report."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(RECIPE)
    RunDir.create(folder / "run")
    open_run(recipes.load(str(folder / "recipe.yaml"), []), folder / "run").partial(lambda run: run.train_stages(()))
    return folder / "run"


def titles(records: Sequence[dict[str, float]]) -> list[str]:
    return [panel.title for panel in panels(records)]


def rising(**values: float) -> list[dict[str, float]]:
    """Three points; names are those of the metrics, with __ for the stroke."""
    return [{"step": step, **{k.replace("__", "/"): step * v for k, v in values.items()}} for step in (1, 2, 3)]


def drawn(title: str, records: list[dict[str, float]]) -> tuple[str, list[str], list[np.ndarray]]:
    """A panel's title, the names at its right from the lowest on, and the values of its lines."""
    panel = next(panel for panel in stage_charts.PANELS if panel.title == title)
    axes = Figure(figsize=(3, 2)).add_subplot()
    stage_charts._draw_panel(axes, panel, records, LIGHT)
    names = sorted(axes.texts, key=lambda text: text.get_position()[1])
    return axes.get_title(loc="left"), [text.get_text() for text in names], [line.get_ydata() for line in axes.lines]


def make_judged(
    *, rows: int = 3, side: int = 8, layers: int = 2, tokens: int = 16, sharpness: float = 1.0, seed: int = 0
) -> Judged:
    random = np.random.default_rng(seed)
    weights = np.exp(sharpness * random.normal(size=(rows, layers, 4, tokens)))
    return Judged(
        images=random.integers(0, 256, (rows, side, side, 3), dtype=np.uint8),
        logits=random.normal(size=(rows, layers)).astype(np.float32),
        weights=(weights / weights.sum(-1, keepdims=True)).astype(np.float32),
    )


# The chart


def test_a_trained_stage_has_every_panel_and_a_sheet(trained: Path) -> None:
    records = report_page._load_curves(trained, ["refine"])["refine"]
    assert titles(records) == [panel.title for panel in stage_charts.PANELS if not panel.changing]
    assert report_page.render_stages(trained) == ["stability-refine.png", "weights-refine.png"]
    sizes = [Image.open(trained / "figures" / f"{name}-refine.png").size for name in ("stability", "weights")]
    assert sizes[0] == (9 * 180, int((0.3 + 1.75 * 3) * 180)) and sizes[1][0] <= 900
    fids = [json.loads(line)["probe/fid"] for line in (trained / "stages/refine/metrics.jsonl").open() if "fid" in line]
    assert drawn("probe FID", records)[0] == f"probe FID: best {min(fids):.3g} at {(3, 5)[np.argmin(fids)]}"


def test_a_stage_without_discriminator_and_probes_has_no_chart() -> None:
    for nothing in ([], rising(gradient_norm__student=1.0, loss__x=1.0), rising(real_logit=float("nan"))):
        assert panels(nothing) == []
        with pytest.raises(ValueError, match="nothing to draw"):
            stability_chart(nothing)
    assert report_page._stability({}) == report_page._readings({}) == []


def test_only_panels_with_values_are_drawn() -> None:
    assert titles(rising(real_logit=0.5)) == ["logits"]
    only_probes = rising(probe__fid=3.0, gradient_norm__student=1.0)
    assert titles(only_probes) == ["gradient norms of the players", "probe FID"]
    assert titles(rising(token_entropy=0.3, gradient__adversarial=0.0)) == ["entropy of the token weights"]


def test_what_does_not_change_is_left_out_where_only_change_tells() -> None:
    still = [{"step": step, "real_logit": 1.0, "adversarial_weight": 0.1, "non_finite_rows": 0.0} for step in (1, 2)]
    assert titles(still) == ["logits"]
    moved = [*still, {"step": 3, "adversarial_weight": 0.2, "non_finite_rows": 0.01}]
    assert titles(moved)[1:] == ["weight of the adversarial term", "rows left out as not finite"]


def test_lines_end_in_their_names_in_their_order() -> None:
    _, names, lines = drawn("accuracy", rising(accuracy_real=0.3, accuracy_fake=0.1))
    assert names == ["on generated", "chance", "on real"]
    assert [line[-1] for line in lines] == pytest.approx([0.9, 0.9, 0.3, 0.3, 0.5])
    assert drawn("accuracy", rising(accuracy_real=0.1, accuracy_fake=0.3))[1] == ["on real", "chance", "on generated"]


@pytest.mark.parametrize(
    ("title", "values", "names"),
    [
        ("logits", {"real_logit": 1, "fake_logit": -1}, ["generated", "real"]),
        ("gradient at the sample", {"gradient__matching": 1, "gradient__adversarial": 9}, ["matching", "adversarial"]),
        (
            "gradient norms of the players",
            {"gradient_norm__student": 9, "gradient_norm__discriminator": 0.1, "gradient_norm__fake_score": 1},
            ["discriminator", "fake score", "student"],
        ),
        ("diversity within a class", {"probe__diversity": 0.2}, ["the data's"]),
        ("lag of the fake score", {"probe__fake_score_lag": 0.2}, ["converged"]),
    ],
)
def test_each_name_is_that_of_its_line(title: str, values: dict[str, float], names: list[str]) -> None:
    assert drawn(title, rising(**values))[1] == names


def test_the_lowest_probe_is_ringed() -> None:
    fids = {10: 9.0, 20: 2.0, 30: 4.0}
    title, _, lines = drawn("probe FID", [{"step": step, "probe/fid": fid} for step, fid in fids.items()])
    assert title == "probe FID: best 2 at 20"
    assert lines[-1].tolist() == [2.0]


def test_a_long_line_is_its_running_mean_before_its_values() -> None:
    records = [{"step": step, "real_logit": step % 2} for step in range(1, 401)]
    values, mean = drawn("logits", records)[2][:2]
    assert values.max() == 1 and values.min() == 0
    assert np.abs(mean[20:-20] - 0.5).max() < 0.05


def test_a_logarithmic_panel_leaves_out_zeros() -> None:
    records = [{"step": 1, "gradient/matching": 0.0}, {"step": 2, "gradient/matching": 10.0}]
    assert drawn("gradient at the sample", records)[2][0].tolist() == [10.0]


@pytest.mark.parametrize("largest", [1.0001, 1.3, 4.0, 30.0, 300.0, 1e9])
def test_a_logarithmic_axis_has_numbers_whatever_its_range(largest: float) -> None:
    axes = Figure(figsize=(3, 2)).add_subplot()
    axes.plot([1, 2], [1.0, largest])
    stage_charts._set_axis(axes, Panel(title="", lines={}, reading="", log=True))
    low, high = axes.get_ylim()
    assert 2 <= sum(low <= tick <= high for tick in axes.yaxis.get_majorticklocs()) <= 7


def test_names_are_pushed_apart_evenly_and_no_further() -> None:
    np.testing.assert_allclose(names_apart(np.array([0.5, 0.5]), 0.1), [0.45, 0.55])
    np.testing.assert_allclose(names_apart(np.array([0.1, 0.2, 0.9]), 0.1), [0.1, 0.2, 0.9])
    np.testing.assert_allclose(names_apart(np.array([0.5, 0.5, 0.5]), 0.1), [0.4, 0.5, 0.6], atol=1e-6)
    assert names_apart(np.array([])).shape == (0,)


def test_every_panel_says_what_is_healthy() -> None:
    assert all("Healthy: " in panel.reading for panel in stage_charts.PANELS)
    for panel in stage_charts.PANELS:
        assert all(panel.lines.values()) or len(panel.lines) == 1, "of several lines each has its name"


def test_pictures_leave_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams.copy())
    looks = Looks(fake=make_judged(), real=make_judged(seed=1))
    made = [stability_chart(rising(real_logit=1.0), theme=theme) for theme in (LIGHT, DARK)]
    made.append(weight_sheet.weight_sheet(looks, theme=DARK))
    assert all(Image.open(io.BytesIO(content)).format == "PNG" for content in made) and made[0] != made[1]
    after = dict(matplotlib.rcParams.copy())
    assert {key for key in before if key != "backend" and after[key] != before[key]} == set()


# Where the discriminator looks


def viridis(place: float) -> np.ndarray:
    return np.array(matplotlib.colormaps["viridis"](place)[:3]) * 255


def test_colours_follow_the_logarithm_with_an_even_share_in_the_middle() -> None:
    found = weight_sheet.colours(np.array([[0.0, 0.25, 0.5, 1.0, 2.0, 4.0]]), 2)[0]
    expected = [viridis(place) for place in (0, 0, 0.25, 0.5, 0.75, 1.0)]
    np.testing.assert_allclose(found, expected, atol=3)


def test_colours_reach_as_far_as_the_largest_share() -> None:
    reaches = [weight_sheet.octaves([np.array([0.1, 0.2]), np.array([share])]) for share in (0.5, 1.9, 2.0, 2.1, 16.0)]
    assert reaches == [1, 1, 1, 2, 4]


def test_shares_are_means_over_heads_times_tokens() -> None:
    judged = make_judged()
    expected = [[sum(judged.weights[n, k, h] for h in range(4)) * 16 / 4 for k in range(2)] for n in range(3)]
    np.testing.assert_allclose(judged.shares, expected, rtol=1e-6)
    np.testing.assert_allclose(judged.shares.mean(-1), 1, rtol=1e-5)


def test_entropy_is_that_of_the_training_curve() -> None:
    judged = make_judged(sharpness=2.0)
    assert judged.entropy.mean() == pytest.approx(float(token_entropy(torch.from_numpy(judged.weights))), abs=1e-6)
    weights = np.zeros((1, 2, 1, 9), np.float32)
    weights[:, 0], weights[:, 1, :, 4] = 1 / 9, 1
    both = Judged(images=judged.images[:1], logits=judged.logits[:1], weights=weights)
    np.testing.assert_allclose(both.entropy, [1, 0], atol=1e-6)
    single = Judged(images=judged.images, logits=judged.logits, weights=np.ones((3, 2, 4, 1), np.float32))
    assert single.entropy.tolist() == [1, 1] and single.grid_side == 1


def test_a_token_is_drawn_in_its_place_over_the_picture() -> None:
    weights = np.full((1, 1, 1, 16), 0.4 / 15, np.float32)
    weights[..., 6] = 0.6  # second row, third column
    images = np.zeros((1, 8, 8, 1), np.uint8)
    images[:, :, 4:] = 200
    judged = Judged(images=images, logits=np.zeros((1, 1), np.float32), weights=weights)
    sheet = weight_sheet._Sheet(Looks(fake=judged, real=judged), (), 8, LIGHT)
    cell = np.asarray(sheet._cell(judged, 0, 0), dtype=float)
    assert cell.shape == (80, 80, 3) and sheet.octaves == 4
    share, place = weight_sheet._PICTURE_SHARE, 0.5 + np.log2(9.6) / 8
    np.testing.assert_allclose(
        cell[21:39, 41:59], np.tile(share * 200 + (1 - share) * viridis(place), (18, 18, 1)), atol=2
    )
    elsewhere = (1 - share) * viridis(0.5 + np.log2(16 * 0.4 / 15) / 8)
    np.testing.assert_allclose(cell[21:39, 1:19], np.tile(elsewhere, (18, 18, 1)), atol=2)
    picture = np.asarray(sheet._cell(judged, 0, -1))
    assert picture[0, 0].tolist() == [0, 0, 0] and picture[0, 79].tolist() == [200, 200, 200]


@pytest.mark.parametrize(("layers", "outputs"), [(1, 1), (2, 2), (2, 1), (2, 5)])
def test_every_picture_has_its_logit(monkeypatch: pytest.MonkeyPatch, layers: int, outputs: int) -> None:
    """Two rows of two pictures: a mean below each picture, and a layer's own where there is one for each layer."""
    written: list[float] = []
    monkeypatch.setattr(weight_sheet._Sheet, "_write_logit", lambda _self, logit, *_: written.append(logit))
    some = make_judged(rows=2, layers=layers)
    logits = np.arange(2 * outputs, dtype=np.float32).reshape(2, outputs)
    judged = Judged(images=some.images, logits=logits, weights=some.weights)
    real = Judged(images=some.images, logits=logits + 100, weights=some.weights)
    weight_sheet.weight_sheet(Looks(fake=judged, real=real))
    block = np.array([*logits.mean(1), *(logits.T.flatten() if outputs == layers else [])])
    assert written[: 2 * len(block)] == pytest.approx([*block, *block + 100])


@pytest.mark.parametrize(("layers", "side", "rows"), [(2, 8, 32), (2, 256, 8), (6, 256, 8), (3, 64, 1)])
def test_sheets_are_small_enough_and_fit_the_page(layers: int, side: int, rows: int) -> None:
    """Noise, which does not compress, is the worst case."""
    fake, real = (make_judged(rows=rows, side=side, layers=layers, tokens=256, sharpness=3, seed=s) for s in (0, 1))
    content = weight_sheet.weight_sheet(Looks(fake=fake, real=real), ["block 1"] * layers)
    assert len(content) <= weight_sheet.MOST_BYTES
    assert Image.open(io.BytesIO(content)).width <= 920


def test_tokens_that_fill_no_square_have_no_sheet(tmp_path: Path) -> None:
    looks = Looks(fake=make_judged(tokens=17), real=make_judged(tokens=17))
    assert looks.grid_side == 0
    with pytest.raises(ValueError, match="17 tokens do not fill a square"):
        weight_sheet.weight_sheet(looks)
    save(tmp_path / "stages" / "refine", looks)
    assert report_page._weights(tmp_path, {}) == ([], [])


def save(folder: Path, looks: Looks, **changes: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {"fake": looks.fake, "real": looks.real}
    arrays = {f"{kind}_{name}": getattr(part, name) for kind, part in kinds.items() for name in weight_sheet._ARRAYS}
    np.savez_compressed(folder / "token_weights.npz", **(arrays | changes))
    return folder / "token_weights.npz"


def test_looks_are_read_as_they_were_written(tmp_path: Path) -> None:
    looks = Looks(fake=make_judged(), real=make_judged(rows=5, seed=1))
    read = read_looks(save(tmp_path, looks))
    np.testing.assert_array_equal(read.real.weights, looks.real.weights)
    np.testing.assert_array_equal(read.fake.logits, looks.fake.logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fake_images": np.zeros((3, 8, 8, 1))}, "images must be uint8"),
        ({"fake_logits": np.zeros(3)}, "logits must be numbers in 2 axes, 3 rows"),
        ({"real_logits": np.full((3, 2), np.nan)}, "logits must be finite"),
        ({"real_weights": np.zeros((4, 2, 4, 16))}, "weights must be numbers in 4 axes, 3 rows"),
        ({"real_weights": np.zeros((3, 2, 4, 16), int)}, "not int64"),
        ({"fake_weights": np.full((3, 2, 4, 16), -1.0)}, "must not be negative"),
        ({"fake_weights": np.ones((3, 2, 4, 9)) / 9}, "differ in layers, heads or tokens"),
        ({"fake_weights": np.array([object()])}, "allow_pickle=False"),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, changes: dict[str, np.ndarray], message: str) -> None:
    path = save(tmp_path, Looks(fake=make_judged(), real=make_judged()), **changes)
    with pytest.raises(ValueError, match=message):
        read_looks(path)


@pytest.mark.parametrize("damage", ["missing", "cut off", "flipped", "empty", "text"])
def test_damaged_files_are_refused(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, Looks(fake=make_judged(), real=make_judged()))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    damaged = {"cut off": content[:500], "flipped": content, "empty": b"", "text": b"no archive"}
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"."):
        read_looks(path)
