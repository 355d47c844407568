"""What ``smi-fast`` says of a machine: what it has, what is fastest, and whether its kernels are
right.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from smi_fast import __version__, options
from smi_fast.options import CommandError

if TYPE_CHECKING:
    import torch


def info() -> None:
    """Print versions, devices, and the backends that run on each device."""
    import torch

    from smi_fast.engine import gain
    from smi_fast.ops import backends
    from smi_fast.provenance import versions

    print(f"smi_fast  {__version__}")
    print(f"python    {platform.python_version()}")
    for name, found in versions().items():
        print(f"{name:<9} {found}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if len(devices) == 1:
        devices.append(torch.device("cuda"))
    for device in devices:
        print(f"\n{device} ({_describe(device)})")
        for name, reason in backends.report(device).items():
            print(f"  {name:<10} {'runs' if reason is None else reason}")
        print(f"  {backends.DEFAULT} takes")
        for op in backends.OPS:
            print(f"    {op:<20} {_choice(op, device)}")
        print(f"    {'blocks of a teacher':<20} {_engines(device)}")
        if device.type == "cpu":
            print(f"    {'in bfloat16':<20} {gain.in_words()}")
        else:
            print(
                f"    {'in float32':<20} tensor cores stand idle, in tf32 and bfloat16 they don't"
            )


def _choice(op: str, device: torch.device) -> str:
    from smi_fast.ops import backends

    chosen = backends.name_or_reason(op, device)
    first, why = backends.ON_GPU[op]
    if chosen == backends.TUNED:
        return "the fastest for each size, see smi-fast tune"
    return f"{chosen}: {why}" if chosen == first else chosen


def _engines(device: torch.device) -> str:
    """How the blocks of a teacher run on a device."""
    import torch

    from smi_fast import engine

    found = [
        candidate.backend
        for candidate in engine.candidates(torch.nn.Sequential())
        if candidate.why_not(device, torch.float32) is None
    ]
    if not found:
        return "op by op"
    steps = "LayerNorm or RMSNorm, or GELU or SwiGLU"
    return f"{found[0]}'s engine; without {steps}, op by op"


def _describe(device: torch.device) -> str:
    import torch

    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if not torch.cuda.is_available():
        return "none is visible; what would run on one"
    return torch.cuda.get_device_name(device)


def tune() -> None:
    """Print what was found to be the fastest on each GPU, and where that is kept.

    It is timed when an inversion first needs it. SMI_FAST_TUNE=0 takes the shipped choices.
    """
    import torch

    from smi_fast.ops import tuning

    if not torch.cuda.is_available():
        print("nothing is tuned: no CUDA device is visible")
        return
    for index in range(torch.cuda.device_count()):
        print("\n".join(tuning.table_of(torch.device("cuda", index)).lines()))


def verify(
    out: Annotated[
        Path, typer.Option(help="File for all figures, in JSON lines, written as they come.")
    ] = Path("smi-fast-verify.jsonl"),
    device: Annotated[
        str, typer.Option(help="cpu, cuda or cuda:1; all: the CPU and every CUDA device.")
    ] = "all",
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds for each op of a backend on the CPU.")
    ] = 300,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Minutes for all stages of each GPU.")
    ] = 9,
    compare: Annotated[
        Path | None,
        typer.Option(help="Such a file of an earlier run: say what takes longer now."),
    ] = None,
) -> None:
    """Check the kernels of this machine against float64, and time those of a GPU.

    A GPU has stages, each in processes of its own; none needs another. The exit code is 1 if a
    kernel is wrong, raises an error, crashes or takes too long.
    """
    folder = out.resolve().parent
    there = out if out.exists() else folder
    if out.is_dir() or not folder.is_dir() or not os.access(there, os.W_OK):
        raise CommandError(f"expected --out to be a file that can be written, got {out}")
    import torch

    from smi_fast.verify import correctness, report

    with options.wrong_options():
        one = None if device == "all" else torch.device(options.parse_device(device))
    chosen = correctness.devices() if one is None else [one]
    right = report.verify(out, chosen, limit, 60 * minutes, old=compare)
    print(f"all figures are in {out}")
    raise typer.Exit(0 if right else 1)
