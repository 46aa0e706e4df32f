from functools import partial
from typing import Annotated

import typer

from service.cli.console import EXIT_FAILURE, EXIT_USAGE, database, dedicated, fail, show, show_table
from service.database.connections import connect, connected
from service.event_log.feed import Feed
from service.maintenance import audit as audits


async def audit(
    order_no: Annotated[str | None, typer.Argument(help="The order number.")] = None,
    *,
    rejudge: Annotated[
        bool, typer.Option("--rejudge", help="Judge all orders again by today's table.")
    ] = False,
) -> int | None:
    if (order_no is None) == (not rejudge):
        fail("pass either an order number or --rejudge", EXIT_USAGE)
    async with database() as dsn:
        if order_no is None:
            return await _rejudge(dsn)
        async with connected(dsn) as connection:
            rows = [
                (
                    *(event.originator_version, event.timestamp, event.verdict, event.previous_status),
                    *(event.reported_status, event.recognised, audits.explain(event)),
                )
                async for event in audits.order_events(connection, order_no)
            ]
    if not rows:
        fail(f"the log has no events for order {order_no}: check the order number")
    show_table(("version", "received at", "verdict", "from", "reported", "to", "reason"), rows, order_no)
    return None


async def _rejudge(dsn: str) -> int | None:
    async with dedicated(dsn) as connection:
        changes = [change async for change in audits.rejudge(Feed(connection, partial(connect, dsn)))]
    if not changes:
        show("today's table gives every report the verdict that was recorded")
        return None
    show_table(
        ("order", "version", "reported", "recorded verdict", "today's verdict", "today's status"), changes
    )
    return EXIT_FAILURE
