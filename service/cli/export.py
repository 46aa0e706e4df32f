import os
import sys
from typing import Annotated

import typer

from service.cli.console import database, err
from service.cli.files import STANDARD_OUTPUT, new_file
from service.cli.progress import showing_rows
from service.database.connections import connected
from service.maintenance import transfer
from service.maintenance.transfer_file import LogWriter


async def export(
    file: Annotated[str, typer.Argument(help="A new NDJSON file; - is standard output.")] = "-",
) -> None:
    # Otherwise the bar would appear between the lines.
    is_shown = file != "-" or not sys.stdout.isatty()
    async with database() as dsn, connected(dsn) as connection:
        with new_file(file, "export") as path, showing_rows("exporting", is_shown=is_shown) as progress:
            descriptor = STANDARD_OUTPUT if path is None else os.open(path, os.O_WRONLY)
            try:
                moved = await transfer.export_log(connection, LogWriter(descriptor, file), progress)
                if path is not None:
                    os.fsync(descriptor)
            finally:
                if path is not None:
                    os.close(descriptor)
    counts = ", ".join(f"{name}: {count}" for name, count in moved.rows.items())
    err.print(f"exported: the log up to position {moved.head} ({counts})")
