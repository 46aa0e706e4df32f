from typing import Annotated

import typer

from service.cli.files import new_file
from service.console import database, err
from service.database.connections import connected
from service.features.settings import read_settings
from service.maintenance import backup as backups


async def backup(
    file: Annotated[str, typer.Argument(help="A new dump file; - is standard output.", show_default=False)],
) -> None:
    tools = backups.find_tools(read_settings())
    async with database(read_settings(), as_service=False) as dsn, connected(dsn) as connection:
        with new_file(file, "dump") as dump:
            head = await backups.make(connection, dsn, dump, tools)
    err.print(f"backed up: the log up to position {head} or later, and everything else but the views")
