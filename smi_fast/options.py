"""Options of the command: from text to values, and their bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

# The jitter and the loss of each iteration are held in memory, the record of each image too.
MOST_ITERATIONS = MOST_IMAGES = 1_000_000
MOST_SEED = 2**64 - 1

# What several commands take.
Checkpoint = Annotated[
    Path | None, typer.Option(help="Weights of a timm teacher, .safetensors or .pth.")
]
Out = Annotated[
    str,
    typer.Option(
        help="Folder for the images; or a URL such as s3://bucket/pool or sftp://host/pool, with "
        "fsspec's package for it."
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto takes a GPU if there is one.")]
Backend = Annotated[str, typer.Option(help="Implementation of the ops, see smi-fast info.")]
Precision = Annotated[
    str,
    typer.Option(help="Of the teacher's products: float32, bfloat16, or tf32 on a GPU, see info."),
]
MaxBatch = Annotated[
    int | None,
    typer.Option(help="Most images of a batch that the teacher computes at once; by default all."),
]
Finish = Annotated[
    float | None,
    typer.Option(
        help="Probability of its class, such as 0.9, that an image must have in 20 iterations "
        "in a row to be finished early. With --max-batch others then take its place."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an unfinished pool.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing pool.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only the result and errors.")]


class CommandError(Exception):
    """What the user can mend; the message says what was expected and what came."""


@contextmanager
def wrong_options() -> Iterator[None]:
    """Turn a ValueError into a CommandError, where it says which option has a wrong value."""
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error


def parse_background(text: str) -> str | tuple[float, ...]:
    """Parse what a pool shows in place of stopped patches.

    >>> parse_background("255,0,51")
    (1.0, 0.0, 0.2)

    Args:
        text: "mean", "blurred", "black", or red, green and blue in 0..255.

    Raises:
        ValueError: other text.
    """
    if text in ("mean", "blurred", "black"):
        return text
    found = re.fullmatch(",".join(3 * ["([0-9]{1,3})"]), text.replace(" ", ""))
    values = [] if found is None else [int(value) for value in found.groups()]
    if not values or max(values) > 255:
        raise ValueError(
            f"expected --background mean, blurred, black, or R,G,B such as 255,128,0, got {text!r}"
        )
    return tuple(value / 255 for value in values)


def check_most(option: str, value: int, most: int) -> None:
    """Refuse a value above ``most``.

    Raises:
        ValueError: it is above; the message names the option.
    """
    if value > most:
        raise ValueError(f"expected {option} of at most {most}, got {value}")


def parse_classes(text: str) -> list[range]:
    """Parse classes such as "3,17,20-24" into ranges, in the same order.

    >>> parse_classes("3,20-24")
    [range(3, 4), range(20, 25)]

    Raises:
        ValueError: other text, or a range that descends.
    """
    found = [
        re.fullmatch("([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip()) for part in text.split(",")
    ]
    pairs = [(int(m[1]), int(m[2] or m[1])) for m in found if m is not None]
    if len(pairs) < len(found) or any(first > last for first, last in pairs):
        raise ValueError(f"expected classes such as 0-9 or 3,17,20-24, got {text!r}")
    return [range(first, last + 1) for first, last in pairs]


def labels(ranges: list[range], classes: int, per_class: int) -> list[int]:
    """The class of each image of a pool, checked before the list is made.

    >>> labels([range(3, 4), range(7, 9)], classes=10, per_class=2)
    [3, 3, 7, 7, 8, 8]

    Args:
        ranges: the wanted classes.
        classes: number of the teacher's classes.
        per_class: number of images of each wanted class.

    Raises:
        ValueError: a class that the teacher doesn't have, or more than :data:`MOST_IMAGES` images.
    """
    last = max(numbers[-1] for numbers in ranges)
    if last >= classes:
        raise ValueError(f"expected classes in 0..{classes - 1}, got {last}")
    images = sum(map(len, ranges)) * per_class
    if images > MOST_IMAGES:
        raise ValueError(f"expected at most {MOST_IMAGES} images, got {images}")
    return [label for numbers in ranges for label in numbers for _ in range(per_class)]


def parse_device(name: str) -> str:
    """The device that a name asks for; for "auto" the GPU if there is one.

    Among processes of torchrun, "auto" gives each process of a machine a GPU of its own.

    Raises:
        ValueError: another name, or a GPU that isn't visible.
    """
    import torch

    if name == "auto":
        number = os.environ.get("LOCAL_RANK")
        name = "cuda" if number is None else f"cuda:{number}"
        name = name if torch.cuda.is_available() else "cpu"
    found = re.fullmatch("cuda(?::([0-9]{1,3}))?", name)
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name != "cpu" and (found is None or int(found[1] or 0) >= visible):
        raise ValueError(f"expected device auto, cpu or a visible cuda device, got {name!r}")
    return name
