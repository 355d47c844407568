"""``python -m smi_fast`` is the command ``smi-fast``."""

import signal


def main() -> None:
    """Run the command. Until it opens a pool, Ctrl-C ends the process at once.

    A KeyboardInterrupt would print a traceback, or abort the import of a compiled module.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from smi_fast import cli

    cli.main()


if __name__ == "__main__":
    main()
