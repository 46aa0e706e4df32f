"""The commands of share links."""

from datetime import timedelta
from typing import Annotated, Final

import typer

from service.command_name import command_name
from service.console import EXIT_USAGE, database, err, fail, show
from service.database.connections import connected
from service.database.operations import system_user
from service.event_log import store
from service.features.pages.settings import PagesSettings
from service.features.pages.share_links import (
    EXPIRY_DEFAULT,
    SETTING,
    ShareLinks,
    UnknownShareError,
    make_share,
    read_base_url,
    revoke_share,
)
from service.settings import read

DAYS_MAX: Final = 36_500


async def share(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    *,
    days: Annotated[
        int, typer.Option(min=1, max=DAYS_MAX, help="Days until the link expires.")
    ] = EXPIRY_DEFAULT.days,
    base_url: Annotated[
        str, typer.Option(help="The service's public address, such as https://your.host; left out: a path.")
    ] = "",
) -> None:
    secret = read(PagesSettings).share_secret.get_secret_value()
    if not secret:
        fail(
            f"{SETTING} is not set: set it for the service too ('order-tracking token' generates one)",
            EXIT_USAGE,
        )
    try:
        base = read_base_url(base_url) if base_url else ""
    except ValueError as error:
        fail(error, EXIT_USAGE)
    async with database(read(PagesSettings)) as dsn, connected(dsn) as connection:
        if not await store.read_stream(connection, order_no, 0, 1):
            fail(f"the log has no events for order {order_no}: check the order number")
        links = ShareLinks(secret)
        link = await make_share(connection, links, order_no, timedelta(days=days), system_user())
    show(f"{base}{link.path}")
    err.print(
        f"it expires after {days} days; to revoke it before, run '{command_name()} unshare {link.share_id}'"
    )


async def unshare(
    link: Annotated[str, typer.Argument(help="The link, or its id as the record of actions has it.")],
) -> None:
    secret = read(PagesSettings).share_secret.get_secret_value()
    async with database(read(PagesSettings)) as dsn, connected(dsn) as connection:
        try:
            share_id = await revoke_share(
                connection, ShareLinks(secret) if secret else None, link, system_user()
            )
        except UnknownShareError as error:
            fail(error)
    show(f"revoked: {share_id}")
