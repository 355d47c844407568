"""Several pools as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from smi_fast.pool.batch import Encoded, fingerprint
from smi_fast.pool.files import PoolError, explained
from smi_fast.pool.layout import FOLDERS, METADATA, PROGRESS, files_of, picture_name
from smi_fast.pool.metadata import Record, read_seconds, to_line, to_record
from smi_fast.pool.pool import Pool

# What must be the same in all pools.
_SHARED = ("format", "class_names", "background")


def merge(pools: Sequence[str | Path], out: str | Path) -> Pool:
    """Copy pools into one, with their images in the order of the arguments.

    The files of the images stay as they are, but for their numbers. Settings in which the pools
    differ are listed under ``merged``, so that the new pool can't be mistaken for one of them. A
    merge that was interrupted goes on when it is called again.

    Args:
        pools: folders of two pools or more, which stay as they are.
        out: a missing or empty folder, or what an interrupted merge of these pools left.

    Returns:
        the new pool, closed.

    Raises:
        PoolError: fewer than two pools or one of them twice, pools of other classes or backgrounds,
            an image that isn't what was written, or a folder that can't be read or written.
    """
    paths = [Path(path) for path in pools]
    if len({path.resolve() for path in (*paths, Path(out))}) <= max(len(paths), 2):
        names = ", ".join(map(str, (*paths, out)))
        raise PoolError(f"expected two pools or more and another folder for --out, got {names}")
    settings = [Pool(path).settings for path in paths]
    for key in _SHARED:
        for path, each in zip(paths, settings, strict=True):
            if each[key] != settings[0][key]:
                raise PoolError(
                    f"expected pools of the same {key}, got others in {paths[0]} and {path}"
                )
    common, background = _merged(settings), settings[0]["background"]
    with Pool.resume(out, common, settings[0]["class_names"], background=background) as made:
        held, start, batch, trajectory = made.records, 0, 0, 0
        for path in paths:
            found = Pool(path)
            records, loss, seconds = found.records, found.loss, read_seconds(path)
            for number, group in groupby(records, key=lambda record: record["batch"]):
                old = list(group)
                new = _renumbered(old, start, batch, trajectory, made.settings["class_names"])
                if start < len(held):
                    _check_held(made.path, held[start : start + len(new)], new)
                else:
                    pictures = dict(_files(path, old, new))
                    encoded = Encoded(pictures, [to_line(record) for record in new])
                    made.add_encoded(encoded, loss=loss, seconds=seconds.get(number))
                start, batch = start + len(new), batch + 1
            trajectory += max((record.get("trajectory", -1) for record in records), default=-1) + 1
    return made


def _merged(settings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The settings that all have, and those in which they differ under ``merged``."""
    keys = dict.fromkeys(key for each in settings for key in each)
    first = settings[0]
    same = {key for key in keys if all(key in each for each in settings)}
    same = {key for key in same if all(each[key] == first[key] for each in settings)}
    common = {key: first[key] for key in keys if key in same and key not in _SHARED}
    others = [{key: value for key, value in each.items() if key not in same} for each in settings]
    return {**common, "merged": others}


def _renumbered(
    records: Sequence[Record], start: int, batch: int, trajectory: int, names: Sequence[str]
) -> list[Record]:
    """The records of a batch, with other numbers and files."""
    found = []
    for index, record in enumerate(records, start):
        own = {**files_of(index, record["label"], len(names)), "index": index, "batch": batch}
        if "trajectory" in record:
            own["trajectory"] = record["trajectory"] + trajectory
        found.append({**record, **own})
    return found


def _check_held(path: Path, held: Sequence[Record], new: Sequence[Record]) -> None:
    if list(held) != [to_record(to_line(record)) for record in new]:
        raise PoolError(
            f"{path / METADATA} has images of other pools: choose another folder for --out"
        )


def _files(path: Path, old: Sequence[Record], new: Sequence[Record]) -> Iterator[tuple[str, bytes]]:
    """The pictures of a batch in the pool of ``path``, by their new names."""
    for before, after in zip(old, new, strict=True):
        contents = []
        for key in FOLDERS:
            with explained(f"reading {path / before[key]}"):
                contents.append((path / before[key]).read_bytes())
            yield after[key], contents[-1]
        if "sha256" in before and fingerprint(contents) != before["sha256"]:
            raise PoolError(
                f"the files of image {before['index']} of {path} are not those that were written, "
                "by their hash"
            )
        strip = path / PROGRESS / picture_name(before["index"])
        with explained(f"reading {strip}"):
            if strip.exists():
                yield f"{PROGRESS}/{picture_name(after['index'])}", strip.read_bytes()
