import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from projections.view import View
from projections.views import VIEWS
from service.console import EXIT_FAILURE, EXIT_USAGE, database, dedicated, fail, out, show, tune_gc
from service.event_log.follow import Log
from service.features.settings import read_settings
from service.projecting.replay import rebuild_views, unpark_order_in_views

RATE = "{task.fields[rate]:,.0f}/s"


async def replay(
    *,
    view: Annotated[str | None, typer.Option(help="The only view to rebuild; all views if left out.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with the live views; swap nothing.")
    ] = False,
    order: Annotated[
        str | None, typer.Option(help="Apply only the waiting events of this parked order; rebuild nothing.")
    ] = None,
) -> int | None:
    views = [candidate for candidate in VIEWS if view in (None, candidate.name)]
    if not views:
        names = ", ".join(candidate.name for candidate in VIEWS)
        fail(f"unknown view {view}; the views are {names}", EXIT_USAGE)
    if order is not None:
        if verify:
            fail("pass either --order or --verify", EXIT_USAGE)
        return await _resume(order, views)
    tune_gc()
    columns = ("replaying", BarColumn(), MofNCompleteColumn(), "events", RATE, "left", TimeRemainingColumn())
    async with database(read_settings()) as dsn, dedicated(dsn) as connection:
        with Progress(*columns, console=out) as progress:
            bar = progress.add_task("replay", total=None, rate=0.0)
            started = time.monotonic()

            def update(done: int, total: int) -> None:
                rate = done / (time.monotonic() - started)
                progress.update(bar, completed=done, total=total, rate=rate)

            results = await rebuild_views(dsn, views, Log(connection), update, verify=verify)
    for result in results:
        differences = f"{result.differences} rows differ" if result.differences else "equal"
        show(f"{result.name}: {differences if verify else 'rebuilt and swapped in'}")
        if result.parked:
            show(f"{result.name}: {result.parked} orders are parked; see GET /projections for the reasons")
    return EXIT_FAILURE if any(result.differences or result.parked for result in results) else None


async def _resume(order_no: str, views: Sequence[View]) -> int | None:
    async with database(read_settings()) as dsn, dedicated(dsn) as connection:
        results = await unpark_order_in_views(dsn, views, Log(connection), order_no)
    for result in results:
        if result.parked is not None:
            version, reason = result.parked["since_version"], result.parked["reason"]
            show(f"{result.view}: still parked, from version {version} on: {reason}")
        elif result.was_parked:
            show(f"{result.view}: resumed")
    if not any(result.was_parked for result in results):
        show(f"{order_no} is parked in no view")
    return EXIT_FAILURE if any(result.parked for result in results) else None
