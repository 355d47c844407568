"""The commands ``smi-fast pool``: what is done with pools that are made."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smi_fast import options

if TYPE_CHECKING:
    from smi_fast.pool import Pool
    from smi_fast.schedules import Schedule

app = typer.Typer(no_args_is_help=True, help="Check and merge pools.")
_Pool = Annotated[str, typer.Argument(help="Folder or URL of a pool.")]


@app.command()
def check(pool: _Pool) -> None:
    """Read every file of a pool, and print what is missing, damaged or without a record.

    The exit code is 1 if something is.
    """
    from smi_fast.pool import Pool
    from smi_fast.pool.check import find_faults
    from smi_fast.pool.files import without_password
    from smi_fast.pool.remote import local_copy

    faults, where = 0, without_password(pool)
    with local_copy(pool) as path:
        for fault in find_faults(path):
            print(fault.replace(str(path), where))
            faults += 1
        images = len(Pool(path).records)
    print(f"{images} images in {where}: {'nothing' if faults == 0 else faults} wrong")
    raise typer.Exit(1 if faults else 0)


@app.command()
def merge(
    pools: Annotated[list[str], typer.Argument(help="Folders or URLs of two pools or more.")],
    out: Annotated[Path, typer.Option(help="Folder for the new pool.")],
) -> None:
    """Copy pools into a new one; the old ones stay.

    A merge that was interrupted goes on when it is called again.
    """
    from smi_fast.pool.merge import merge as copy
    from smi_fast.pool.remote import local_copy

    with ExitStack() as copies:
        _present(copy([copies.enter_context(local_copy(pool)) for pool in pools], out))


def migrate(
    pool: Annotated[Path, typer.Argument(help="A pool of the first version, with manifest.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the new pool.")],
) -> None:
    """Copy a pool of an older version into one of this version; the old one stays."""
    from smi_fast.pool.migrate import migrate as copy

    _present(copy(pool, out))


def _present(pool: Pool) -> None:
    """Draw the pictures of a pool that was copied, and print where they are."""
    from smi_fast.pool import CONTACT_SHEET
    from smi_fast.pool.pictures import draw_loss, draw_sheet

    images = len(pool.records)
    if images:
        draw_sheet(pool)
    draw_loss(pool)
    print(f"{images} images in {pool.where}; look at {pool.where}/{CONTACT_SHEET}")


def summarise(pool: Pool, schedule: Schedule) -> None:
    """Print what the teacher and the judge see in a pool, and draw its contact sheet."""
    from smi_fast.pool import CONTACT_SHEET
    from smi_fast.pool.pictures import draw_sheet

    records = pool.records
    right = sum(record["prediction"] == record["label"] for record in records) / len(records)
    confidence = sum(record["confidence"] for record in records) / len(records)
    seen = "whole images" if not schedule.at else f"{len(records[0]['kept'])} kept patches of each"
    print(
        f"{len(records)} images in {pool.where}: of the {seen}, the teacher sees "
        f"the wanted class in {right:.1%}, at a mean confidence of {confidence:.3f}"
    )
    if "judge" in records[0]:
        agreed = sum(record["judge"] == record["class_name"] for record in records) / len(records)
        print(f"an independent judge sees it in {agreed:.1%} of the whole images")
    draw_sheet(pool)
    print(f"look at {pool.where}/{CONTACT_SHEET}")


def export(
    pool: _Pool,
    layout: Annotated[
        str,
        typer.Option(
            help="shards: safetensors files of kept patches, for smi_fast's SparseImageDataset; "
            "imagenet: a folder for each class; webdataset: tar files."
        ),
    ],
    out: Annotated[Path, typer.Option(help="A missing or empty folder.")],
    teacher: Annotated[
        str | None,
        typer.Option(help="Whose logits shards have: fashion-canvas, or a ViT of timm."),
    ] = None,
    checkpoint: options.Checkpoint = None,
) -> None:
    """Copy a pool into the layout of another tool; the pool stays."""
    from smi_fast.pool import Pool
    from smi_fast.pool.export import export_imagenet, export_webdataset
    from smi_fast.pool.remote import local_copy
    from smi_fast.pool.shards import write_shards
    from smi_fast.zoo import load_teacher

    with options.wrong_options():
        layouts = {"imagenet": export_imagenet, "webdataset": export_webdataset}
        if layout not in (*layouts, "shards"):
            raise ValueError(f"expected --layout shards, {', '.join(layouts)}, got {layout!r}")
        if teacher is not None and layout != "shards":
            raise ValueError(f"expected --layout shards with --teacher, got {layout!r}")
        if checkpoint is not None and teacher is None:
            raise ValueError("expected --teacher with --checkpoint, got none")
        model = None if teacher is None else load_teacher(teacher, checkpoint)
        with local_copy(pool) as path:
            if layout == "shards":
                write_shards(path, out, model)
            else:
                layouts[layout](path, out)
            images = len(Pool(path).records)
    print(f"{images} images in {out}")


def report(pool: _Pool) -> None:
    """Write one page of HTML about a pool, with its images in it."""
    from smi_fast.pool.files import without_password
    from smi_fast.pool.layout import PAGE
    from smi_fast.pool.page import write_page
    from smi_fast.pool.remote import local_copy

    with local_copy(pool, bring_back=PAGE) as path:
        write_page(path)
    print(f"look at {without_password(pool)}/{PAGE}")
