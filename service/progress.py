"""The progress bar of commands that take long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, ProgressColumn, TimeRemainingColumn

from service.console import err


@contextmanager
def showing_progress(
    activity: str, count: ProgressColumn, unit: str = "", *, is_shown: bool = True
) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on standard error if that is a terminal. Yield a function that moves it.

    The function takes two numbers: how much is done, and how much there is to do in all.

    Args:
        activity: the text before the bar.
        count: the column with the two numbers.
        unit: the unit of these numbers, if the column does not show it.
        is_shown: whether to show the bar at all.
    """
    columns = (activity, BarColumn(), count, unit, "left", TimeRemainingColumn())
    with Progress(*columns, console=err, disable=not (is_shown and err.is_terminal)) as progress:
        bar = progress.add_task(activity, total=None)

        def update(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        yield update
