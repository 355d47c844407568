"""``python -m benchmarks [NAME …]`` runs the named measurements, or all of them."""

from __future__ import annotations

import argparse

from benchmarks import foreground, inversion

MEASUREMENTS = {"foreground": foreground.main, "inversion": inversion.main}

parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MEASUREMENTS))
names = parser.parse_args().names or list(MEASUREMENTS)
if unknown := set(names) - set(MEASUREMENTS):
    parser.error(f"expected names among {', '.join(MEASUREMENTS)}, got {', '.join(unknown)}")
for name in names:
    MEASUREMENTS[name]()
