import asyncio
import signal
import sys
from functools import partial
from typing import Annotated

import structlog
import typer
import uvloop
from aiohttp import http_parser

from service.app import listening
from service.cli.console import EXIT_USAGE, completes, fail, stop_event, tune_gc
from service.cli.startup import configure_logs, greet, log_vocabulary, note_wait, record_opened, warn
from service.cli.supervisor import embedded_settings, supervise
from service.database.connections import StorageUnavailableError
from service.database.embedded_postgres import EmbeddedPostgres
from service.http.server import raise_open_files_limit
from service.ingest.webhook_auth import WebhookAuth
from service.settings import Settings, SettingsError, check_processes, read_settings

logger = structlog.get_logger()


def serve(
    processes: Annotated[
        int | None,
        typer.Option(
            help="The number of processes that serve the port together; instead of ORDER_TRACKING_PROCESSES.",
        ),
    ] = None,
) -> None:
    settings = read_settings()
    if processes is not None:
        try:
            settings = settings.model_copy(update={"processes": check_processes(processes)})
        except ValueError as error:
            fail(f"--processes: {error}", EXIT_USAGE)
    configure_logs(settings)
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        fail("aiohttp has no C parser here: install an aiohttp wheel that was built for this platform")
    raise_open_files_limit()
    # Closing the terminal also stops the service, unless it was started with nohup. Elsewhere SIGHUP means that
    # the tokens are to be read again, which they are at start anyway.
    if sys.stdin is None or not sys.stdin.isatty():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if settings.database_url:
        uvloop.run(_serve(settings, settings.own_dsn, None))
    else:
        with EmbeddedPostgres(
            settings.state_dir, bindir=settings.pg_bindir, settings=embedded_settings(settings.processes)
        ) as server:
            uvloop.run(_serve(settings, server.dsn, server))


async def _serve(settings: Settings, dsn: str, server: EmbeddedPostgres | None) -> None:
    keeper = asyncio.create_task(server.keep_running(logger.warning)) if server is not None else None
    ends_with_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    hung_up = asyncio.Event()
    if not ends_with_terminal:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up.set)
    run = _serve_alone if settings.processes == 1 else supervise
    with stop_event(
        signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if ends_with_terminal else ())
    ) as stopped:
        try:
            await run(settings, dsn, stopped, hung_up)
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


async def _serve_alone(settings: Settings, dsn: str, stopped: asyncio.Event, hung_up: asyncio.Event) -> None:
    """Serve with this process alone until it is stopped, and read the tokens again when it is hung up."""
    async with listening(settings, dsn) as listener:
        starting = asyncio.ensure_future(listener.start_service(partial(note_wait, settings, listener)))
        if not await completes(starting, stopped.wait()):
            return
        service = starting.result()
        async with listener.serving(service) as port:
            reloading = asyncio.create_task(_reload_tokens(service.webhook_auth, hung_up))
            is_without_keys = await service.access.has_no_keys()
            if not settings.read_only:
                await record_opened(settings, service)
            greet(settings, port)
            log_vocabulary(service.vocabulary)
            warn(settings, is_without_keys=is_without_keys)
            tune_gc()
            await stopped.wait()
            logger.info("stopping")
            reloading.cancel()
            await asyncio.gather(reloading, return_exceptions=True)


async def _reload_tokens(auth: WebhookAuth, hung_up: asyncio.Event) -> None:
    """Until cancelled, read the webhook's tokens again when the process is hung up.

    So a rotation or a leak needs no restart.
    """
    while True:
        await hung_up.wait()
        hung_up.clear()
        _replace_tokens(auth)


def _replace_tokens(auth: WebhookAuth) -> None:
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
