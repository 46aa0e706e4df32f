from typing import Annotated

import typer

from service.cli.console import database, err
from service.cli.files import open_file
from service.cli.history import NewHistory, keeps_history
from service.database.connections import connected
from service.maintenance import backup as backups
from service.settings import read_settings


async def restore(
    file: Annotated[str, typer.Argument(help="The dump file; - is standard input.", show_default=False)],
    *,
    new_history: NewHistory = False,
) -> None:
    settings = read_settings()
    tools = backups.find_tools(settings)
    with_history = keeps_history(settings, new_history=new_history)
    async with database(as_service=False, may_create=True) as dsn, connected(dsn) as connection:
        with open_file(file) as dump:
            head = await backups.restore(
                connection, dsn, dump, tools, settings.state_dir, with_history=with_history
            )
    err.print(f"restored: the log ends at position {head}")
    if with_history:
        err.print("if more entries of the history were signed than the dump has, run 'history restart REASON'")
    err.print("the next 'serve' or 'replay' rebuilds the views; then run 'check' to check the database")
