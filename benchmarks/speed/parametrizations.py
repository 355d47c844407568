"""What a parametrization adds to a sparse iteration, beside pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness.environment import record
from benchmarks.harness.timing import alternate, ratios, spread
from benchmarks.speed.loops import BATCHES, QUICK_BATCH, Workload, deit
from smi_fast import Fourier, Parametrization, Pixels, Pyramid, SparseInverter, StopSchedule

# Iterations before the stop and all of them; those behind the stop are timed.
STOP, ITERATIONS, QUICK_ITERATIONS = 1, 40, 4
ROUNDS, QUICK_ROUNDS = 3, 1
# 46 of 196 patches are kept, as by the published stops.
SCHEDULE = StopSchedule((STOP,), (150 / 196,))
BASE = "pixels"
PARAMETRIZATIONS: dict[str, Parametrization] = {
    BASE: Pixels(),
    "Fourier": Fourier(),
    "Fourier, red, green and blue": Fourier(colour=False),
    "pyramid": Pyramid(),
}
METHOD = (
    "Seconds of an iteration behind the stop, of cross-entropy with the default jitter. Each round "
    "runs every parametrization once; the cost is what it adds to the seconds of pixels in a round."
)


def seconds_of(
    workload: Workload, parametrization: Parametrization, iterations: int
) -> Callable[[], float]:
    """Times the iterations of a run behind its stop."""
    inverter = SparseInverter(
        workload.vit,
        parametrization=parametrization,
        schedule=SCHEDULE,
        iterations=iterations,
        mean=workload.mean,
        std=workload.std,
    )

    def run() -> float:
        last = inverter.invert(workload.targets, progress=False).timing[-1]
        return last.seconds / last.iterations

    return run


def measure(workload: Workload, iterations: int, rounds: int) -> dict[str, Any]:
    """The seconds of an iteration with each parametrization, and what it costs beside pixels."""
    run = partial(seconds_of, workload, iterations=iterations)
    found = alternate({name: run(each) for name, each in PARAMETRIZATIONS.items()}, rounds)
    costs = {name: [r - 1 for r in ratios(each, found[BASE])] for name, each in found.items()}
    return {
        "batch": len(workload.targets),
        "patches": SCHEDULE.counts(workload.patches)[-1],
        "seconds": {name: spread(each) for name, each in found.items()},
        "cost": {name: spread(each) for name, each in costs.items() if name != BASE},
    }


def main(quick: bool = False) -> None:
    batches = {"deit_tiny": QUICK_BATCH} if quick else BATCHES
    iterations, rounds = (QUICK_ITERATIONS, QUICK_ROUNDS) if quick else (ITERATIONS, ROUNDS)
    models = {
        name: measure(deit(name, batch), iterations, rounds) for name, batch in batches.items()
    }
    record("parametrizations", {"method": METHOD, "rounds": rounds, "models": models}, quick=quick)
