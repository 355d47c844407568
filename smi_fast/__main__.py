"""``python -m smi_fast`` is the command ``smi-fast``."""

from smi_fast.cli import main

main()
