import asyncio
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import structlog
import typer
import uvloop
from aiohttp import http_parser

from service.cli.startup import configure_logs, greet, log_vocabulary, note_wait, record_opened, warn
from service.console import EXIT_USAGE, completes, fail, stop_event, tune_gc
from service.database.embedded_postgres import EmbeddedPostgres
from service.features.settings import Settings, read_settings
from service.http.server import raise_open_files_limit
from service.http.sockets import InheritedFileError, take_inherited_sockets
from service.ingest.webhook_auth import WebhookAuth
from service.listening import PortError, listening
from service.settings import PREFIX, REMOVED, SettingsError, find_removed, is_loopback

logger = structlog.get_logger()


def serve(
    processes: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    settings = read_settings()
    try:
        inherited = take_inherited_sockets()
    except InheritedFileError as error:
        fail(str(error), EXIT_USAGE)
    if inherited:
        settings = settings.model_copy(update=_address_of(inherited))
    configure_logs(settings)
    _warn_of_removed(
        {"--processes": REMOVED[f"{PREFIX}PROCESSES"]} if processes is not None else find_removed()
    )
    if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
        fail("aiohttp has no C parser here: install an aiohttp wheel that was built for this platform")
    raise_open_files_limit()
    # Closing the terminal also stops the service, unless it was started with nohup. Elsewhere SIGHUP means that
    # the tokens are to be read again, which they are at start anyway.
    if sys.stdin is None or not sys.stdin.isatty():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if settings.database_url:
        uvloop.run(_serve(settings, settings.own_dsn, None, inherited))
    else:
        with EmbeddedPostgres(settings.state_dir, bindir=settings.pg_bindir) as server:
            uvloop.run(_serve(settings, server.dsn, server, inherited))


def _address_of(inherited: Sequence[socket.socket]) -> dict[str, str | int]:
    """Return the host and port of inherited sockets as settings; of several, one that other machines reach.

    Whether the service is open to this machine's programs depends on them.
    """
    names: list[tuple[str, int]] = [one.getsockname()[:2] for one in inherited]
    host, port = min(names, key=lambda name: is_loopback(name[0]))
    return {"host": host, "port": port}


def _warn_of_removed(removed: Mapping[str, str]) -> None:
    for name, replacement in removed.items():
        logger.warning(
            "a setting has no effect any more: one service starts", setting=name, instead=replacement
        )


async def _serve(
    settings: Settings, dsn: str, server: EmbeddedPostgres | None, inherited: Sequence[socket.socket]
) -> None:
    keeper = asyncio.create_task(server.keep_running(logger.warning)) if server is not None else None
    ends_with_terminal = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    hung_up = asyncio.Event()
    if not ends_with_terminal:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up.set)
    with stop_event(
        signal.SIGINT, signal.SIGTERM, *((signal.SIGHUP,) if ends_with_terminal else ())
    ) as stopped:
        try:
            await _serve_until(stopped, hung_up, settings, dsn, inherited)
        except PortError as error:
            fail(str(error))
        finally:
            if keeper is not None:
                keeper.cancel()
                await asyncio.gather(keeper, return_exceptions=True)


async def _serve_until(
    stopped: asyncio.Event,
    hung_up: asyncio.Event,
    settings: Settings,
    dsn: str,
    inherited: Sequence[socket.socket],
) -> None:
    """Serve until the service is stopped, and read the tokens again when it is hung up."""
    async with listening(settings, dsn, inherited) as listener:
        starting = asyncio.ensure_future(listener.start_service(partial(note_wait, settings, listener)))
        if not await completes(starting, stopped.wait()):
            return
        service = starting.result()
        async with listener.serving(service) as port:
            reloading = asyncio.create_task(_reload_tokens(service.core.webhook_auth, hung_up))
            is_without_keys = await service.core.access.has_no_keys()
            if not settings.read_only:
                await record_opened(settings, service)
            greet(settings, port, listener.monitoring_port)
            log_vocabulary(service.core.vocabulary)
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
