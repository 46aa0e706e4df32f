import contextlib
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from service.console import EXIT_FAILURE, EXIT_USAGE, database, dedicated, err, fail, show
from service.database.connections import connected
from service.database.operations import record_operation, system_user
from service.features.settings import read_settings
from service.ingest.recorder import Recorder
from service.maintenance import imports
from service.maintenance.imports import BadFileError

# The time limit for one transaction, which competes with the reports that the service records.
RECORD_SECONDS_MAX: Final = 30.0
# The subject of the recorded operation.
EVERY_ORDER: Final = "*"


async def import_reports(
    file: Annotated[
        str,
        typer.Argument(
            help="CSV with the columns order_no, cnote, status, at, or NDJSON with these members; "
            "- is standard input.",
            show_default=False,
        ),
    ],
) -> int | None:
    reports = _read(file)
    columns = ("recording", BarColumn(), MofNCompleteColumn(), "reports, left", TimeRemainingColumn())
    async with database(read_settings()) as dsn, dedicated(dsn) as to_append, connected(dsn) as connection:
        recorder = Recorder(
            to_append,
            lambda *_: None,
            queue_reports_max=1,
            seconds_max=RECORD_SECONDS_MAX,
            recognise=read_settings().vocabulary.recognise,
        )
        reason = f"{reports.rows} rows of {file}"
        await record_operation(connection, system_user(), "reports_imported", EVERY_ORDER, reason)
        with Progress(*columns, console=err, disable=not err.is_terminal) as progress:
            bar = progress.add_task("import", total=reports.rows)
            done = await imports.import_reports(recorder, reports, lambda rows: progress.advance(bar, rows))
    show(f"recorded: {done.recorded}")
    if done.present:
        show(f"imported before: {done.present}")
    if reports.blank:
        show(f"left out, because status and at are blank: {reports.blank}")
    if done.overtaken:
        names = ", ".join(dict.fromkeys(done.overtaken_orders))
        err.print(
            f"left out, because the order has a report at the same time or later: {done.overtaken}; "
            f"such as of {names}"
        )
    if done.failed:
        err.print(f"left out, because this release cannot read their orders: {done.failed}")
    return EXIT_FAILURE if done.overtaken or done.failed else None


def _read(name: str) -> imports.ReportsFile:
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer if name == "-" else stack.enter_context(Path(name).open("rb"))
            content = file.read(imports.FILE_BYTES_MAX + 1)
    except OSError as error:
        fail(f"cannot read {name}: {error.strerror}", EXIT_USAGE)
    try:
        return imports.read_reports(content, datetime.now(UTC))
    except BadFileError as error:
        for line in str(error).splitlines():
            err.print(line, style="red")
        fail(f"nothing was imported from {name}: correct the file, and import it again", EXIT_USAGE)
