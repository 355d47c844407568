"""A copy of the repository in which mutants are planted, built and tested."""

from __future__ import annotations

import compileall
import os
import runpy
import shlex
import shutil
import signal
import sys
from pathlib import Path

from tests.mutants.mutant import ROOT, Mutant

NOT_COPIED = (".*", "build", "dist", "demo", "site", "*.egg-info", "*.so", "__pycache__")
# Exit status of a mutant that the compiler refuses; pytest's own end at 5.
NOT_BUILT = 64


class Tree:
    """A copy of the repository. Its objects stay, so that a mutant compiles one file.

    Args:
        path: a folder for nothing else; what the last copy has built without a fault is reused.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log = path.with_suffix(".log")
        self._built = path.with_suffix(".built")

    def copy(self) -> None:
        """Copies the work tree anew. Files keep their times, which the compiler's memory needs.

        Nothing of the last copy stays: a run that was killed has left a fault in it.
        """
        shutil.rmtree(self.path, ignore_errors=True)
        ignored = shutil.ignore_patterns(*NOT_COPIED)
        shutil.copytree(ROOT, self.path, symlinks=True, ignore=ignored)
        if self._built.exists():
            shutil.copytree(self._built / "build", self.path / "build")
        for library in (ROOT / "smi_fast").glob("*.so"):
            shutil.copy2(library, self.path / "smi_fast")
        kernels = self.path / "smi_fast" / "kernels"
        if not kernels.exists():
            kernels.symlink_to("../kernels")
        compileall.compile_dir(self.path / "smi_fast", quiet=1)

    def prepare(self, builds: set[str]) -> None:
        """Builds without a fault what mutants then change one file of, see :attr:`Mutant.build`."""
        self._enter()
        if "cpu" in builds:
            (self.path / "smi_fast" / "_C_cpu.abi3.so").unlink(missing_ok=True)
        _build(builds)
        # The folder gets its name once it is whole, because the next run trusts what it finds.
        shutil.rmtree(self._built, ignore_errors=True)
        part = self._built.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(self.path / "build", part / "build")
        for library in (self.path / "smi_fast").glob("*.so"):
            shutil.copy2(library, part)
        part.rename(self._built)

    def plant(self, mutant: Mutant) -> None:
        """Writes the fault into its file."""
        file = self.path / mutant.file
        file.write_text(mutant.planted(file.read_text()))

    def restore(self, mutant: Mutant) -> None:
        """Takes the fault back, and everything that was built with it."""
        shutil.copy2(ROOT / mutant.file, self.path / mutant.file)
        if mutant.build:
            shutil.rmtree(self.path / "build")
            shutil.copytree(self._built / "build", self.path / "build")
            for library in self._built.glob("*.so"):
                shutil.copy2(library, self.path / "smi_fast")

    def test(self, build: str, tests: str) -> None:
        """Builds, runs the tests, and ends this process with pytest's exit status.

        The process is a fork of one that has imported torch and pytest, which takes longer than
        most tests, but nothing of this repository.
        """
        self._enter()
        if build:
            try:
                _build({build})
            except (SystemExit, RuntimeError) as error:
                print(error)
                sys.exit(NOT_BUILT)
        import pytest

        sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)])))

    def _enter(self) -> None:
        """Makes this process one of the copy; what it prints goes to the log."""
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        others = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
        sys.path[:] = [str(self.path), *others]
        os.environ["PYTHONPATH"] = str(self.path)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        for name in list(sys.modules):
            if name.split(".")[0] in ("tests", "smi_fast"):
                del sys.modules[name]
        os.chdir(self.path)


def _build(what: set[str]) -> None:
    """Compiles what has changed in the working directory, see :attr:`Mutant.build`."""
    if "cpu" in what:
        os.environ.update(SMI_FAST_CPP="1", SMI_FAST_CUDA="0")
        sys.argv = ["setup.py", "-q", "build_ext", "--inplace"]
        runpy.run_path("setup.py")
    variants = sorted(what - {"cpu"})
    if variants:
        from tests.backends.cuda.emulation import build

        # The tests of the emulation build every variant and fault: from now on, only these.
        compile_, build.VARIANTS = build.build, {name: build.VARIANTS[name] for name in variants}
        build.build = lambda *_: compile_(build.VARIANTS)
        build.build()
