"""Pools that tests fill, and ways to end a fill early."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from torch import Tensor

from smi_fast import (
    InversionResult,
    SparseInverter,
    recipes,
)
from smi_fast.fill import fill
from smi_fast.pool import Pool
from tests.helpers.pools import SETTINGS

LABELS = (4, 0, 0, 2, 3)
REBIRTH = (4, 4, 4, 0, 0, 1, 1, 1, 1)

quick = pytest.mark.usefixtures("without_curves")


def filled(
    path: Path, inverter: SparseInverter, background: str = "mean", **options: object
) -> Pool:
    pool = Pool.resume(path, SETTINGS, ["a", "b", "c", "d", "e"], background=background)
    options = {"recipe": recipes.smi(), "batch_size": 2, "progress": False, **options}
    fill(pool, inverter, options.pop("labels", LABELS), **options)
    return pool


def interrupting(monkeypatch: pytest.MonkeyPatch, inverter: SparseInverter, batch: int) -> None:
    """Makes Ctrl-C end a batch, counted from 0, after its third iteration."""
    invert, batches = inverter.invert, iter(range(100))

    def interrupted(*arguments: object, **options: object) -> InversionResult:
        wanted = next(batches) == batch

        def stop(number: int, images: Tensor, kept: Tensor) -> None:
            if wanted and number == 2:
                raise KeyboardInterrupt

        return invert(*arguments, callback=stop, **options)

    monkeypatch.setattr(SparseInverter, "invert", staticmethod(interrupted))


def stopping(inverter: SparseInverter, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Presses Ctrl-C in the third iteration of each batch, and maybe once more."""
    invert = inverter.invert

    def pressed(*arguments: object, **options: object) -> InversionResult:
        def press(number: int, images: Tensor, kept: Tensor) -> None:
            if number == 2:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        return invert(*arguments, callback=press, **options)

    monkeypatch.setattr(SparseInverter, "invert", staticmethod(pressed))
