import asyncio
import logging
import signal
import sys
from functools import partial
from shlex import quote

import structlog
import uvloop
from aiohttp import http_parser

from service.app import Listener, Service, listening
from service.cli.console import completes, fail, show, stop_event, tune_gc
from service.database.connections import StorageUnavailableError
from service.database.embedded_postgres import CREATE_ACCOUNT, EmbeddedPostgres, belongs_to_nobody
from service.database.operations import record_openness, system_user
from service.http.request_ids import add_request_id
from service.http.server import raise_open_files_limit
from service.ingest.webhook_auth import WebhookAuth
from service.program import command_name
from service.settings import Settings, SettingsError, find_exposed_file, read_settings
from service.vocabulary import VocabularyFile

logger = structlog.get_logger()


def serve() -> None:
    settings = read_settings()
    _configure_logs(settings)
    raise_open_files_limit()
    # Closing the terminal also stops the service, unless it was started with nohup. Elsewhere SIGHUP means that
    # the tokens are to be read again, which they are at start anyway.
    if sys.stdin is None or not sys.stdin.isatty():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if settings.database_url:
        uvloop.run(_serve(settings, settings.own_dsn, None))
    else:
        with EmbeddedPostgres(settings.state_dir, bindir=settings.pg_bindir) as server:
            uvloop.run(_serve(settings, server.dsn, server))


async def _serve(settings: Settings, dsn: str, server: EmbeddedPostgres | None) -> None:
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        fail("aiohttp has no C parser here: install an aiohttp wheel that was built for this platform")
    ends_with_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    keeper = asyncio.create_task(server.keep_running(logger.warning)) if server is not None else None
    with stop_event(
        signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if ends_with_terminal else ())
    ) as stopped:
        try:
            async with listening(settings, dsn) as listener:
                hung_up = asyncio.Event()
                loop = asyncio.get_running_loop()
                if not ends_with_terminal:
                    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
                starting = asyncio.ensure_future(listener.start_service(partial(_note, settings, listener)))
                if not await completes(starting, stopped.wait()):
                    return
                service = starting.result()
                async with listener.serving(service) as port:
                    if not ends_with_terminal:
                        loop.add_signal_handler(signal.SIGHUP, _reload_tokens, service.webhook_auth)
                        if hung_up.is_set():
                            _reload_tokens(service.webhook_auth)
                    is_without_keys = await service.access.has_no_keys()
                    if not settings.read_only:
                        await _record_opened(settings, service)
                    _greet(settings, port)
                    _log_vocabulary(service.vocabulary)
                    _warn(settings, is_without_keys=is_without_keys)
                    tune_gc()
                    await stopped.wait()
                    logger.info("stopping")
        except StorageUnavailableError:
            raise
        except OSError as error:
            fail(
                f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}; "
                "choose another with ORDER_TRACKING_PORT or ORDER_TRACKING_HOST"
            )
        finally:
            if keeper is not None:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)


def _note(settings: Settings, listener: Listener, error: StorageUnavailableError) -> None:
    """Note why the service has to wait. The first time, print what it waits for."""
    if not listener.waiting.note(error) or settings.log_format == "json":
        return
    show(f"order-tracking waits for the database at {listener.waiting.database}")
    if listener.port is not None:
        show(f"  until then it responds with 503; the cause is at {_base_url(settings, listener.port)}/readyz")
    sys.stdout.flush()


def _base_url(settings: Settings, port: int) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{port}"


def _greet(settings: Settings, port: int) -> None:
    base = _base_url(settings, port)
    greeting = f"order-tracking is listening on {base}"
    data = "the database at ORDER_TRACKING_DATABASE_URL" if settings.database_url else str(settings.state_dir)
    if settings.log_format == "json":
        logger.info(greeting, data=data)
        return
    body = '{"order_no":"TRY1","cnote":"AWB1","status":"Dikirim"}'
    path = "webhook/<token>" if settings.webhook_tokens else "webhook"
    show(greeting)
    show(f"  its data is in {data}")
    if settings.read_only:
        show("  it only reads, and refuses webhooks with 503")
        show(f"  try: curl {base}/orders")
    else:
        show(f"  try: curl -X PUT {base}/{path} -d '{body}'")
        show(f"       curl {base}/orders/TRY1/timeline")
    sys.stdout.flush()


def _reload_tokens(auth: WebhookAuth) -> None:
    """Read the webhook's tokens again, so that a rotation or a leak needs no restart."""
    try:
        tokens = read_settings().tokens
    except SettingsError as error:
        logger.error("the tokens stay as they were", error=str(error))  # noqa: TRY400 - the message is enough
        return
    if not tokens or not auth.has_tokens:
        logger.error(
            "the tokens stay as they were: restart the service to set the first token or remove the last"
        )
        return
    auth.replace_tokens(tokens)
    logger.info("the tokens were read again", tokens=len(tokens), names=sorted(filter(None, tokens.values())))


async def _record_opened(settings: Settings, service: Service) -> None:
    """Record whether the webhook is open to the network, if that has changed since the last start."""
    is_open = not (settings.webhook_tokens or settings.webhook_hmac_secret or settings.is_local)
    reason = f"host {settings.host}, without ORDER_TRACKING_WEBHOOK_TOKENS" if is_open else None
    async with service.pool.connection() as connection:
        await record_openness(connection, system_user()._replace(via="service"), "webhook", reason)


def _log_vocabulary(vocabulary: VocabularyFile) -> None:
    if vocabulary.path is not None:
        words = len(vocabulary.vocabulary.own_words)
        logger.info("vocabulary file", file=str(vocabulary.path), words=words, sha256=vocabulary.sha256)


def _warn(settings: Settings, *, is_without_keys: bool) -> None:
    """Log what clients and users can reach without a secret, and the command that changes this."""
    if not (settings.webhook_tokens or settings.webhook_hmac_secret or settings.is_local or settings.read_only):
        logger.warning(
            "THE WEBHOOK IS OPEN TO EVERY HOST THAT REACHES THIS ADDRESS: set ORDER_TRACKING_WEBHOOK_TOKENS",
            command=f"{command_name()} token",
        )
    command = f"{command_name()} keys create NAME"
    if settings.is_open and settings.read_only:
        if is_without_keys:
            logger.warning(
                "API and pages are open to every program of this machine: create an API key in the primary "
                "before you put a proxy or a tunnel in front",
                command=command,
            )
    elif settings.is_open:
        logger.warning(
            "open to every program of this machine: set ORDER_TRACKING_WEBHOOK_TOKENS and create an API key "
            "before you put a proxy or a tunnel in front",
            open="webhook, API and pages" if is_without_keys else "webhook",
            command=command,
        )
    elif is_without_keys:
        logger.warning("API and pages are closed until you create an API key", command=command)
    if not settings.database_url and belongs_to_nobody(settings.state_dir):
        logger.warning(
            "the database is open to every process of the user nobody: create the service's own account and "
            "restart",
            command=CREATE_ACCOUNT,
        )
    if file := find_exposed_file():
        logger.warning(
            "other users can read the secrets in the settings file", command=f"chmod 600 {quote(str(file))}"
        )


def _configure_logs(settings: Settings) -> None:
    human, json = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()), structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            human if settings.log_format == "human" else json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # aiohttp logs a traceback for every malformed request; the response contains all that the sender needs.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
