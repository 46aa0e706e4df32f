"""``quarantine list|show|retry|discard``."""

import sys
from datetime import UTC, datetime
from typing import Annotated, Final

import typer
from rich.text import Text

from service.cli.console import (
    MISUSED,
    WRONG,
    connected,
    end,
    make_table,
    out,
    run_with_database,
    time_text,
)
from service.database.connections import (
    Connection,
    HeldConnection,
    connect,
)
from service.event_log.store import EventStore
from service.http.pagination import POSITION_MAX
from service.ingest import quarantine as quarantines
from service.ingest.parser import UnreadableError
from service.ingest.quarantine import QuarantineState
from service.ingest.recorder import Recorder, RefusedReportError
from service.text import printable

# For one entry of the quarantine, beside whatever the service is recording.
RETRY_SECONDS_MAX: Final = 10.0
QUARANTINE_PAGE_ENTRIES: Final = 1_000

quarantine = typer.Typer(no_args_is_help=True, add_completion=False)


@quarantine.command("list")
def list_quarantine(
    state: Annotated[QuarantineState | None, typer.Option(help="Only entries of this state.")] = None,
) -> None:
    """List what could not be understood, newest first."""

    async def work(dsn: str) -> int:
        table = make_table("entry", "received at", "seen", "state", "reason")
        before = POSITION_MAX
        async with connected(dsn) as connection:
            while page := await quarantines.entries_page(connection, before, state, QUARANTINE_PAGE_ENTRIES):
                for entry in page:
                    received_at = time_text(entry.received_at)
                    reason = Text(printable(entry.reason))
                    table.add_row(
                        str(entry.quarantine_id), received_at, str(entry.times_seen), entry.state, reason
                    )
                before = page[-1].quarantine_id
        out.print(table)
        return 0

    run_with_database(work)


@quarantine.command("show")
def show_quarantine(
    quarantine_id: int,
    raw: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--raw", help="Write the body alone, byte for byte.")
    ] = False,
) -> None:
    """Show one entry and its body."""

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            entry = await _quarantine_entry(connection, quarantine_id)
        if raw:
            sys.stdout.buffer.write(entry.body or b"")
            return 0
        for name, value in entry._asdict().items():
            if name != "body" and value is not None:
                out.print(f"{name:<14} {printable(str(value))}", markup=False)
        out.print(
            f"{'body':<14} {printable((entry.body or b'').decode(errors='backslashreplace'))}",
            markup=False,
        )
        return 0

    run_with_database(work)


async def _quarantine_entry(connection: Connection, quarantine_id: int) -> quarantines.QuarantineEntry:
    try:
        return await quarantines.find_entry(connection, quarantine_id)
    except quarantines.UnknownEntryError as error:
        end(str(error))


@quarantine.command("retry")
def retry_quarantine(
    quarantine_ids: Annotated[list[int] | None, typer.Argument(help="The entries.")] = None,
    every: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--all", help="Every open entry, the oldest first.")
    ] = False,
) -> None:
    """Record entries as ordinary reports, now that they are understood; exit 1 where one still is not."""
    if bool(quarantine_ids) == every:
        end("give either entries or --all", MISUSED)

    async def work(dsn: str) -> int:
        held = HeldConnection(lambda: connect(dsn))
        recorder = Recorder(
            EventStore(held),
            lambda _events, _positions: None,
            queue_reports_max=1,
            seconds_max=RETRY_SECONDS_MAX,
        )
        left = 0
        async with connected(dsn) as connection:
            numbers = quarantine_ids or await quarantines.open_entries(connection)
            if not numbers:
                out.print("no entry is open")
            for number in numbers:
                entry = await _quarantine_entry(connection, number)
                try:
                    receipt = await recorder.record(quarantines.report_of(entry), datetime.now(UTC))
                except (
                    UnreadableError,
                    RefusedReportError,
                    quarantines.NotOpenError,
                    quarantines.UnknownEntryError,
                ) as error:
                    left += 1
                    out.print(f"{number}: {printable(str(error))}", markup=False)
                else:
                    place = f"version {receipt.version} of {printable(receipt.order_no)}"
                    out.print(f"{number}: {receipt.outcome}, {place}", markup=False)
        await held.close()
        return WRONG if left else 0

    run_with_database(work)


@quarantine.command("discard")
def discard_quarantine(quarantine_id: int, reason: str) -> None:
    """Say of an entry that nothing will come of it, and why; it stays."""

    async def work(dsn: str) -> int:
        async with connected(dsn) as connection:
            try:
                await quarantines.discard(connection, quarantine_id, reason)
            except (quarantines.UnknownEntryError, quarantines.NotOpenError) as error:
                end(str(error))
            except ValueError as error:
                end(str(error), MISUSED)
        out.print("discarded")
        return 0

    run_with_database(work)
