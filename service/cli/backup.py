from typing import Annotated

import typer

from service.cli.console import database, err
from service.cli.files import new_file
from service.database.connections import connected
from service.maintenance import backup as backups
from service.settings import read_settings


async def backup(
    file: Annotated[str, typer.Argument(help="A new dump file; - is standard output.", show_default=False)],
) -> None:
    tools = backups.find_tools(read_settings())
    async with database(as_service=False) as dsn, connected(dsn) as connection:
        with new_file(file, "dump") as dump:
            head = await backups.make(connection, dsn, dump, tools)
    err.print(f"backed up: the log up to position {head} or later, and everything else but the views")
