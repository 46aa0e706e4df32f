"""``serve``."""

import asyncio
import logging
import signal
import sys

import structlog
import uvloop
from aiohttp import http_parser

from service.app import calm_garbage_collector, prepare_database, serving
from service.cli.console import end, out, plain_errors
from service.database.connections import StorageUnavailableError
from service.database.embedded_postgres import EmbeddedPostgres
from service.http.request_ids import add_request_id
from service.http.server import allow_open_files
from service.settings import Settings, read_settings


def serve() -> None:
    with plain_errors():
        settings = read_settings()
        _configure_logs(settings)
        allow_open_files()
        if settings.database_url:
            uvloop.run(_serve(settings, settings.database_url, None))
        else:
            with EmbeddedPostgres(settings.state_dir, bindir=settings.pg_bindir) as server:
                uvloop.run(_serve(settings, server.dsn, server))


async def _serve(settings: Settings, dsn: str, server: EmbeddedPostgres | None) -> None:
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        end("aiohttp runs without its C parser here: install a wheel of it for this platform")
    stopped = asyncio.Event()
    # A terminal that is closed ends it like Ctrl-C.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # By nohup it is to outlive the terminal; a shell's background job is still to be ended by SIGINT.
        if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
            continue
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
        end(f"cannot listen on {where}: {error.strerror or error}; set ORDER_TRACKING_PORT or _HOST")
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
    if not (settings.webhook_tokens or settings.webhook_hmac_secret or settings.is_local):
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
            add_request_id,
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
