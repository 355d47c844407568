"""Run measurements, by default all of them: ``python -m benchmarks [NAME …] [--quick]``."""

from __future__ import annotations

import argparse

from benchmarks import figures, quantise
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
from benchmarks.schedules import study as schedules
from benchmarks.speed import (
    end_to_end,
    objectives,
    ops,
    parametrizations,
    roofline,
    step_profile,
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
    "parametrizations": parametrizations.main,
    "end-to-end": end_to_end.main,
    "objectives": objectives.main,
    "roofline": roofline.main,
    "figures": figures.main,
    "photographs": photographs.main,
    "pools": pools.main,
    "schedules": schedules.main,
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
    options = parser.parse_args()
    names = options.names or list(MEASUREMENTS)
    if unknown := set(names) - set(MEASUREMENTS):
        parser.error(f"expected names among {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}")
    for name in names:
        MEASUREMENTS[name](options.quick)


# A process that measures memory imports this file again.
if __name__ == "__main__":
    main()
