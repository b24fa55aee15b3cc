"""The command line. Every command is thin: it loads a recipe, calls one function, and explains a user's mistake."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines.stores import redact

if TYPE_CHECKING:
    from rich.console import Console

    from pipelines.features import FeatureTask
    from pipelines.recipe import Recipe
    from pipelines.run import Run

_RUN_DIR = "Directory or URL, such as s3://BUCKET/runs/NAME, that everything is kept in. [default: runs/NAME]"


class _Location(click.ParamType[Path]):
    """A local path, or a URL."""

    name = "path"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from pipelines.storage import located

        return located(value)


class _Commands(click.Group):
    """Turns a user's mistake, a `ValueError`, into its message and exit code 2; anything else stays a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nstopped. The same command goes on from the last checkpoint.", err=True)
            sys.exit(130)
        except (FloatingPointError, ChildProcessError) as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except ValueError as error:
            click.echo(f"error: {redact(str(error))}", err=True)
            sys.exit(2)
        except Exception as error:
            from pipelines.storage import failure

            if (reason := failure(error)) is None:
                raise
            click.echo(f"error: {reason}. Nothing finished is lost: run the same command again", err=True)
            sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="hdistill", prog_name="hdistill")
def main() -> None:
    """Distil a slow diffusion or flow model into a generator of one to five steps, and measure what was lost.

    Start with `hdistill run digits`: it needs no GPU, no account and no network, and takes minutes.

    RECIPE is the name of a recipe that ships with the package (`hdistill recipes` lists them), or the path of a YAML
    file of your own.
    """


def _reads_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """The argument RECIPE, and the option that changes it."""

    @click.argument("recipe")
    @click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one field; may be repeated.")
    @functools.wraps(command)
    def wrapped(recipe: str, settings: tuple[str, ...], **options: Any) -> None:
        from pipelines import recipe as recipes

        command(recipe=recipes.load(recipe, settings), **options)

    return wrapped


def _with_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """What every command takes that works in a run directory."""

    @_reads_recipe
    @click.option("--run-dir", type=_Location(), help=_RUN_DIR)
    @functools.wraps(command)
    def wrapped(recipe: "Recipe", run_dir: Path | None, **options: Any) -> None:
        command(recipe=recipe, run_dir=run_dir or Path("runs") / recipe.name, **options)

    return wrapped


def _console() -> "Console":
    from rich.console import Console

    return Console()


def _open(recipe: "Recipe", run_dir: Path) -> "Run":
    from pipelines.artifacts import RunDir
    from pipelines.process import prepare_process
    from pipelines.run import Run

    prepare_process()
    return Run(recipe, RunDir.create(run_dir), _console())


@main.command()
@_with_recipe
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe, the plan and its cost; do nothing.")
def run(recipe: "Recipe", run_dir: Path, dry_run: bool) -> None:
    """Do everything that RECIPE says: precompute, train each stage, evaluate, report.

    What is finished in the run directory is reused; what was interrupted goes on from its last checkpoint.
    """
    if dry_run:
        from pipelines.plan import print_plan

        print_plan(recipe, run_dir, _console())
        return
    from pipelines.process import process_started
    from pipelines.report import print_table

    job = _open(recipe, run_dir)
    job.say(f"[bold]{recipe.name}[/] in {run_dir}")
    report = job.execute(process_started())
    print_table(report, job.console, run_dir=run_dir)


@main.command()
@_reads_recipe
@click.option("--run-dir", help="Directory or URL that every machine of the cluster can write. [default: runs/NAME]")
@click.option("--address", required=True, help="Address of the cluster's dashboard, such as http://127.0.0.1:8265.")
@click.option("--no-wait", is_flag=True, help="Only start it; else its log is shown until it ends.")
@click.option("--no-code", is_flag=True, help="Use the hdistill that the cluster has; else this one is sent along.")
def submit(recipe: "Recipe", run_dir: str | None, address: str, no_wait: bool, no_code: bool) -> None:
    """Run RECIPE as a job on a Ray cluster, as `hdistill run` does here.

    RECIPE and its settings are checked before anything is sent. Ctrl-C stops the watching and not the job. The same
    command again goes on from what is finished in the run directory. docs/cluster.md says how to get a cluster.
    """
    from pipelines.submit import shared_path
    from pipelines.submit import submit as send

    where = shared_path(run_dir or f"runs/{recipe.name}")
    sys.exit(send(recipe, where, address, _console(), wait=not no_wait, send_code=not no_code))


@main.command()
@_reads_recipe
def teacher(recipe: "Recipe") -> None:
    """Train the teacher of RECIPE from its data, as its teacher_training says, into its teacher.path.

    A half-trained one goes on from its last checkpoint.
    """
    from pipelines.process import prepare_process
    from pipelines.teacher_training import teach

    prepare_process()
    teach(recipe.teacher.path, recipe.data, recipe.teacher_training, recipe.seed, _console())


@main.command()
@_reads_recipe
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make. Its name names the net.")
@click.option("--task", type=click.Choice(["classes", "denoise"]), default="classes", show_default=True, help="Task.")
@click.option("--seed", type=int, help="Seed of the training. [default: the recipe's]")
@click.option("--steps", type=int, help="Iterations. [default: 2000]")
def features(recipe: "Recipe", out: Path, task: "FeatureTask", seed: int | None, steps: int | None) -> None:
    """Train a net whose features FID is measured by, on the training images of RECIPE.

    classes: a classifier. denoise: a net that rebuilds pictures from their noisy selves; it needs no classes.
    """
    from pipelines.feature_training import FeatureTraining, learn
    from pipelines.process import prepare_process

    prepare_process()
    training = FeatureTraining() if steps is None else FeatureTraining(num_steps=steps)
    learn(out, recipe.data, task, training, recipe.seed if seed is None else seed, _console())


@main.command()
@_with_recipe
def precompute(recipe: "Recipe", run_dir: Path) -> None:
    """Only make the teacher trajectories (and image shards) of RECIPE."""
    _open(recipe, run_dir).partial(lambda job: job.prepare_shards())


@main.command()
@_with_recipe
@click.option("--stage", "stages", multiple=True, help="Train only this stage and those it starts from; repeatable.")
def train(recipe: "Recipe", run_dir: Path, stages: tuple[str, ...]) -> None:
    """Only train the stages of RECIPE, making the trajectories first where they are missing."""
    for stage in stages:
        recipe.require_stage(stage)
    _open(recipe, run_dir).partial(lambda job: job.train_stages(stages))


@main.command()
@_with_recipe
def evaluate(recipe: "Recipe", run_dir: Path) -> None:
    """Only measure what is trained in the run directory, and the teacher, and report."""
    from pipelines.report import print_table

    job = _open(recipe, run_dir)
    report = job.partial(lambda job: job.report(job.evaluate()))
    print_table(report, job.console, run_dir=run_dir)


@main.command()
@click.argument("space")
@_reads_recipe
@click.option("--run-dir", type=_Location(), help="Directory of the sweep. [default: runs/NAME-SPACE]")
@click.option("--stage", default="", help="The stage that is searched. [default: the first that fits]")
@click.option("--trials", default=30, show_default=True, help="Trials that the sampler draws.")
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "cma_es", "random"]),
    default="tpe",
    show_default=True,
    help="What draws trials.",
)
@click.option("--scheduler", type=click.Choice(["none", "asha", "median", "pbt"]), default="none", show_default=True,
              help="What stops weak trials early, or (pbt) puts copies of strong ones in their place.")  # fmt: skip
@click.option(
    "--metric", default="probe/fid", show_default=True, help="What trials are scored by: also probe/diversity."
)
@click.option("--rungs", default=4, show_default=True, help="How often a trial is scored, its end included.")
@click.option("--samples", default=2000, show_default=True, help="Samples behind a score.")
@click.option("--score-seeds", default=1, show_default=True, help="Trainings behind a score, which is their mean.")
@click.option("--random", "num_random", default=0, show_default=True, help="Trials by chance alone, to compare with.")
@click.option("--finalists", default=3, show_default=True, help="Best trials that meet the baselines at fresh seeds.")
@click.option("--seeds", default=3, show_default=True, help="How many of those seeds.")
@click.option("--slots", type=int, help="Trials side by side. [default: as many as there is room for]")
@click.option("--cpus-per-trial", default=1.0, show_default=True, help="CPUs of each.")
@click.option("--gpus-per-trial", default=0.0, show_default=True, help="GPUs of each; may be a fraction.")
def tune(space: str, recipe: "Recipe", run_dir: Path | None, **asked: Any) -> None:
    """Search SPACE with RECIPE: baselines, a search, the best of both at fresh seeds, the winner as a recipe.

    SPACE is awd_weighting, dmd_balance, meanflow_sampler, sfd_schedule, or a YAML file of your own (docs/tuning.md).
    Trials share what comes before the searched stage. What was interrupted goes on when the same command is given
    again: no trial is lost or run twice.
    """
    from pipelines.process import prepare_process
    from pipelines.tuning.command import tune as search

    prepare_process()
    search(space, recipe, run_dir or Path("runs") / f"{recipe.name}-{Path(space).stem}", _console(), **asked)


@main.command()
@click.argument("pictures")
@click.argument("reference")
@click.option("--features", default="inception", show_default=True, help="Feature net, as in evaluate.features.")
@click.option("--clip", default="", help="CLIP model for the CLIP score, as in evaluate.clip: a folder or a hub name.")
@click.option("--captions", type=click.Path(path_type=Path), help="JSON of what each picture shows, for --clip.")
@click.option("--by-category", is_flag=True, help="Score each first folder below by itself, too, as MJHQ-30K does.")
@click.option("--neighbours", default=5, show_default=True, help="For precision and recall.")
@click.option("--pairs", default=10_000, show_default=True, help="Most pictures of a side compared pair by pair.")
@click.option("--actors", default=0, show_default=True, help="Processes that work side by side; 0: this one.")
@click.option("--gpus-per-actor", default=0.0, show_default=True, help="GPUs of each; may be a fraction.")
@click.option("--cache", type=click.Path(path_type=Path), help="Where features are kept. [default: ~/.cache/hdistill]")
@click.option("--out", type=click.Path(path_type=Path), help="A JSON file to write, too.")
def score(actors: int, gpus_per_actor: float, cache: Path | None, out: Path | None, **asked: Any) -> None:
    """Score a folder of PICTURES against REFERENCE: FID, KID, precision, recall, density, coverage, inception score.

    REFERENCE is a folder, an npz file of mu and sigma, or a set that clean-fid publishes, such as cifar10/train/32.
    Numbers are clean-fid's own, each with its 95% interval. With --clip, how well PICTURES fit their captions, too:
    those of --captions, those beside PICTURES, or those beside the REFERENCE's pictures of the same names.
    """
    from pipelines.artifacts import write_text
    from pipelines.cache import cache_folder
    from pipelines.process import prepare_process
    from pipelines.production import Actors
    from pipelines.score import Asked, print_score, to_json
    from pipelines.score import score as scored

    prepare_process()
    processes = Actors(count=actors, cpus=1.0, gpus=gpus_per_actor)
    result = scored(Asked(actors=processes, cache=cache or cache_folder("features"), **asked), _console())
    print_score(result, _console())
    if out:
        write_text(out, to_json(result))


@main.command()
@_with_recipe
@click.option("--stage", required=True, help="The trained stage to sample.")
@click.option("--num", default=64, show_default=True, help="How many pictures.")
@click.option("--label", type=int, help="Class of all of them. [default: drawn for each]")
@click.option("--prompt", "prompts", multiple=True, help="Text, for a teacher that reads it; --num pictures of each.")
@click.option("--steps", type=int, help="Steps, of a student that is told of them (SFD-v). [default: the stage's own]")
@click.option("--guidance", "guidance_scale", default=1.0, show_default=True, help="Any but 1 costs double.")
@click.option("--seed", default=0, show_default=True, help="Seed of the noises and labels.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("samples"), show_default=True, help="Where to.")
def sample(recipe: "Recipe", run_dir: Path, stage: str, **options: Any) -> None:
    """Draw pictures from a trained stage: one PNG each, and a sheet of all."""
    from pipelines.artifacts import RunDir
    from pipelines.process import prepare_process
    from pipelines.run import Run
    from pipelines.sample import draw

    prepare_process()
    draw(Run(recipe, RunDir(run_dir), _console()), stage, **options)


@main.command()
@_with_recipe
@click.option("--stage", required=True, help="The trained stage to export.")
@click.option("--steps", type=int, help="Steps, of a student that is told of them (SFD-v). [default: the stage's own]")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make.")
def export(recipe: "Recipe", run_dir: Path, stage: str, steps: int | None, out: Path) -> None:
    """Write a trained stage as a folder that stock diffusers loads and samples, with a model card."""
    from pipelines.artifacts import RunDir
    from pipelines.export import export as write
    from pipelines.process import prepare_process
    from pipelines.run import Run

    prepare_process()
    write(Run(recipe, RunDir(run_dir), _console()), stage, out, steps)


@main.command()
@_reads_recipe
def flops(recipe: "Recipe") -> None:
    """Count multiply-adds and estimate memory of every phase of RECIPE, without weights, network or GPU."""
    from pipelines.flops import print_costs

    print_costs(recipe, _console())


@main.command()
@click.argument("run_dir", type=_Location())
def report(run_dir: Path) -> None:
    """Print the table of RUN_DIR again, and rebuild its pictures and report.html."""
    from pipelines.report import print_table, rebuild

    print_table(rebuild(run_dir), _console(), run_dir=run_dir)


@main.command()
@click.argument("runs", nargs=-1, type=_Location(), metavar="RUN_DIR...")
@click.option("--query", help="Runs of the tracking store, in MLflow's words: \"tags.recipe = 'digits'\".")
@click.option("--store", default="runs/mlflow.db", show_default=True, help="The tracking store of --query.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/compare"), show_default=True, help="Folder.")
def compare(runs: tuple[Path, ...], query: str | None, store: str, out: Path) -> None:
    """Put finished runs side by side: who leads at each number of calls, what differs, what it cost.

    RUN_DIR is a run directory or its URL. Writes compare.html, which can be sent on, compare.json and figures.
    MLFLOW_TRACKING_URI, where it is set, comes before --store.
    """
    from pipelines.compare import compare_runs

    compare_runs(runs, query, Path(store), out, _console())


@main.command()
@click.option("--store", default="runs/mlflow.db", show_default=True, help="The tracking store of the run directories.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to serve on.")
@click.option("--port", default=5000, show_default=True, help="Port to serve on.")
def ui(store: str, host: str, port: int) -> None:
    """Serve the MLflow page on which runs are compared, until Ctrl-C.

    MLFLOW_TRACKING_URI, where it is set, comes before --store.
    """
    from pipelines.stores import TrackConfig, tracking_uri
    from pipelines.ui import ui as serve

    serve(tracking_uri(TrackConfig(), Path(store)), host, port)


@main.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """List the recipes that ship with the package, or print the file of one."""
    from pipelines import recipe

    if name:
        click.echo(recipe.find(name).read_text(), nl=False)
        return
    for known, path in recipe.names().items():
        click.echo(f"{known:<16} {recipe.header(path).splitlines()[0]}")


@main.group()
def assets() -> None:
    """The embedded teacher and feature net."""


@assets.command()
@click.option("--out", type=click.Path(path_type=Path), help="Where to write. [default: into the package itself]")
@click.option("--seed", default=0, show_default=True, help="Seed of the training.")
def build(out: Path | None, seed: int) -> None:
    """Train the embedded digits teacher and feature net again: under 15 minutes on two cores."""
    from pipelines import assets as embedded
    from pipelines.process import prepare_process

    prepare_process()
    embedded.build(out or embedded.ASSETS, embedded.BuildConfig(seed=seed), _console())


if __name__ == "__main__":
    main()
