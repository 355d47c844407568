"""Independent stages within a time: no stage needs another, and none can end the others."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smi_fast.verify import isolation

Line = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A part of a verification or a measurement.

    Attributes:
        name: of the stage.
        seconds: the share of the whole time that it may take, in proportion to that of the others.
        lines: ``(device, seconds) -> lines``, what it finds, as it comes. It works in processes of
            its own, and ends them after these seconds.
        proves: whether an early end of the stage leaves something unproved that it was to prove.
    """

    name: str
    seconds: float
    lines: Callable[[torch.device, float], Iterator[Any]]
    proves: bool = False


def run(stages: Sequence[Stage], device: torch.device, seconds: float) -> Iterator[Line]:
    """The lines of all stages, and after those of each one a line that says how it ended.

    A stage may take its share of the time that is left, so that what one doesn't use is for those
    after it.

    Args:
        stages: run in this order.
        device: where they run.
        seconds: that all may take together.

    Returns:
        dictionaries that can be written as JSON, each with "kind" and "stage". The last one of a
        stage is of kind "stage". What must not be is a list "failures".
    """
    end = time.monotonic() + seconds
    for index, stage in enumerate(stages):
        start = time.monotonic()
        left = max(0.0, end - start)
        limit = left * stage.seconds / sum(other.seconds for other in stages[index:])
        found, problems = 0, []
        try:
            for line in stage.lines(device, limit):
                if not _is_json(line):
                    problems.append(f"expected a dictionary for JSON, got {line!r}"[:200])
                    continue
                found += 1
                yield {"kind": "found", **line, "stage": stage.name}
        except isolation.Ended as reason:
            problems.append(str(reason))
        except Exception as problem:
            problems.append(isolation.described(problem))
        took = round(time.monotonic() - start, 1)
        ended = {"lines": found, "seconds": took, "limit": round(limit, 1), "problems": problems}
        if problems and stage.proves:
            ended["failures"] = problems
        yield {"kind": "stage", "stage": stage.name, **ended}


def alone(
    work: Callable[..., None], *arguments: Any
) -> Callable[[torch.device, float], Iterator[Any]]:
    """The ``lines`` of a stage that is one function, as of :func:`isolation.messages`, which takes
    the name of the device before its arguments.
    """

    def lines(device: torch.device, seconds: float) -> Iterator[Any]:
        return isolation.messages(work, str(device), *arguments, device=device, limit=seconds)

    return lines


def attempt(
    send: Callable[[object], None], named: Line, reason: str, line: Callable[..., Line], *given: Any
) -> None:
    """Send a line that a function makes of what is given; or its name, with the reason why not.

    Args:
        send: takes the line.
        named: a part of it.
        reason: the key of the reason: "failures" for what is to be proved, else "not_timed".
        line: makes the rest.
        given: its arguments.
    """
    try:
        send({**named, **line(*given)})
    except Exception as problem:
        said = isolation.described(problem)
        send({**named, reason: [said] if reason == "failures" else said})


def in_turn(
    parts: Sequence[tuple[Line, Callable[..., None], tuple[Any, ...]]],
    device: torch.device,
    seconds: float,
) -> Iterator[Any]:
    """The lines of several functions, each in a process of its own.

    Each may take its part of the time that is left. One that ends early leaves a line, its name and
    "not_timed" with the reason.

    Args:
        parts: the name of each as a part of a line, the function and its arguments.
        device: where they run.
        seconds: that all may take together.
    """
    end = time.monotonic() + seconds
    for index, (named, work, arguments) in enumerate(parts):
        limit = (end - time.monotonic()) / (len(parts) - index)
        try:
            yield from alone(work, *arguments)(device, limit)
        except isolation.Ended as reason:
            yield {"kind": "time", **named, "not_timed": str(reason)}


def _is_json(line: Any) -> bool:
    try:
        json.dumps(line)
    except (TypeError, ValueError):
        return False
    return isinstance(line, dict)
