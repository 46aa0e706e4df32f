"""What is run: the command line, and what ends it."""

import signal
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line."""
    ends_by_ctrl_c = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ends_by_ctrl_c:
        # While nothing has begun that would have to be ended in order: without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from service.cli.main import cli  # noqa: PLC0415 - it takes half a second

    if ends_by_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _end)
    cli(prog_name="order-tracking")


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """End as by Ctrl-C: what was begun, such as a PostgreSQL, is ended first."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
