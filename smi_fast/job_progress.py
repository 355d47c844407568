"""How far a whole pool is: a bar in a terminal, a line per batch in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Tally:
    """What is known of some images of a pool.

    Attributes:
        images: their number.
        labels: their classes.
        confidence: sum of the teacher's confidences.
    """

    images: int = 0
    labels: frozenset[int] = field(default_factory=frozenset)
    confidence: float = 0.0

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]]) -> Tally:
        """The tally of images with these records."""
        found = list(records)
        return cls(
            len(found),
            frozenset(record["label"] for record in found),
            sum(record["confidence"] for record in found),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tally:
        """The tally of :meth:`to_json`."""
        return cls(values["images"], frozenset(values["labels"]), values["confidence"])

    def to_json(self) -> dict[str, Any]:
        """The tally as JSON values."""
        return {
            "images": self.images,
            "labels": sorted(self.labels),
            "confidence": self.confidence,
        }

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.images + other.images,
            self.labels | other.labels,
            self.confidence + other.confidence,
        )

    @property
    def words(self) -> str:
        """Classes and mean confidence of images, of which there is one at least."""
        classes = f"{len(self.labels)} class{'es' * (len(self.labels) != 1)}"
        return f"{classes}, mean confidence {self.confidence / self.images:.3f}"


class JobProgress:
    """Shows the progress of a pool on stderr.

    Args:
        total: number of images of the whole pool.
        held: the images that it has.
        shown: whether to show anything.
    """

    def __init__(self, total: int, held: Tally, shown: bool) -> None:
        self._total, self._held, self._shown = total, held, shown
        self._in_terminal = sys.stderr.isatty()
        self._start = time.perf_counter()
        self._last = held.images
        self._bar = tqdm(
            total=total,
            initial=held.images,
            disable=not (shown and self._in_terminal),
            unit="image",
            smoothing=0,  # the mean rate, because processes end their batches by turns
            dynamic_ncols=True,
        )

    def show(self, made: Tally) -> None:
        """Show a state of the pool, if it has changed.

        Args:
            made: all images since this job began.
        """
        done = self._held + made
        if done.images == self._last:
            return
        self._last = done.images
        if not self._bar.disable:
            self._bar.set_postfix_str(done.words, refresh=False)
            self._bar.update(done.images - self._bar.n)
            self._bar.refresh()
        elif self._shown:
            rate = made.images / (time.perf_counter() - self._start)
            print(self.line(done, rate), file=sys.stderr, flush=True)

    def line(self, done: Tally, rate: float) -> str:
        """The state as a sentence, at a rate in images a second."""
        left = tqdm.format_interval((self._total - done.images) / rate)
        return (
            f"{done.images} of {self._total} images, {rate:.3g} images/s, {left} left, {done.words}"
        )

    def __enter__(self) -> JobProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
