"""The entry point of the process: it sets up signals, then runs the command line."""

import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line."""
    handles_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if handles_ctrl_c:
        # Nothing needs a cleanup yet, so Ctrl-C may end the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from service.cli.main import cli  # noqa: PLC0415 - it takes half a second
    from service.command_name import command_name  # noqa: PLC0415 - after the signals

    if handles_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _exit)
    cli(prog_name=command_name())


def _exit(number: int, _frame: FrameType | None) -> NoReturn:
    """Exit as Ctrl-C does, so that cleanup runs, such as stopping the embedded PostgreSQL."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
