"""``python -m benchmarks.pools.uses NAME POOL`` prints what a use of a pool takes, as JSON.

It imports nothing but what the use needs, because memory is that of the process.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness.memory import seconds_and_peak
from smi_fast.pool import Pool
from smi_fast.pool.page import write_page


def open_pool(folder: Path) -> None:
    """Read all records."""
    assert Pool(folder).records


def resume_pool(folder: Path) -> None:
    """Open a pool to add images."""
    settings = Pool(folder).settings
    own = {"format", "background", "class_names"}
    rest = {key: value for key, value in settings.items() if key not in own}
    with Pool.resume(folder, rest, settings["class_names"]) as pool:
        assert pool.records


USES: dict[str, Callable[[Path], object]] = {
    "open": open_pool,
    "resume": resume_pool,
    "report": write_page,
}


def main() -> None:
    name, folder = sys.argv[1:]
    start = time.process_time()
    seconds, added, peak = seconds_and_peak(lambda: USES[name](Path(folder)))
    found = {"seconds": seconds, "cpu_seconds": time.process_time() - start}
    print(json.dumps({**found, "added_mb": added / 1e6, "peak_mb": peak / 1e6}))


if __name__ == "__main__":
    main()
