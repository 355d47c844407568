"""What takes longer than in an earlier run on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# By how much a time must grow to be called slower: less is within what a GPU's clock does.
SLOWER = 1.1
# What is measured; everything else in a line names it.
TIMES = ("milliseconds", "replayed", "seconds")
# What may differ between two runs of the same thing.
IGNORED = ("iterations", "failed", "not_timed", "failures", "problems", "loss")

Name = tuple[tuple[str, str], ...]


class NotComparable(Exception):
    """A file isn't one that such a run wrote."""


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of an earlier run; a last one that was cut off is left out.

    Raises:
        NotComparable: there is no such file, or it has no line about the machine.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    lines = [line for line in map(_parsed, text.splitlines()) if isinstance(line, dict)]
    if not any(line.get("kind") == "machine" for line in lines):
        raise NotComparable(f"expected a file of figures to compare with, got {path}")
    return lines


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def sentences(old: Iterable[dict[str, Any]], new: Iterable[dict[str, Any]]) -> Iterator[str]:
    """One sentence for each time that has grown, and for each that there no longer is."""
    before, now = _times(old), _times(new)
    yield f"{len(before.keys() & now.keys())} times are in both files"
    for name, milliseconds in before.items():
        words = " ".join(f"{key}={value}" for key, value in name)
        if name not in now:
            yield f"no longer timed: {words}"
        elif now[name] > SLOWER * milliseconds:
            ratio = now[name] / milliseconds
            yield f"{ratio:.2f} times as long: {words}: {now[name]:.4g} after {milliseconds:.4g}"


def _times(lines: Iterable[dict[str, Any]]) -> dict[Name, float]:
    """Each time of each line, under all that names it."""
    found = {}
    for line in lines:
        if line.get("kind") != "time":
            continue
        skipped = (*TIMES, *IGNORED, "kind")
        name = [
            (key, str(value))
            for key, value in line.items()
            if key not in skipped and not isinstance(value, (dict, list, float))
        ]
        for measure in TIMES:
            value = line.get(measure)
            each = value if isinstance(value, dict) else {"": value}
            for way, number in each.items():
                if isinstance(number, (int, float)):
                    own = [("way", way)] if way else []
                    found[tuple(sorted([*name, *own, ("measure", measure)]))] = float(number)
    return found
