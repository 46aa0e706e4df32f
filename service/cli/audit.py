"""``audit``."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from service.cli.console import MISUSED, WRONG, connected, end, make_table, out, run_with_database
from service.database.connections import (
    Connection,
    HeldConnection,
    connect,
)
from service.event_log.feed import LogReader
from service.maintenance import audit as audits
from service.text import printable


def audit(
    order_no: Annotated[str | None, typer.Argument(help="The order to audit.")] = None,
    rejudge: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--rejudge", help="Judge every order's reports again by today's table.")
    ] = False,
) -> None:
    if (order_no is None) == (not rejudge):
        end("give either an order number or --rejudge", MISUSED)

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            if order_no is not None:
                return await _audit_order(connection, order_no)
            return await _rejudge(dsn)

    run_with_database(work)


async def _audit_order(connection: Connection, order_no: str) -> int:
    table = Table(
        "version",
        "received at",
        "verdict",
        "from",
        "reported",
        "to",
        "reason",
        title=Text(printable(order_no)),
    )
    async for event in audits.order_events(connection, order_no):
        table.add_row(
            str(event.originator_version),
            event.timestamp.isoformat(timespec="seconds"),
            event.verdict,
            event.previous_status or "-",
            Text(printable(event.reported_status)),
            event.recognised or "-",
            audits.explanation(event),
        )
    if not table.row_count:
        end(f"nothing was reported of {printable(order_no)}")
    out.print(table)
    return 0


async def _rejudge(dsn: str) -> int:
    held = HeldConnection(lambda: connect(dsn))
    table = make_table("order", "version", "reported", "recorded verdict", "today's verdict", "today's status")
    try:
        async for change in audits.rejudge(LogReader(held, lambda: connect(dsn))):
            table.add_row(
                Text(printable(change.order_no)),
                str(change.version),
                Text(printable(change.reported_status)),
                change.recorded,
                change.today,
                change.status or "-",
            )
    finally:
        await held.close()
    if not table.row_count:
        out.print("today's table judges every report as it was judged")
        return 0
    out.print(table)
    return WRONG
