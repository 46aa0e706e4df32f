"""``replay``."""

import time
from typing import Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from service.app import calm_garbage_collector, rebuild_views
from service.cli.console import MISUSED, WRONG, end, out, run_with_database
from service.database.connections import (
    HeldConnection,
    connect,
)
from service.database.schema import VIEWS
from service.event_log.feed import LogReader


def replay(
    view: Annotated[str | None, typer.Option(help="Only this view; all of them if left out.")] = None,
    verify: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--verify", help="Compare a rebuild with the live views; swap nothing.")
    ] = False,
) -> None:
    views = [known for known in VIEWS if view is None or known.name == view]
    if not views:
        end(f"there is no view {view}; there are {', '.join(known.name for known in VIEWS)}", MISUSED)

    async def work(dsn: str) -> int:
        calm_garbage_collector()
        held = HeldConnection(lambda: connect(dsn))
        with Progress(
            TextColumn("replaying"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("events"),
            TextColumn("{task.fields[rate]:,.0f}/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=out,
        ) as progress:
            bar = progress.add_task("replay", total=None, rate=0.0)
            began = time.monotonic()

            def show(done: int, total: int) -> None:
                rate = done / (time.monotonic() - began)
                progress.update(bar, completed=done, total=total, rate=rate)

            reader = LogReader(held, lambda: connect(dsn))
            rebuilt = await rebuild_views(dsn, views, reader, show, verify=verify)
        await held.close()
        for one in rebuilt:
            if verify:
                verdict = "equal" if one.differences == 0 else f"{one.differences} rows differ"
                out.print(f"{one.name}: {verdict}")
            else:
                out.print(f"{one.name}: rebuilt and swapped in")
            if one.set_aside:
                out.print(f"{one.name}: {one.set_aside} orders are set aside; GET /projections says why")
        return WRONG if any(one.differences or one.set_aside for one in rebuilt) else 0

    run_with_database(work)
