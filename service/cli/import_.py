import sys
from typing import Annotated

import typer

from service.cli.console import EXIT_USAGE, database, err, fail
from service.cli.files import open_file
from service.cli.history import NewHistory, keeps_history
from service.cli.progress import showing_rows
from service.database.connections import connected
from service.database.schema import apply_schema
from service.maintenance import transfer
from service.maintenance.transfer_file import LogReader, read_lines
from service.settings import read_settings


async def import_(
    file: Annotated[str, typer.Argument(help="A file that 'export' has written; - is standard input.")] = "-",
    *,
    new_history: NewHistory = False,
) -> None:
    if file == "-" and sys.stdin.isatty():
        fail("pass the file to import, or pipe an export into this command", EXIT_USAGE)
    with open_file(file) as source:
        reader = LogReader(read_lines(source, file))
        # Before a database is created.
        header = await reader.read_header()
        settings = read_settings()
        if keeps_history(settings, new_history=new_history) is None and not header.has_history:
            fail(
                "the file has no signed history, and the guard of a key is not here: copy history.key and "
                f"history.signed from the old service to {settings.history_key.parent}, or pass --new-history "
                "to begin a new history with a new key",
                EXIT_USAGE,
            )
        async with database(as_service=False, may_create=True) as dsn, connected(dsn) as connection:
            await apply_schema(connection)
            with showing_rows("importing") as progress:
                moved = await transfer.import_log(
                    connection, reader, header, progress, with_history=not new_history
                )
    counts = ", ".join(f"{name}: {count}" for name, count in moved.rows.items())
    err.print(f"imported: the log ends at position {moved.head} ({counts})")
    if header.has_history and not new_history and not settings.history_key.exists():
        err.print(
            "the history stays unsigned until you copy history.key and history.signed from the old service to "
            f"{settings.history_key.parent}"
        )
    err.print("the next 'serve' or 'replay' rebuilds the views; then run 'check' to check the database")
