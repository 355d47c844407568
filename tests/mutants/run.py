"""Plants each mutant in a copy of the repository and runs its nearest tests.

``python -m tests.mutants.run`` takes a few minutes. It prints one line per mutant, and fails when
one lives that isn't marked as equivalent. The log of a mutant that lives stays in build/mutants/.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.table import MUTANTS
from tests.mutants.tree import NOT_BUILT, Tree

WORK = ROOT / "build" / "mutants"
SECONDS = 240  # for the build and the tests of one mutant
PASSED, FAILED = 0, 1
FORK = multiprocessing.get_context("fork")

Finished = tuple[Mutant, str, float]


def outcome(status: int | None) -> str:
    """What became of a mutant, from the exit status of its tests, or None when time was up."""
    if status is None:
        return "caught: it hangs"
    if status < 0:
        return f"caught: {signal.Signals(-status).name}"
    if status == NOT_BUILT:
        return "INVALID: it isn't compiled"
    return {PASSED: "LIVED", FAILED: "caught"}.get(status, "INVALID: its tests can't be run")


def run_each(mutants: Sequence[Mutant], trees: Sequence[Tree]) -> Iterator[Finished]:
    """Tests mutants, one at a time in each tree; without an old text there is no fault."""
    waiting, free = list(mutants), list(trees)
    running: dict[int, tuple[BaseProcess, Mutant, Tree, float]] = {}
    try:
        while waiting or running:
            while waiting and free:
                mutant, tree = waiting.pop(0), free.pop()
                if mutant.old:
                    tree.plant(mutant)
                process = FORK.Process(target=tree.test, args=(mutant.build, mutant.tests))
                process.start()
                running[process.sentinel] = (process, mutant, tree, time.monotonic())
            wait(list(running), timeout=1)
            for sentinel, (process, mutant, tree, start) in list(running.items()):
                seconds = time.monotonic() - start
                overdue = bool(mutant.old) and process.is_alive() and seconds > SECONDS
                if process.is_alive() and not overdue:
                    continue
                if overdue:
                    end(process)
                process.join()
                del running[sentinel]
                free.append(tree)
                if mutant.old:
                    tree.restore(mutant)
                result = outcome(None if overdue else process.exitcode)
                if not (mutant.old and result.startswith("caught")):
                    shutil.copy(tree.log, WORK / f"{mutant.name}.log")
                yield mutant, result, seconds
    finally:
        # An interrupt or an error ends here: no tests go on, and no fault stays planted.
        for process, mutant, tree, _ in running.values():
            end(process)
            process.join()
            if mutant.old:
                tree.restore(mutant)


def end(process: BaseProcess) -> None:
    """Kills a process and those that it has started."""
    with suppress(ProcessLookupError):  # before it leads a group of its own
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()


def without_fault(mutants: Sequence[Mutant]) -> list[Mutant]:
    """The tests of mutants, in one run without a fault; grids, by -k, are left to make test."""
    chosen = [m.tests for m in mutants if "-k" not in m.tests and m.build in ("", "cpu")]
    nodes = " ".join(sorted({node for tests in chosen for node in tests.split()}))
    return [Mutant("no-fault", "", "", "", nodes)] if nodes else []


def start(count: int, builds: set[str]) -> list[Tree]:
    """Copies of the repository, with everything built that mutants change.

    Raises:
        SystemExit: it can't be built; with the place of the log.
    """
    trees = [Tree(WORK / str(number)) for number in range(count)]
    for tree in trees:
        tree.copy()
    if not builds:
        return trees
    processes = [FORK.Process(target=tree.prepare, args=(builds,)) for tree in trees]
    for process in processes:
        process.start()
    for process, tree in zip(processes, trees, strict=True):
        process.join()
        if process.exitcode:
            raise SystemExit(f"The kernels can't be built, see {tree.log.relative_to(ROOT)}")
    return trees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="names, or beginnings of names", default=[""])
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    mutants = [m for m in MUTANTS if m.name.startswith(tuple(options.only))]
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MAX_JOBS="1")
    for module in ("pytest", "timm", "torch.utils.cpp_extension"):
        importlib.import_module(module)

    trees = start(options.jobs, {m.build for m in mutants} - {""})
    for check, result, _ in run_each(without_fault(mutants), trees):
        if result != "LIVED":
            raise SystemExit(f"Without a fault these tests don't pass: {check.tests}")
    results: list[Finished] = []
    for mutant, result, seconds in run_each(mutants, trees):
        results.append((mutant, result, seconds))
        print(f"{seconds:5.1f} s  {result:10}  {mutant.name}: {mutant.breaks}", flush=True)

    caught = sum(result.startswith("caught") for _, result, _ in results)
    equivalent = [m for m, result, _ in results if m.equivalent and result == "LIVED"]
    print(f"{caught} of {len(results)} caught, {len(equivalent)} equivalent")
    for mutant in equivalent:
        print(f"  {mutant.name} is equivalent: {mutant.equivalent}")
    wrong = [
        f"{mutant.name}: {result}"
        for mutant, result, _ in results
        if not (result == "LIVED" if mutant.equivalent else result.startswith("caught"))
    ]
    if wrong:
        sys.exit("\n".join(["", *wrong]))


if __name__ == "__main__":
    main()
