"""The command ``smi-fast``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smi_fast import __version__, cli_machine, cli_pool, options
from smi_fast.cli_visualize import visualize

if TYPE_CHECKING:
    from smi_fast.recipes import Recipe
    from smi_fast.schedules import Schedule

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_pool.app, name="pool")


def main() -> None:
    """Run the command.

    An error of one of this package's own classes is one sentence and exit code 2. Any other is a
    fault of the program, and keeps its traceback.
    """
    try:
        app()
    except Exception as error:
        if type(error).__module__.partition(".")[0] != __package__:
            raise
        print(f"smi-fast: {error}", file=sys.stderr)
        sys.exit(2)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"smi_fast {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Invert a frozen Vision Transformer into images, computing only the kept patches."""


@app.command()
def invert(
    out: options.Out,
    teacher: Annotated[
        str, typer.Option(help="fashion-canvas, or a ViT of timm.")
    ] = "fashion-canvas",
    checkpoint: options.Checkpoint = None,
    classes: Annotated[
        str, typer.Option(help="Wanted classes, such as 0-9 or 3,17,20-24.")
    ] = "0-9",
    per_class: Annotated[int, typer.Option(min=1, help="Number of images of each class.")] = 4,
    schedule: Annotated[
        str,
        typer.Option(
            help="recipe: the recipe's own; smi: stops at iterations 50, 100, 200, 300; "
            "smi-scaled: stops at the same fractions of --iterations as these are of 4000; once: "
            "one stop, at a tenth of them, which keeps 47 % of the patches; rebirth: --factor "
            "images of each trajectory, which share no patch; dense: no stops."
        ),
    ] = "recipe",
    factor: Annotated[
        int | None,
        typer.Option(help="Images of a trajectory of --schedule rebirth; by default 7."),
    ] = None,
    importance: Annotated[
        str,
        typer.Option(
            help="What patches are ranked by: attention, rollout, gradient or random, each also "
            "with smoothed- before it."
        ),
    ] = "attention",
    recipe: Annotated[
        str,
        typer.Option(
            help="clear: images that other networks recognise, with one stop. Published losses: "
            "smi, with its four stops; dense: deepinversion, gradvit, psaq_vit, sardfq, mimiq."
        ),
    ] = "clear",
    cnn: Annotated[
        str | None,
        typer.Option(
            help="CNN with BatchNorm, for deepinversion and gradvit: fashion-canvas, "
            "efficientnet-lite0, or a CNN of timm."
        ),
    ] = None,
    cnn_checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of a timm CNN, .safetensors or .pth.")
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser iterations; by default the recipe's, 100 for clear."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(help="Constant learning rate; by default the recipe's, 0.12 for clear."),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Number of images, or of trajectories, inverted together."),
    ] = 40,
    max_batch: options.MaxBatch = None,
    finish: options.Finish = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of noise, jitter and soft targets, below 2**64.")
    ] = 0,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    precision: options.Precision = "float32",
    graph: Annotated[
        bool, typer.Option(help="Replay iterations on a GPU from CUDA graphs, or take them singly.")
    ] = True,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Network that says what it sees in each image: fashion-canvas, for the classes of "
            "that teacher."
        ),
    ] = None,
    strip: Annotated[
        int,
        typer.Option(
            min=0, help="Number of moments of each image's progress in report/progress/; 0: none."
        ),
    ] = 0,
    background: Annotated[
        str,
        typer.Option(
            help="What masked images show in place of stopped patches: mean, the mean colour of "
            "the kept ones; blurred; black; or R,G,B in 0..255."
        ),
    ] = "mean",
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Invert classes of a teacher into a pool of images: a folder, or a URL of fsspec.

    Several processes share the batches: torchrun --nproc-per-node 8 -m smi_fast invert ...
    With --nnodes, all machines must see the folder, or --out is a URL.
    """
    from smi_fast.batch_maker import check_strip
    from smi_fast.early_finish import EarlyFinish
    from smi_fast.fill import Interrupted, Stopped, fill, rehearse
    from smi_fast.group import Group
    from smi_fast.inversion import SparseInverter
    from smi_fast.judge import check_judge, load_judge
    from smi_fast.ops import backends
    from smi_fast.pool.remote import pool_type
    from smi_fast.provenance import describe
    from smi_fast.recipes import by_name
    from smi_fast.zoo import fingerprint, label_names, load_cnn, load_teacher

    # The pool is opened after everything that can be wrong has been tried, because --overwrite
    # deletes the old one.
    with options.wrong_options():
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        group = Group.of_torchrun()
        first = group is None or group.rank == 0
        if cnn is None and cnn_checkpoint is not None:
            raise ValueError("expected --cnn with --cnn-checkpoint, got none")
        options.check_most("--seed", seed, options.MOST_SEED)
        backends.check_name(backend)
        shown = options.parse_background(background)
        where = options.parse_device(device)
        network = None if cnn is None else load_cnn(cnn, cnn_checkpoint).to(where)
        published = by_name(recipe, network)
        iterations = published.iterations if iterations is None else iterations
        options.check_most("--iterations", iterations, options.MOST_ITERATIONS)
        rate = published.lr if lr is None else lr
        published = replace(published, iterations=iterations, lr=rate)
        stops = _schedule(schedule, published, factor)
        ranges = options.parse_classes(classes)
        model = load_teacher(teacher, checkpoint).to(where)
        chosen = {
            "importance": importance,
            "max_batch": max_batch,
            "finish": None if finish is None else EarlyFinish(finish),
            "backend": backend,
            "precision": precision,
            "graph": graph,
        }
        inverter = SparseInverter(model, **published.options(schedule=stops, **chosen))
        labels = options.labels(ranges, inverter.teacher.num_classes, per_class)
        names = label_names(model) or [str(i) for i in range(inverter.teacher.num_classes)]
        check_strip(strip, inverter)
        independent = None if judge is None else load_judge(judge)
        if independent is not None:
            check_judge(independent, names)
        rehearse(inverter, published)
    quiet = quiet or not first
    if not quiet:
        print(published)
    settings = {
        "teacher": teacher,
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "classes": classes,
        "per_class": per_class,
        "batch_size": batch_size,
        "seed": seed,
        "recipe": recipe,
        "cnn": cnn,
        "cnn_checkpoint": None if cnn_checkpoint is None else cnn_checkpoint.name,
        "cnn_sha256": None if network is None else fingerprint(network),
        "soft_targets": published.soft,
        **describe(inverter),
        "lr": rate if isinstance(rate, float) else repr(rate),
        "strip": strip,
        "judge": judge,
        "judge_sha256": None if independent is None else fingerprint(independent),
    }
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # from __main__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    resume = resume or Group.restarted()
    kind = pool_type(out)
    make = kind.resume if resume else partial(kind.create, overwrite=overwrite)
    with make(out, settings, names, background=shown) if first else kind(out) as pool:
        try:
            fill(
                pool,
                inverter,
                labels,
                recipe=published,
                batch_size=batch_size,
                seed=seed,
                judge=independent,
                strip=strip,
                provenance={"teacher": teacher, "recipe": recipe},
                progress=not quiet,
                group=group,
            )
        except Interrupted as early:
            print(early, file=sys.stderr)
            # torchrun would take another code than 0 for a failure, and start the group again.
            raise typer.Exit(0 if group and isinstance(early, Stopped) else 130) from None
        if first:
            cli_pool.summarise(pool, inverter.schedule)


# Help lists the commands in this order, behind invert.
for command in (
    visualize,
    cli_pool.report,
    cli_pool.export,
    cli_pool.migrate,
    cli_machine.info,
    cli_machine.verify,
    cli_machine.tune,
):
    app.command()(command)


def _schedule(name: str, recipe: Recipe, factor: int | None) -> Schedule:
    from smi_fast.schedules import Dense, PatchRebirth, StopSchedule

    iterations = recipe.iterations
    schedules: dict[str, Callable[[], Schedule]] = {
        "recipe": partial(recipe.schedule, iterations),
        "smi": StopSchedule,
        "smi-scaled": partial(StopSchedule.scaled, iterations),
        "once": partial(StopSchedule.once, iterations),
        "rebirth": lambda: PatchRebirth(factor or 7).bind(iterations),
        "dense": Dense,
    }
    if name not in schedules:
        raise ValueError(f"expected a schedule among {', '.join(schedules)}, got {name!r}")
    if factor is not None and name != "rebirth":
        raise ValueError(f"expected --schedule rebirth with --factor, got {name!r}")
    schedule = schedules[name]()
    last = max(schedule.at, default=0)
    if iterations <= last:
        raise ValueError(
            f"the stop at {last} is past the end of {iterations} iterations: run more of them, "
            "or take --schedule smi-scaled"
        )
    return schedule
