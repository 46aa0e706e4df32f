from typing import Annotated

import typer

from service.console import database, fail, show_table
from service.database.connections import connected
from service.features.settings import read_settings
from service.maintenance import audit as audits


async def audit(order_no: Annotated[str, typer.Argument(help="The order number.")]) -> None:
    async with database(read_settings()) as dsn, connected(dsn) as connection:
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
