"""Run measurements, by default all of them: ``python -m benchmarks [NAME …] [--quick]``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import figures, gpu, quantise
from benchmarks.pools import measure as pools
from benchmarks.quality import (
    class_accuracy,
    factors,
    foreground,
    independent_judge,
    other_teachers,
    photographs,
    precisions,
    recognition,
    time_to_quality,
)
from benchmarks.schedules import speed as schedule_speed
from benchmarks.schedules import study as schedules
from benchmarks.schedules import uneven as uneven_batches
from benchmarks.speed import (
    end_to_end,
    objectives,
    ops,
    parametrizations,
    roofline,
    scaling,
    step_profile,
    yardstick,
)
from benchmarks.transfer import study as transfer

MEASUREMENTS = {
    "foreground": foreground.main,
    "class-accuracy": class_accuracy.main,
    "judge": independent_judge.main,
    "quality": recognition.main,
    "time-to-quality": time_to_quality.main,
    "factors": factors.main,
    "other-teachers": other_teachers.main,
    "precisions": precisions.main,
    "ops": ops.main,
    "step-profile": step_profile.main,
    "scaling": scaling.main,
    "parametrizations": parametrizations.main,
    "end-to-end": end_to_end.main,
    "objectives": objectives.main,
    "roofline": roofline.main,
    "gpu": gpu.main,
    "figures": figures.main,
    "photographs": photographs.main,
    "pools": pools.main,
    "schedules": schedules.main,
    "schedule-speed": schedule_speed.main,
    "uneven-batches": uneven_batches.main,
    "transfer": transfer.main,
    "quantise": quantise.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="reduced size, at most two minutes each; writes results/*-quick.* only",
    )
    parser.add_argument(
        "--published",
        type=Path,
        metavar="PATH",
        help="a checkout of github.com/Egg-Hu/SMI: yardstick, too, which compares it with our "
        "restatement",
    )
    parser.add_argument(
        "--minutes", type=float, default=gpu.MINUTES, help="of gpu: the time for all its stages"
    )
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="PATH",
        help="of gpu: a file that it wrote before; say what takes longer now",
    )
    options = parser.parse_args()
    measurements: dict[str, Callable[[bool], object]] = dict(MEASUREMENTS)
    measurements["gpu"] = partial(gpu.main, minutes=options.minutes, compare=options.compare)
    if options.published is not None:
        measurements["yardstick"] = partial(yardstick.main, checkout=options.published)
    names = options.names or list(measurements)
    if unknown := set(names) - set(measurements):
        parser.error(f"expected names among {', '.join(measurements)}, got {', '.join(unknown)}")
    for name in names:
        measurements[name](options.quick)


# A process that measures memory imports this file again.
if __name__ == "__main__":
    main()
