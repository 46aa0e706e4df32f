from datetime import timedelta
from typing import Annotated, Final

import typer

from service.cli.console import EXIT_USAGE, database, fail, show
from service.database.connections import connected
from service.event_log import store
from service.http.share_links import SETTING, ShareLinks, read_base_url
from service.settings import read_settings

DAYS_MAX: Final = 36_500


async def share(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    *,
    days: Annotated[
        int | None, typer.Option(min=1, max=DAYS_MAX, help="Days until the link expires; never if left out.")
    ] = None,
    base_url: Annotated[
        str, typer.Option(help="The service's public address, such as https://your.host; left out: a path.")
    ] = "",
) -> None:
    secret = read_settings().share_secret.get_secret_value()
    if not secret:
        fail(
            f"{SETTING} is not set: set it for the service too ('order-tracking token' generates one)",
            EXIT_USAGE,
        )
    try:
        base = read_base_url(base_url) if base_url else ""
    except ValueError as error:
        fail(error, EXIT_USAGE)
    async with database() as dsn, connected(dsn) as connection:
        if not await store.read_stream(connection, order_no, 0, 1):
            fail(f"the log has no events for order {order_no}: check the order number")
    link = ShareLinks(secret).make(order_no, timedelta(days=days) if days is not None else None)
    show(f"{base}{link.path}")
