"""The commands ``smi-fast pool``: what is done with pools that are made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Check and merge pools.")
_Pool = Annotated[Path, typer.Argument(help="Folder of a pool.")]


@app.command()
def check(pool: _Pool) -> None:
    """Read every file of a pool, and print what is missing, damaged or without a record.

    The exit code is 1 if something is.
    """
    from smi_fast.pool import Pool
    from smi_fast.pool.check import find_faults

    faults = 0
    for fault in find_faults(pool):
        print(fault)
        faults += 1
    images = len(Pool(pool).records)
    print(f"{images} images in {pool}: {'nothing' if faults == 0 else faults} wrong")
    raise typer.Exit(1 if faults else 0)


@app.command()
def merge(
    pools: Annotated[list[Path], typer.Argument(help="Folders of two pools or more.")],
    out: Annotated[Path, typer.Option(help="Folder for the new pool.")],
) -> None:
    """Copy pools into a new one; the old ones stay.

    A merge that was interrupted goes on when it is called again.
    """
    from smi_fast.pool import CONTACT_SHEET
    from smi_fast.pool.merge import merge as copy
    from smi_fast.pool.pictures import draw_loss, draw_sheet

    made = copy(pools, out)
    images = len(made.records)
    if images:
        draw_sheet(made)
    draw_loss(made)
    print(f"{images} images in {out}; look at {out / CONTACT_SHEET}")
