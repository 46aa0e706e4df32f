import sys
from typing import Annotated

import typer

from service.cli.console import EXIT_USAGE, database, err, fail
from service.cli.files import open_file
from service.cli.progress import showing_rows
from service.database.connections import connected
from service.database.schema import apply_schema
from service.maintenance import transfer
from service.maintenance.transfer_file import LogReader, read_lines


async def import_(
    file: Annotated[str, typer.Argument(help="A file that 'export' has written; - is standard input.")] = "-",
) -> None:
    if file == "-" and sys.stdin.isatty():
        fail("pass the file to import, or pipe an export into this command", EXIT_USAGE)
    with open_file(file) as source:
        reader = LogReader(read_lines(source, file))
        # Before a database is created.
        header = await reader.read_header()
        async with database(as_service=False, may_create=True) as dsn, connected(dsn) as connection:
            await apply_schema(connection)
            with showing_rows("importing") as progress:
                moved = await transfer.import_log(connection, reader, header, progress)
    counts = ", ".join(f"{name}: {count}" for name, count in moved.rows.items())
    err.print(f"imported: the log ends at position {moved.head} ({counts})")
    err.print("the next 'serve' or 'replay' rebuilds the views; then run 'check' to check the database")
