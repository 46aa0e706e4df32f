from collections.abc import Collection
from typing import Annotated

import typer

from service.cli.files import open_file
from service.console import database, err
from service.database.connections import connected
from service.features import load_all
from service.features.settings import read_settings
from service.maintenance import backup as backups


async def restore(
    file: Annotated[str, typer.Argument(help="The dump file; - is standard input.", show_default=False)],
    *,
    options: Collection[str],
) -> None:
    settings = read_settings()
    tools = backups.find_tools(settings)
    parts = [
        find_part(settings, options, may_be_on=settings.features is None or feature.name in settings.features)
        for feature, find_part in load_all("restore")
    ]
    async with database(settings, as_service=False, may_create=True) as dsn, connected(dsn) as connection:
        with open_file(file) as dump:
            head = await backups.restore(connection, dsn, dump, tools, settings.state_dir, parts=parts)
    err.print(f"restored: the log ends at position {head}")
    for part in parts:
        if part.advice:
            err.print(part.advice)
    err.print("the next 'serve' or 'replay' rebuilds the views; then run 'check' to check the database")
