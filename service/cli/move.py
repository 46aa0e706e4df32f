import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn

from service.console import EXIT_USAGE, database, err, fail
from service.database.connections import connected
from service.database.embedded_postgres import EmbeddedPostgres
from service.dsn import SCHEMES, read_hosts, read_target
from service.features import load_all
from service.features.settings import read_settings
from service.maintenance import move as moves
from service.progress import showing_progress


async def move(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET_DSN",
            help="The URL of an empty database, postgresql://..., with the role that is to own the log; or the "
            "path of a new state folder, for an embedded database.",
            show_default=False,
        ),
    ],
) -> None:
    destination = _read_destination(target)
    async with (
        database(read_settings(), as_service=False) as dsn,
        connected(dsn) as source,
        _opened(target) as new_dsn,
        connected(new_dsn) as new,
    ):
        with showing_progress("moving", DownloadColumn()) as progress:
            moved = await moves.move_log(source, new, destination, progress)
    counts = ", ".join(f"{name}: {count}" for name, count in moved.rows.items())
    err.print(f"moved: the log ends at position {moved.head} ({counts or 'an earlier move has copied it'})")
    err.print(
        f"set {'ORDER_TRACKING_DATABASE_URL' if new_dsn == target else 'ORDER_TRACKING_STATE_DIR'} to the new "
        "database, and start the service: it rebuilds the views. No service starts on the old database again"
    )
    settings = read_settings()
    files = [str(file) for _, find_files in load_all("files") for file in find_files(settings)]
    if files:
        err.print(f"in another state folder, it needs {' and '.join(files)}")


def _read_destination(target: str) -> str:
    """Return what the mark in the old database names: without secrets."""
    if Path(target).is_absolute():
        return target
    if not target.startswith(SCHEMES):
        fail("TARGET_DSN: expected a URL that begins with postgresql://, or an absolute path", EXIT_USAGE)
    try:
        read_target(target)
        return ", ".join(map(str, read_hosts(target))) or "a local socket"
    except ValueError as error:
        fail(f"TARGET_DSN: {error}", EXIT_USAGE)


@asynccontextmanager
async def _opened(target: str) -> AsyncIterator[str]:
    """Yield the DSN of the target; start its embedded server for the block if it is a state folder."""
    if target.startswith(SCHEMES):
        yield target
        return
    server = EmbeddedPostgres(Path(target), bindir=read_settings().pg_bindir)
    try:
        # In a thread, so that Ctrl-C interrupts the start.
        await asyncio.to_thread(server.start)
        yield server.dsn
    finally:
        await asyncio.to_thread(server.stop)
