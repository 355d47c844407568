"""Which of several ways to compute something is the fastest on a GPU.

It is timed at first use, by replays of a CUDA graph, and kept in a file of the user's cache: then
the same file gives the same choices. ``SMI_FAST_TUNE=0`` in the environment takes the first way of
each, the one that is shipped.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smi_fast.ops.timer import replayed_milliseconds

Way = Callable[[], object]
# Read once, so that torch.compile can trace the ops.
SETTING = os.environ.get("SMI_FAST_TUNE", "1")


def is_on(device: torch.device) -> bool:
    """Whether ways are timed on a device: on GPUs, where a compiler doesn't only look at the code.

    Raises:
        ValueError: SMI_FAST_TUNE is neither 0 nor 1.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    if SETTING not in ("0", "1"):
        raise ValueError(f"expected SMI_FAST_TUNE 0 or 1, got {SETTING!r}")
    return SETTING == "1"


def fastest(device: torch.device, key: str, ways: Mapping[str, Way]) -> str:
    """The name of the fastest of several ways, or where nothing is timed that of the first one.

    Args:
        device: where they run.
        key: names what is computed, with the sizes that its time depends on.
        ways: by name. Each can be called any number of times, with the same work every time.
    """
    if len(ways) > 1 and is_on(device):
        return table_of(device).fastest(key, ways)
    return next(iter(ways))


def described(arguments: Sequence[Any]) -> str:
    """The sizes, data types and whole numbers of the arguments of an op; not their values."""
    return " ".join(map(_described, arguments))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        sizes = ",".join(map(str, value.shape))
        return f"{str(value.dtype).removeprefix('torch.')}[{sizes}]"
    return "-" if value is None or isinstance(value, float) else str(int(value))


class Tuning:
    """The choices on one GPU.

    Args:
        path: of the file, which need not exist.
        machine: what the choices hold for. A file for anything else is not used.
        timer: the milliseconds of a way.

    Attributes:
        choices: by key the name of the fastest way as "takes", and the "milliseconds" of all.
    """

    def __init__(
        self, path: Path, machine: Mapping[str, str], timer: Callable[[Way], float]
    ) -> None:
        self.path, self.machine, self._timer = path, dict(machine), timer
        self.choices = self._read(says=True)

    def fastest(self, key: str, ways: Mapping[str, Way]) -> str:
        """The name of the fastest way, timed unless it is known.

        A way that raises an error is not taken. Where none can be timed, as in a capture, the first
        one is taken, for this time.
        """
        known = self.choices.get(key)
        if known is not None and known["takes"] in ways:
            return str(known["takes"])
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return next(iter(ways))
        times = {}
        for name, way in ways.items():
            try:
                times[name] = self._timer(way)
            except Exception:  # Triton's errors are of classes of their own
                continue
        if not times:
            return next(iter(ways))
        best = min(times, key=lambda name: times[name])
        rounded = {name: round(time, 5) for name, time in times.items()}
        self.choices[key] = {"takes": best, "milliseconds": rounded}
        self._write()
        return best

    def lines(self) -> Iterator[str]:
        """The file and its choices, in words."""
        yield f"{self.machine['gpu']}: {len(self.choices)} choices in {self.path}"
        for key, choice in sorted(self.choices.items()):
            times = sorted(choice["milliseconds"].items(), key=lambda pair: pair[1])
            shown = ", ".join(f"{name} {time:.4g} ms" for name, time in times)
            yield f"  {key}: {choice['takes']} ({shown})"

    def _read(self, says: bool) -> dict[str, Any]:
        """The choices in the file; none from a file that isn't for this machine."""
        try:
            found = json.loads(self.path.read_text("utf-8"))
            choices = found["choices"] if found["machine"] == self.machine else None
            if choices is not None and all(_is_choice(choice) for choice in choices.values()):
                return dict(choices)
            what = "one of another machine" if choices is None else "another"
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"one that can't be read ({type(error).__name__})"
        if says:
            _say(
                f"expected a tuning file of {self.machine['gpu']} and these versions in "
                f"{self.path}, got {what}: it is made anew"
            )
        return {}

    def _write(self) -> None:
        """Write the file whole, with what other processes have added to it meanwhile.

        What was there before wins over what was timed here, so that all processes that start from
        now on choose alike.
        """
        kept = {**self.choices, **self._read(says=False)}
        text = json.dumps({"machine": self.machine, "choices": kept}, indent=1, sort_keys=True)
        own = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(text + "\n", "utf-8")
            own.replace(self.path)
        except OSError as error:
            _say(f"expected to write {self.path}, got {error}: ways are timed again next time")


def _is_choice(choice: Any) -> bool:
    return isinstance(choice["takes"], str) and isinstance(choice["milliseconds"], dict)


@lru_cache(maxsize=8)
def _say(sentence: str) -> None:
    """Say something once."""
    print(f"smi_fast: {sentence}", file=sys.stderr)


def table_of(device: torch.device) -> Tuning:
    """The choices on a CUDA device; the same object every time."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _table_of(torch.device("cuda", index))


@lru_cache(maxsize=64)
def _table_of(device: torch.device) -> Tuning:
    machine = machine_of(device)
    return Tuning(path_of(machine["gpu"]), machine, partial(replayed_milliseconds, device=device))


def machine_of(device: torch.device) -> dict[str, str]:
    """What the times of a device depend on: its name, and the versions of what runs on it."""
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "not installed"
    from smi_fast import __version__

    versions = {"smi_fast": __version__, "torch": torch.__version__}
    return {"gpu": torch.cuda.get_device_name(device), **versions, "triton": triton}


def path_of(gpu: str) -> Path:
    """The file of the GPUs of a name, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return cache / "smi_fast" / f"tuning-{name}.json"
