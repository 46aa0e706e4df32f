from typing import Annotated

import typer

from service.cli.console import database, fail, show
from service.database.connections import connected
from service.database.operations import system_user
from service.http.share_links import ShareLinks, UnknownShareError, revoke_share
from service.settings import read_settings


async def unshare(
    link: Annotated[str, typer.Argument(help="The link, or its id as the record of actions has it.")],
) -> None:
    secret = read_settings().share_secret.get_secret_value()
    async with database() as dsn, connected(dsn) as connection:
        try:
            share_id = await revoke_share(
                connection, ShareLinks(secret) if secret else None, link, system_user()
            )
        except UnknownShareError as error:
            fail(error)
    show(f"revoked: {share_id}")
