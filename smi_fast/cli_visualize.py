"""``smi-fast visualize``: images of an encoder's neurons."""

from __future__ import annotations

import signal
import sys
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import typer

from smi_fast import options


def visualize(
    block: Annotated[int, typer.Option(help="Block, from 0; from the end when negative.")],
    out: options.Out,
    teacher: Annotated[
        str, typer.Option(help="fashion-canvas, or a ViT of timm, with a head or without.")
    ] = "fashion-canvas",
    checkpoint: options.Checkpoint = None,
    channels: Annotated[
        str | None, typer.Option(help="Channels, such as 0-15 or 3,17,20-24; by default 0-15.")
    ] = None,
    directions: Annotated[
        Path | None,
        typer.Option(help="Directions in place of channels: a matrix [n, width], .npy."),
    ] = None,
    where: Annotated[
        str,
        typer.Option(
            help="mlp_hidden, the hidden layer of the block's MLP; tokens, the patches behind the "
            "block; class_token, the class token behind it."
        ),
    ] = "mlp_hidden",
    kind: Annotated[
        str,
        typer.Option(
            help="dense: whole images; sparse: 47 % of the patches, those that the neuron depends "
            "on most; both: one of each."
        ),
    ] = "both",
    iterations: Annotated[int, typer.Option(min=1, help="Optimiser iterations.")] = 100,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Number of neurons inverted together.")
    ] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of noise and jitter, below 2**64.")] = 0,
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    background: Annotated[
        str,
        typer.Option(help="What sparse images show around their patches, as for invert."),
    ] = "mean",
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
) -> None:
    """Make images of an encoder's neurons: of channels, or of directions."""
    import torch

    from smi_fast.fill import Interrupted
    from smi_fast.pool import CONTACT_SHEET
    from smi_fast.pool.pictures import draw_sheet
    from smi_fast.pool.remote import pool_type
    from smi_fast.provenance import describe
    from smi_fast.teacher import SparseViT
    from smi_fast.visualize import KINDS, inverters, load_directions, neuron_names, rehearse
    from smi_fast.visualize import visualize as add_images
    from smi_fast.zoo import load_teacher

    # As in invert, everything that can be wrong is tried before --overwrite deletes a pool.
    with options.wrong_options():
        if resume and overwrite:
            raise ValueError("expected --resume or --overwrite, got both")
        if channels is not None and directions is not None:
            raise ValueError("expected --channels or --directions, got both")
        if kind not in (*KINDS, "both"):
            raise ValueError(f"expected --kind {', '.join(KINDS)} or both, got {kind!r}")
        options.check_most("--seed", seed, options.MOST_SEED)
        options.check_most("--iterations", iterations, options.MOST_ITERATIONS)
        shown = options.parse_background(background)
        where_to = options.parse_device(device)
        if directions is None:
            ranges = options.parse_classes("0-15" if channels is None else channels)
            options.check_most("--channels", sum(map(len, ranges)), options.MOST_IMAGES)
            neurons = torch.tensor([number for numbers in ranges for number in numbers])
        else:
            neurons = load_directions(directions)
        encoder = SparseViT(load_teacher(teacher, checkpoint).to(where_to), backend=backend)
        makers = inverters(
            encoder,
            block,
            where,
            kinds=KINDS if kind == "both" else (kind,),
            iterations=iterations,
            backend=backend,
        )
        neurons = neurons.to(encoder.device)
        rehearse(makers, neurons)
        names = neuron_names(neurons, block % encoder.depth, where)
    described = [describe(maker) for maker in makers.values()]
    settings = {
        "teacher": teacher,
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "directions_sha256": None
        if directions is None
        else sha256(directions.read_bytes()).hexdigest(),
        "block": block % encoder.depth,
        "where": where,
        "kind": kind,
        "batch_size": batch_size,
        "seed": seed,
        **described[0],
        "schedule": [each["schedule"] for each in described],
    }
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # from __main__
        signal.signal(signal.SIGINT, signal.default_int_handler)
    kind_of_pool = pool_type(out)
    make = kind_of_pool.resume if resume else partial(kind_of_pool.create, overwrite=overwrite)
    with make(out, settings, names, background=shown) as pool:
        try:
            add_images(pool, makers, neurons, batch_size=batch_size, seed=seed, progress=not quiet)
        except Interrupted as stopped:
            print(stopped, file=sys.stderr)
            raise typer.Exit(130) from None
        draw_sheet(pool)
        for each in makers:
            found = [r["activation"] for r in pool.records if r["kind"] == each]
            print(f"{each}: {len(found)} images, mean activation {sum(found) / len(found):.3g}")
        print(f"look at {pool.where}/{CONTACT_SHEET}")
