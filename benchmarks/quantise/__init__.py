"""What images are worth as the calibration set of a quantiser."""

from __future__ import annotations

from importlib.util import find_spec


def main(quick: bool = False) -> None:
    """Run the study. Its libraries are loaded only now, for the other measurements need none."""
    if not (find_spec("torchao") and find_spec("brevitas")):
        raise SystemExit("expected torchao and brevitas: pip install 'smi-fast[quantise,brevitas]'")
    from benchmarks.quantise import study

    study.main(quick)
