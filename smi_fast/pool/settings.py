"""The settings of a pool: what decides its images, and the mark that a folder is a pool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smi_fast.background import Background, check_background
from smi_fast.pool.files import PoolError, explained, unfinished_name
from smi_fast.pool.layout import FORMAT, LOCK, SETTINGS
from smi_fast.pool.metadata import from_json

Settings = dict[str, Any]
OLD_FORMAT = "smi_fast pool 1"
_FORMATS = FORMAT.removesuffix("2")
# What a process that was killed before it wrote the settings may have left.
_TRACES = {LOCK, unfinished_name(Path(SETTINGS)).name}


def make_settings(
    settings: Mapping[str, Any], class_names: Sequence[str], background: Background
) -> Settings:
    """The settings of a new pool.

    Raises:
        ValueError: no background, or no class.
    """
    check_background(background)
    if not isinstance(background, str) and len(background) != 3:
        raise ValueError(f"expected a background colour of 3 channels, got {background!r}")
    if isinstance(class_names, str) or not _are_names(list(class_names)):
        raise ValueError(f"expected the names of one class or more, got {class_names!r}")
    shown = background if isinstance(background, str) else list(background)
    return {"format": FORMAT, **settings, "background": shown, "class_names": list(class_names)}


def read_settings(path: Path) -> Settings | None:
    """The settings of the pool in ``path``, or None where there is no pool yet.

    Raises:
        PoolError: the folder holds something else than a pool, or they can't be read.
    """
    with explained(f"opening {path}"):
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    if names <= _TRACES:
        return None
    with explained(f"reading {path / SETTINGS}"):
        try:
            return parse_settings((path / SETTINGS).read_bytes(), path)
        except FileNotFoundError:
            raise not_a_pool(path) from None


def parse_settings(content: bytes, path: Path) -> Settings:
    """The settings of the pool in ``path``.

    Raises:
        ValueError: the content is damaged.
        PoolError: it isn't that of a pool, or of a pool of another version.
    """
    settings = from_json(content.decode())
    version = settings.get("format") if isinstance(settings, dict) else None
    if version == OLD_FORMAT:
        raise PoolError(
            f"{path} is a pool of an older version: smi-fast migrate {path} --out makes one of this"
        )
    if version != FORMAT and isinstance(version, str) and version.startswith(_FORMATS):
        raise PoolError(f"expected {path} to be a {FORMAT}, got the newer version {version}")
    if version != FORMAT:
        raise not_a_pool(path)
    check_background(settings.get("background"))
    if not _are_names(settings.get("class_names")):
        raise ValueError("class_names are not the names of classes")
    return dict(settings)


def is_trace(name: str) -> bool:
    """Whether a process that was killed before it wrote the settings may have left the file."""
    return name in _TRACES


def check_same(path: Path, old: Settings, new: Settings) -> None:
    """Refuse to continue the pool in ``path`` with other settings than its own.

    Raises:
        PoolError: they differ; the message names the first entry that does.
    """
    new = json.loads(json.dumps(new))
    for key in old | new:
        with explained(f"reading {path / SETTINGS}"):
            before, now = (
                json.dumps(side[key], sort_keys=True) if key in side else "nothing"
                for side in (old, new)
            )
        if before != now:
            raise PoolError(
                f"{path} can't be resumed: it was made with {key} = {before}, now it is {now}"
            )


def not_a_pool(path: str | Path) -> PoolError:
    """The error of a folder that holds something else."""
    return PoolError(
        f"{path} is not empty, and not a pool of this version, whose {SETTINGS} has "
        f'"format": "{FORMAT}": choose another folder'
    )


def _are_names(names: object) -> bool:
    return isinstance(names, list) and bool(names) and all(isinstance(name, str) for name in names)
