import csv
import sys
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import typer

from projections.order_list import FIRST_PLACE, stuck_orders
from service.console import database, err
from service.database.connections import connected
from service.features.settings import read_settings
from service.http.csv_export import escape_formula
from service.http.times import to_rfc3339
from service.maintenance.imports import COLUMNS

DAYS_MAX: Final = 36_500
PAGE_ORDERS: Final = 1_000


async def reconcile(
    *,
    days: Annotated[
        int, typer.Option(min=0, max=DAYS_MAX, help="Days without a report after which an order is listed.")
    ] = 3,
) -> None:
    now = datetime.now(UTC)
    after = FIRST_PLACE
    orders = 0
    writer = csv.writer(sys.stdout)
    writer.writerow((*COLUMNS, "status_now", "last_reported_at"))
    async with database(read_settings()) as dsn, connected(dsn) as connection:
        while page := await stuck_orders(connection, now - timedelta(days=days), PAGE_ORDERS, after):
            for order in page:
                last = to_rfc3339(order.last_reported_at, "seconds")
                number, cnote = escape_formula(order.order_no), escape_formula(order.cnote or "")
                writer.writerow((number, cnote, "", "", order.status or "", last))
            orders += len(page)
            after = page[-1].place
    err.print(
        f"orders without news for {days} days: {orders}; fill in status and at where you know more, and run "
        "'import-reports'"
    )
