"""``make bench``: measure the service and its baselines on one real PostgreSQL, and print the ratios.

It measures and asserts nothing: it prints a missed target, and still exits with 0.
"""

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

import psycopg

from service.database.embedded_postgres import NAME as MAIN_DATABASE
from service.database.embedded_postgres import EmbeddedPostgres
from service.database.schema import prepare_database
from tests.benchmarks import load
from tests.benchmarks.appending import measure_append_lock
from tests.benchmarks.deliveries import measure_deliveries
from tests.benchmarks.growth import measure_growth
from tests.benchmarks.parsing import measure_parsing
from tests.benchmarks.proofs import measure_proofs
from tests.benchmarks.rebuilds import measure_rebuild
from tests.benchmarks.report import Row, machine, out, print_table
from tests.benchmarks.restarts import measure_restarts
from tests.benchmarks.serving import measure_history, measure_reads, measure_webhooks
from tests.benchmarks.streams import measure_streams

PARTS: Final = (
    "ingest",
    "library",
    "read",
    "rebuild",
    "history",
    "parse",
    "streams",
    "restarts",
    "lock",
    "deliveries",
    "proofs",
)
SECONDS: Final = 4
EVENTS: Final = 400_000
# With --large: it takes half an hour, and 25 GB of disk.
LARGE_EVENTS: Final = 10_000_000


class Server:
    """The PostgreSQL server of a run, with its default settings and a database for each measurement."""

    def __init__(self, folder: Path) -> None:
        self._embedded = EmbeddedPostgres(folder)

    def __enter__(self) -> Self:
        self._embedded.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._embedded.stop()

    def version(self) -> str:
        """Return the version of the server."""
        with psycopg.connect(self._embedded.dsn) as connection:
            return str(connection.execute("SHOW server_version").fetchone()[0])  # type: ignore[index]

    def database(self, name: str, *, with_schema: bool = False) -> str:
        """Create a database and return its DSN."""
        with psycopg.connect(self._embedded.dsn, autocommit=True) as connection:
            connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
        dsn = self._embedded.dsn.replace(f"/{MAIN_DATABASE}?", f"/{name}?")
        if with_schema:
            asyncio.run(prepare_database(dsn))
        return dsn


def _measure(  # noqa: C901 - one branch for each part
    server: Server, folder: Path, arguments: argparse.Namespace
) -> Iterator[Row]:
    if arguments.large:
        empty, small, large = (server.database(name, with_schema=True) for name in ("empty", "small", "large"))
        dsns = empty, small, large
        yield from measure_growth(dsns, folder, arguments.large_events, arguments.seconds)
        return
    parts, seconds, events = arguments.parts, arguments.seconds, arguments.events
    if "ingest" in parts or "library" in parts:
        library_dsn = server.database("library") if "library" in parts else None
        yield from measure_webhooks(server.database("webhooks"), library_dsn, folder, seconds)
    if "read" in parts:
        yield from measure_reads(server.database("reads"), folder, seconds)
    if "history" in parts:
        yield measure_history(server.database("history"), folder)
    if "restarts" in parts:
        yield from measure_restarts(server.database("restarts"), folder)
    if "lock" in parts:
        yield from measure_append_lock(server.database("lock", with_schema=True), seconds)
    if "deliveries" in parts:
        yield from measure_deliveries(server.database("deliveries"), folder, seconds)
    if "proofs" in parts:
        yield from measure_proofs(server.database("proofs", with_schema=True), server.database, folder, seconds)
    if "streams" in parts:
        yield measure_streams(server.database("streams"), folder, seconds)
    if "parse" in parts:
        yield from measure_parsing()
    if "rebuild" in parts:
        small, large = (server.database(name, with_schema=True) for name in ("small_log", "large_log"))
        yield from measure_rebuild(small, large, events)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="of each load (%(default)s)")
    parser.add_argument("--events", type=int, default=EVENTS, help="in the log of the rebuild (%(default)s)")
    parser.add_argument("--only", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--large", action="store_true", help="instead, what a log of ten million events costs")
    parser.add_argument("--large-events", type=int, default=LARGE_EVENTS, help="of that log (%(default)s)")
    arguments = parser.parse_args()
    arguments.parts = arguments.only.split(",")
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if arguments.seconds < 1 or arguments.events < 1_000:
        parser.error("at least a second, and 1,000 events")
    return arguments


def main() -> None:
    """Run the selected measurements."""
    arguments = _arguments()
    # On SIGTERM, exit in order, so that every started process ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    folder = Path(tempfile.mkdtemp(prefix="order-tracking-bench-"))
    # If root runs the benchmarks, the server's own user must be able to enter the folder.
    folder.chmod(0o711)
    try:
        with Server(folder / "state") as server:
            out.print(machine(server.version(), load.generator()), markup=False)
            rows = []
            for row in _measure(server, folder, arguments):
                out.print(f"{row.what}: {row.measured}", markup=False)
                rows.append(row)
        print_table(rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
