"""One planted fault, and the short form in which the tables list them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """A fault in one file.

    Attributes:
        name: tells mutants apart; ``--only`` takes it.
        old: the text to replace, which the file has exactly once.
        new: the fault.
        breaks: one sentence that says what goes wrong.
        tests: what pytest is called with: the nearest tests, and maybe ``-k``.
        equivalent: why no test can tell the mutant from the package; empty for a real fault.
        file: path from the root of the repository.
    """

    name: str
    old: str
    new: str
    breaks: str
    tests: str = ""
    equivalent: str = ""
    file: str = ""

    @property
    def build(self) -> str:
        """What is built: "cpu", a variant of the emulation ("plain" or "memory"), or ""."""
        if self.file.startswith("csrc/cuda"):
            return "memory" if "[memory]" in self.tests else "plain"
        return "cpu" if self.file.startswith("csrc/cpu") else ""

    def planted(self, text: str) -> str:
        """The text of the file with the fault.

        Raises:
            ValueError: the file doesn't have the old text exactly once.
        """
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.name}: expected {self.old!r} once in {self.file}, "
                f"got it {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)


def of_file(file: str, tests: str, *mutants: Mutant) -> tuple[Mutant, ...]:
    """Mutants of one file, which take these tests where they name no others."""
    return tuple(replace(m, file=file, tests=m.tests or tests) for m in mutants)
