import sys
from typing import Annotated, Final

import typer

from projections.windows import POSITION_MAX
from service.console import EXIT_FAILURE, EXIT_USAGE, database, dedicated, fail, show, show_table
from service.database.connections import connected
from service.database.operations import system_user
from service.features.settings import read_settings
from service.ingest import quarantine as quarantines
from service.ingest.parser import UnreadableError
from service.ingest.quarantine import NotOpenError, QuarantineState, UnknownEntryError
from service.ingest.recorder import Recorder, UnrecordableReportError

# The time limit for one entry, which competes with the reports that the service records.
RETRY_SECONDS_MAX: Final = 10.0
PAGE_ENTRIES: Final = 1_000
LISTED: Final = ("quarantine_id", "received_at", "times_seen", "state", "reason")

Id = Annotated[int, typer.Argument(help="The number of the entry, as 'quarantine list' shows it.")]
Reason = Annotated[str, typer.Argument(help="Why you discard it; the reason is recorded.")]

quarantine = typer.Typer(no_args_is_help=True, add_completion=False)


@quarantine.command("list")
async def list_entries(
    state: Annotated[QuarantineState | None, typer.Option(help="List only entries in this state.")] = None,
) -> None:
    """List unparseable bodies, newest first."""
    rows: list[tuple[object, ...]] = []
    before = POSITION_MAX
    async with database(read_settings()) as dsn, connected(dsn) as connection:
        while page := await quarantines.entries_page(connection, before, state, PAGE_ENTRIES):
            before = page[-1]["quarantine_id"]
            rows += [tuple(entry[name] for name in LISTED) for entry in page]
    show_table(("entry", "received at", "seen", "state", "reason"), rows)


@quarantine.command("show")
async def show_entry(
    quarantine_id: Id,
    *,
    raw: Annotated[bool, typer.Option("--raw", help="Write only the body, byte for byte.")] = False,
) -> None:
    """Show an entry and its body."""
    async with database(read_settings()) as dsn, connected(dsn) as connection:
        entry, body = await quarantines.find_entry(connection, quarantine_id)
    if raw:
        sys.stdout.buffer.write(body or b"")
        return
    for name, value in {**entry, "body": (body or b"").decode(errors="backslashreplace")}.items():
        if value is not None:
            show(f"{name:<14} {value}")


@quarantine.command("retry")
async def retry_entries(
    quarantine_ids: Annotated[list[int] | None, typer.Argument(help="The numbers of the entries.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Retry every open entry, oldest first.")] = False,
) -> int | None:
    """Parse entries again and record them as reports; exit with 1 if one still cannot be parsed."""
    if bool(quarantine_ids) == every:
        fail("pass either the numbers of entries or --all", EXIT_USAGE)
    failures = 0
    async with database(read_settings()) as dsn, connected(dsn) as connection, dedicated(dsn) as to_log:
        recorder = Recorder(
            to_log,
            lambda *_: None,
            queue_reports_max=1,
            seconds_max=RETRY_SECONDS_MAX,
            recognise=read_settings().vocabulary.recognise,
        )
        numbers = quarantine_ids or await quarantines.open_entries(connection)
        if not numbers:
            show("the quarantine has no open entries")
        for number in numbers:
            entry, body = await quarantines.find_entry(connection, number)
            try:
                receipt = await quarantines.retry(recorder, entry, body, system_user())
                result = f"{receipt['outcome']}, version {receipt['version']} of {receipt['order_no']}"
            except (UnreadableError, UnrecordableReportError, NotOpenError, UnknownEntryError) as error:
                failures += 1
                result = str(error)
            show(f"{number}: {result}")
    return EXIT_FAILURE if failures else None


@quarantine.command("discard")
async def discard_entry(quarantine_id: Id, reason: Reason) -> None:
    """Close an entry that you do not want recorded; its body stays."""
    async with database(read_settings()) as dsn, connected(dsn) as connection:
        try:
            await quarantines.discard(connection, quarantine_id, reason, system_user())
        except ValueError as error:
            fail(error, EXIT_USAGE)
    show("discarded")
