"""``python -m smi_fast`` is the command ``smi-fast``."""

import sys


def main() -> None:
    """Run the command. Ctrl-C ends it without a traceback, also while its modules are imported."""
    try:
        from smi_fast import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
