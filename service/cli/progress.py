"""The progress bar of commands that read or write many rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from service.cli.console import err


@contextmanager
def showing_rows(activity: str, *, is_shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error if that is a terminal; yield a function to call with done and all rows."""
    columns = (activity, BarColumn(), MofNCompleteColumn(), "rows", "left", TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not (is_shown and err.is_terminal)) as progress:
        bar = progress.add_task(activity, total=None)

        def update(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield update
