"""The command line: ``order-tracking`` or ``python -m service``.

Exit codes: 0 done; 1 something is wrong (an unknown order, a difference, a port taken, a replay already
running, a report that was neither advanced nor repeated); 2 misused.
"""

import asyncio
import logging
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, NoReturn

import aiohttp
import asyncpg
import structlog
import typer
import uvloop
from aiohttp import http_parser
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from yarl import URL

from projections.engine import OutdatedViewError
from projections.rebuild import RebuildRunningError
from service import api_keys
from service import audit as audits
from service import check as checks
from service import quarantine as quarantines
from service.api_keys import Scope
from service.app import calm_garbage_collector, prepare_database, rebuild_views, serving
from service.database import (
    Connection,
    HeldConnection,
    StorageUnavailableError,
    UnsupportedServerError,
    connect,
)
from service.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError, running_dsn
from service.event_store import EventStore, UndecodableEventError
from service.log_reader import LogReader
from service.pages import POSITION_MAX
from service.parser import UnreadableError
from service.quarantine import QuarantineState
from service.recorder import Recorder, RefusedReportError
from service.schema import SCHEMA_VERSION, VIEWS, SchemaError, apply_schema, service_dsn
from service.settings import Settings, SettingsError, read_settings

WRONG: Final = 1
MISUSED: Final = 2

# For one webhook that a person sends by hand.
SEND_SECONDS_MAX: Final = 10.0
# For one entry of the quarantine, beside whatever the service is recording.
RETRY_SECONDS_MAX: Final = 10.0
QUARANTINE_PAGE_ENTRIES: Final = 1_000
TOKEN_BYTES: Final = 32

cli = typer.Typer(
    name="order-tracking",
    help="Event-sourced tracking of orders shipped through Komerce.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
keys_cli = typer.Typer(help="Keys of those who read and operate.", no_args_is_help=True)
quarantine_cli = typer.Typer(help="What could not be understood.", no_args_is_help=True)
cli.add_typer(keys_cli, name="keys")
cli.add_typer(quarantine_cli, name="quarantine")
# Into a pipe or a file as wide as it takes.
PIPED_COLUMNS: Final = 200
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_COLUMNS)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def _end(message: str, code: int = WRONG) -> NoReturn:
    err.print(message, markup=False, style="red")
    raise typer.Exit(code)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Say in one line what an operator can mend."""
    try:
        yield
    except SettingsError as error:
        _end(str(error), MISUSED)
    except RebuildRunningError:
        _end("a replay is running already")
    except (StorageUnavailableError, UnsupportedServerError) as error:
        _end(f"the database cannot be used: {error}")
    except (asyncpg.PostgresError, asyncpg.InterfaceError, UnicodeError) as error:
        _end(f"the database refuses this: {str(error).partition(chr(10))[0]}")
    except UndecodableEventError as error:
        _end(f"the log holds an event that cannot be read: {error}")
    except (SchemaError, EmbeddedPostgresError, OutdatedViewError) as error:
        _end(str(error))


@contextmanager
def _database(settings: Settings) -> Iterator[tuple[str, EmbeddedPostgres | None]]:
    """Yield the database's DSN: the given one, that of a running service, or of one started for the purpose."""
    if settings.database_url:
        yield settings.database_url, None
    elif (dsn := running_dsn(settings.state_dir)) is not None:
        yield dsn, None
    else:
        with EmbeddedPostgres(settings.state_dir, bindir=settings.pg_bindir) as server:
            yield server.dsn, server


def _run_with_database(work: Callable[[str], Coroutine[Any, Any, int]], *, as_service: bool = True) -> NoReturn:
    """Run a piece of work on the configured database, as the service's role or as given; exit as it says."""

    async def run(dsn: str) -> int:
        return await work(await service_dsn(dsn) if as_service else dsn)

    with _plain_errors(), _database(read_settings()) as (dsn, _):
        code = uvloop.run(run(dsn))
    raise typer.Exit(code)


@asynccontextmanager
async def _connected(dsn: str) -> AsyncIterator[Connection]:
    connection = await connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@cli.command()
def serve() -> None:
    """Serve the webhook and the read API until SIGTERM or Ctrl-C."""
    with _plain_errors():
        settings = read_settings()
        _configure_logs(settings)
        if settings.database_url:
            uvloop.run(_serve(settings, settings.database_url, None))
        else:
            with EmbeddedPostgres(settings.state_dir, bindir=settings.pg_bindir) as server:
                uvloop.run(_serve(settings, server.dsn, server))


async def _serve(settings: Settings, dsn: str, server: EmbeddedPostgres | None) -> None:
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        _end("aiohttp runs without its C parser here: install a wheel of it for this platform")
    stopped = asyncio.Event()
    # A terminal that is closed ends it like Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    log = structlog.get_logger()
    keeper = None
    if server is not None:
        keeper = asyncio.create_task(server.keep_running(log.warning))
    try:
        if (own_dsn := await _prepared(dsn, stopped)) is None:
            return
        async with serving(settings, own_dsn) as (port, is_without_keys):
            _greet(settings, port)
            _warn(settings, is_without_keys=is_without_keys)
            calm_garbage_collector()
            await stopped.wait()
            log.info("stopping")
    except StorageUnavailableError:
        raise
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        _end(f"cannot listen on {where}: {error.strerror or error}; set ORDER_TRACKING_PORT or _HOST")
    finally:
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)


async def _prepared(dsn: str, stopped: asyncio.Event) -> str | None:
    """Prepare the database, however long it takes to be there; None where the service is stopped meanwhile."""
    preparing = asyncio.ensure_future(prepare_database(dsn))
    stopping = asyncio.ensure_future(stopped.wait())
    await asyncio.wait([preparing, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not preparing.done():
        preparing.cancel()
        return None
    return await preparing


def _greet(settings: Settings, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    base = f"http://{host}:{port}"
    where = "the database of ORDER_TRACKING_DATABASE_URL" if settings.database_url else str(settings.state_dir)
    if settings.log_format == "json":
        structlog.get_logger().info(f"order-tracking listens on {base}", data=where)
        return
    body = '{"order_no":"TRY1","cnote":"AWB1","status":"Dikirim"}'
    path = "webhook/<token>" if settings.webhook_tokens else "webhook"
    out.print(f"order-tracking listens on {base}", markup=False)
    out.print(f"  its data is in {where}", markup=False)
    out.print(f"  try: curl -X PUT {base}/{path} -d '{body}'", markup=False)
    out.print(f"       curl {base}/orders/TRY1/timeline", markup=False)
    sys.stdout.flush()


def _warn(settings: Settings, *, is_without_keys: bool) -> None:
    """Say what stands open."""
    log = structlog.get_logger()
    if not settings.webhook_tokens and not settings.is_local:
        log.warning(
            "ANYBODY WHO REACHES THIS ADDRESS CAN REPORT: set ORDER_TRACKING_WEBHOOK_TOKENS",
            try_this="order-tracking token",
        )
    if is_without_keys and settings.is_local:
        log.info("reads and operations are open until a first key is made", by="order-tracking keys create")
    elif is_without_keys:
        log.warning("nobody can read or operate before a key is made", by="order-tracking keys create")


def _configure_logs(settings: Settings) -> None:
    human = settings.log_format == "human"
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
            if human
            else structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # aiohttp writes a traceback for every malformed request; the answer tells the sender all there is to tell.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


@cli.command()
def replay(
    view: Annotated[str | None, typer.Option(help="Only this view; all of them if left out.")] = None,
    verify: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--verify", help="Compare a rebuild with the live views; swap nothing.")
    ] = False,
) -> None:
    """Rebuild the views from the log, beside the live ones, and swap them in."""
    views = [known for known in VIEWS if view is None or known.name == view]
    if not views:
        _end(f"there is no view {view}; there are {', '.join(known.name for known in VIEWS)}", MISUSED)

    async def work(dsn: str) -> int:
        calm_garbage_collector()
        held = HeldConnection(lambda: connect(dsn))
        with Progress(
            TextColumn("replaying"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("events"),
            TextColumn("{task.fields[rate]:,.0f}/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=out,
        ) as progress:
            bar = progress.add_task("replay", total=None, rate=0.0)
            began = time.monotonic()

            def show(done: int, total: int) -> None:
                rate = done / (time.monotonic() - began)
                progress.update(bar, completed=done, total=total, rate=rate)

            reader = LogReader(held, lambda: connect(dsn))
            rebuilt = await rebuild_views(dsn, views, reader, show, verify=verify)
        await held.close()
        for one in rebuilt:
            if verify:
                verdict = "equal" if one.differences == 0 else f"{one.differences} rows differ"
                out.print(f"{one.name}: {verdict}")
            else:
                out.print(f"{one.name}: rebuilt and swapped in")
            if one.set_aside:
                out.print(f"{one.name}: {one.set_aside} orders are set aside; GET /projections says why")
        return WRONG if any(one.differences or one.set_aside for one in rebuilt) else 0

    _run_with_database(work)


@cli.command()
def audit(
    order_no: Annotated[str | None, typer.Argument(help="The order to audit.")] = None,
    rejudge: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--rejudge", help="Judge every order's reports again by today's table.")
    ] = False,
) -> None:
    """Print an order's transitions, or what today's table would judge otherwise."""
    if (order_no is None) == (not rejudge):
        _end("give either an order number or --rejudge", MISUSED)

    async def work(dsn: str) -> int:
        async with _connected(dsn) as connection:
            if order_no is not None:
                return await _audit_order(connection, order_no)
            return await _rejudge(dsn)

    _run_with_database(work)


def _table(*columns: str) -> Table:
    """A table that folds what is too long for the terminal, and never cuts it."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


async def _audit_order(connection: Connection, order_no: str) -> int:
    table = Table(
        "version",
        "received at",
        "verdict",
        "from",
        "reported",
        "to",
        "reason",
        title=Text(audits.printable(order_no)),
    )
    async for event in audits.order_events(connection, order_no):
        table.add_row(
            str(event.originator_version),
            event.timestamp.isoformat(timespec="seconds"),
            event.verdict,
            event.previous_status or "-",
            Text(audits.printable(event.reported_status)),
            event.recognised or "-",
            audits.explanation(event),
        )
    if not table.row_count:
        _end(f"nothing was reported of {audits.printable(order_no)}")
    out.print(table)
    return 0


async def _rejudge(dsn: str) -> int:
    held = HeldConnection(lambda: connect(dsn))
    table = _table("order", "version", "reported", "recorded verdict", "today's verdict", "today's status")
    async for change in audits.rejudge(LogReader(held, lambda: connect(dsn))):
        table.add_row(
            Text(audits.printable(change.order_no)),
            str(change.version),
            Text(audits.printable(change.reported_status)),
            change.recorded,
            change.today,
            change.status or "-",
        )
    if not table.row_count:
        out.print("today's table judges every report as it was judged")
        return 0
    out.print(table)
    return WRONG


@cli.command()
def send(
    order_no: str,
    cnote: str,
    status: str,
    url: Annotated[str | None, typer.Option(help="Where to; the configured host and port if left out.")] = None,
) -> None:
    """Send one webhook as Komerce would, and print the receipt."""
    with _plain_errors():
        settings = read_settings()
        token = "".join(f"/{token.get_secret_value()}" for token in settings.webhook_tokens[:1])
        target = url or f"http://{settings.host}:{settings.port}/webhook{token}"
        body = {"order_no": order_no, "cnote": cnote, "status": status}
        code, text = asyncio.run(_put(target, body))
    out.print(text, markup=False)
    if code != 200:  # noqa: PLR2004 - the one answer that means committed
        raise typer.Exit(WRONG)
    raise typer.Exit(0 if '"outcome":"advanced"' in text or '"outcome":"repeated"' in text else WRONG)


async def _put(url: str, body: dict[str, str]) -> tuple[int, str]:
    timeout = aiohttp.ClientTimeout(total=SEND_SECONDS_MAX)
    try:
        async with aiohttp.ClientSession(timeout=timeout) as session, session.put(url, json=body) as response:
            return response.status, await response.text()
    except (aiohttp.ClientError, TimeoutError) as error:
        # Its path may hold a token.
        _end(f"cannot send to {URL(url).origin()}: {error or 'no answer in time'}")


@cli.command()
def token() -> None:
    """Make a good webhook token for ORDER_TRACKING_WEBHOOK_TOKENS."""
    out.print(secrets.token_urlsafe(TOKEN_BYTES), markup=False)


@keys_cli.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="What it is for; shown in lists, never used again.")],
    scope: Annotated[Scope, typer.Option(help="read, or admin: read and operate.")] = "read",
    days: Annotated[
        int | None, typer.Option(min=1, max=36_500, help="When it expires; never if left out.")
    ] = None,
) -> None:
    """Make a key, and show its secret, once."""

    async def work(dsn: str) -> int:
        expires_at = datetime.now(UTC) + timedelta(days=days) if days is not None else None
        async with _connected(dsn) as connection:
            try:
                secret = await api_keys.create_key(connection, name, scope, expires_at)
            except api_keys.KeyNotMadeError as error:
                _end(str(error))
        out.print(secret, markup=False)
        err.print("send it as 'Authorization: Bearer ...'; it cannot be shown again", markup=False)
        return 0

    _run_with_database(work)


@keys_cli.command("list")
def list_keys() -> None:
    """List every key that was ever made."""

    async def work(dsn: str) -> int:
        async with _connected(dsn) as connection:
            keys = await api_keys.all_keys(connection)
        table = _table("name", "scope", "made", "expires", "last used", "revoked")
        for key in keys:
            times = (key.created_at, key.expires_at, key.last_used_at, key.revoked_at)
            table.add_row(Text(key.name), key.scope, *(_time(time) for time in times))
        out.print(table)
        return 0

    _run_with_database(work)


@keys_cli.command("revoke")
def revoke_key(name: str) -> None:
    """Revoke a key for good; it is refused within a second."""

    async def work(dsn: str) -> int:
        async with _connected(dsn) as connection:
            if not await api_keys.revoke_key(connection, name):
                _end(f"there is no key of the name {audits.printable(name)} that is not revoked")
        out.print("revoked")
        return 0

    _run_with_database(work)


@quarantine_cli.command("list")
def list_quarantine(
    state: Annotated[QuarantineState | None, typer.Option(help="Only entries of this state.")] = None,
) -> None:
    """List what could not be understood, newest first."""

    async def work(dsn: str) -> int:
        table = _table("entry", "received at", "seen", "state", "reason")
        before = POSITION_MAX
        async with _connected(dsn) as connection:
            while page := await quarantines.entries_page(connection, before, state, QUARANTINE_PAGE_ENTRIES):
                for entry in page:
                    received_at = _time(entry.received_at)
                    reason = Text(audits.printable(entry.reason))
                    table.add_row(
                        str(entry.quarantine_id), received_at, str(entry.times_seen), entry.state, reason
                    )
                before = page[-1].quarantine_id
        out.print(table)
        return 0

    _run_with_database(work)


@quarantine_cli.command("show")
def show_quarantine(
    quarantine_id: int,
    raw: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--raw", help="Write the body alone, byte for byte.")
    ] = False,
) -> None:
    """Show one entry and its body."""

    async def work(dsn: str) -> int:
        async with _connected(dsn) as connection:
            entry = await _quarantine_entry(connection, quarantine_id)
        if raw:
            sys.stdout.buffer.write(entry.body or b"")
            return 0
        for name, value in entry._asdict().items():
            if name != "body" and value is not None:
                out.print(f"{name:<14} {audits.printable(str(value))}", markup=False)
        out.print(
            f"{'body':<14} {audits.printable((entry.body or b'').decode(errors='backslashreplace'))}",
            markup=False,
        )
        return 0

    _run_with_database(work)


async def _quarantine_entry(connection: Connection, quarantine_id: int) -> quarantines.QuarantineEntry:
    try:
        return await quarantines.find_entry(connection, quarantine_id)
    except quarantines.UnknownEntryError as error:
        _end(str(error))


@quarantine_cli.command("retry")
def retry_quarantine(
    quarantine_ids: Annotated[list[int] | None, typer.Argument(help="The entries.")] = None,
    every: Annotated[  # noqa: FBT002 - a flag of the command line
        bool, typer.Option("--all", help="Every open entry, the oldest first.")
    ] = False,
) -> None:
    """Record entries as ordinary reports, now that they are understood; exit 1 where one still is not."""
    if bool(quarantine_ids) == every:
        _end("give either entries or --all", MISUSED)

    async def work(dsn: str) -> int:
        held = HeldConnection(lambda: connect(dsn))
        recorder = Recorder(
            EventStore(held),
            lambda _events, _positions: None,
            queue_reports_max=1,
            seconds_max=RETRY_SECONDS_MAX,
        )
        left = 0
        async with _connected(dsn) as connection:
            for number in quarantine_ids or await quarantines.open_entries(connection):
                entry = await _quarantine_entry(connection, number)
                try:
                    receipt = await recorder.record(quarantines.report_of(entry), datetime.now(UTC))
                except (UnreadableError, RefusedReportError, quarantines.NotOpenError) as error:
                    left += 1
                    out.print(f"{number}: {audits.printable(str(error))}", markup=False)
                else:
                    place = f"version {receipt.version} of {audits.printable(receipt.order_no)}"
                    out.print(f"{number}: {receipt.outcome}, {place}", markup=False)
        await held.close()
        return WRONG if left else 0

    _run_with_database(work)


@quarantine_cli.command("discard")
def discard_quarantine(quarantine_id: int, reason: str) -> None:
    """Say of an entry that nothing will come of it, and why; it stays."""

    async def work(dsn: str) -> int:
        async with _connected(dsn) as connection:
            try:
                await quarantines.discard(connection, quarantine_id, reason)
            except (quarantines.UnknownEntryError, quarantines.NotOpenError) as error:
                _end(str(error))
            except ValueError as error:
                _end(str(error), MISUSED)
        out.print("discarded")
        return 0

    _run_with_database(work)


def _time(time: datetime | None) -> str:
    return "-" if time is None else time.isoformat(timespec="seconds")


@cli.command()
def check() -> None:
    """Say whether settings, database and schema are in order."""

    async def work(dsn: str) -> int:
        settings = read_settings()
        findings = [*checks.check_settings(settings), *await checks.check(dsn)]
        for finding in findings:
            out.print(f"{finding.kind:<5}  {finding.text}", markup=False)
        return WRONG if any(finding.kind == "WRONG" for finding in findings) else 0

    _run_with_database(work, as_service=False)


@cli.command()
def migrate() -> None:
    """Bring the database's schema to this release, as the owner of the log; 'serve' does it by itself."""

    async def work(dsn: str) -> int:
        async with _connected(dsn) as connection:
            await apply_schema(connection)
        out.print(f"the schema has version {SCHEMA_VERSION}")
        return 0

    _run_with_database(work, as_service=False)


if __name__ == "__main__":
    cli(prog_name="order-tracking")
