"""``python -m benchmarks [NAME …]`` runs the named measurements, or all of them."""

from __future__ import annotations

import argparse
from functools import partial

from benchmarks import figures as plot
from benchmarks.quality import class_accuracy as inversion
from benchmarks.quality import foreground
from benchmarks.quality import independent_judge as judge
from benchmarks.speed import end_to_end, ops, roofline
from benchmarks.speed import objectives as statistics
from benchmarks.speed import step_profile as profile
from benchmarks.speed.loops import BATCHES

MEASUREMENTS = {
    "foreground": foreground.main,
    "inversion": inversion.main,
    "judge": judge.main,
    "ops": ops.main,
    "profile": profile.main,
    "end-to-end": end_to_end.main,
    "statistics": statistics.main,
    "plot": plot.main,
    "roofline": roofline.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
    parser.add_argument(
        "--model", nargs="+", choices=BATCHES, default=list(BATCHES), help="of end-to-end"
    )
    parser.add_argument("--iterations", type=int, default=400, help="of end-to-end")
    options = parser.parse_args()
    names = options.names or list(MEASUREMENTS)
    if unknown := set(names) - set(MEASUREMENTS):
        parser.error(f"expected names among {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}")
    measurements = MEASUREMENTS | {
        "end-to-end": partial(end_to_end.main, options.model, options.iterations)
    }
    for name in names:
        measurements[name]()


# The processes that memory is measured in import this file again.
if __name__ == "__main__":
    main()
