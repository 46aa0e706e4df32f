"""The first lines of a service: what it prints and logs when it starts, and the form of its log."""

import logging
import sys
from shlex import quote

import structlog
from structlog.typing import EventDict

from service.app import Service
from service.command_name import command_name
from service.console import printable, show
from service.database.connections import StorageUnavailableError
from service.database.embedded_postgres import CREATE_ACCOUNT, belongs_to_nobody
from service.database.operations import record_openness, system_user
from service.features.settings import Settings
from service.http.request_ids import add_request_id
from service.listening import Listener
from service.settings import find_exposed_file
from service.vocabulary import VocabularyFile

logger = structlog.get_logger()


def note_wait(settings: Settings, listener: Listener, error: StorageUnavailableError) -> None:
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


def greet(settings: Settings, port: int, monitoring_port: int | None) -> None:
    """Print where the service listens and how to try it; with JSON logs, log it."""
    base = _base_url(settings, port)
    greeting = f"order-tracking is listening on {base}"
    data = "the database at ORDER_TRACKING_DATABASE_URL" if settings.database_url else str(settings.state_dir)
    metrics = None if monitoring_port is None else f"{_base_url(settings, monitoring_port)}/metrics"
    if settings.log_format == "json":
        logger.info(greeting, data=data, **({} if metrics is None else {"metrics": metrics}))
        return
    body = '{"order_no":"TRY1","cnote":"AWB1","status":"Dikirim"}'
    path = "webhook/<token>" if settings.webhook_tokens else "webhook"
    show(greeting)
    show(f"  its data is in {data}")
    if metrics is not None:
        show(f"  its own metrics are at {metrics}")
    if settings.read_only:
        show("  it only reads, and refuses webhooks with 503")
        show(f"  try: curl {base}/orders")
    else:
        show(f"  try: curl -X PUT {base}/{path} -d '{body}'")
        show(f"       curl {base}/orders/TRY1/timeline")
    sys.stdout.flush()


async def record_opened(settings: Settings, service: Service) -> None:
    """Record whether the webhook is open to the network, if that has changed since the last start."""
    is_open = not (settings.webhook_tokens or settings.webhook_hmac_secret or settings.is_local)
    reason = f"host {settings.host}, without ORDER_TRACKING_WEBHOOK_TOKENS" if is_open else None
    async with service.core.pool.connection() as connection:
        await record_openness(connection, system_user()._replace(via="service"), "webhook", reason)


def log_vocabulary(vocabulary: VocabularyFile) -> None:
    """Log the file of further status words, if the settings name one."""
    if vocabulary.path is not None:
        words = len(vocabulary.vocabulary.own_words)
        logger.info("vocabulary file", file=str(vocabulary.path), words=words, sha256=vocabulary.sha256)


def warn(settings: Settings, *, is_without_keys: bool) -> None:
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
    if file := find_exposed_file(type(settings)):
        logger.warning(
            "other users can read the secrets in the settings file", command=f"chmod 600 {quote(str(file))}"
        )


def _printable_lines(value: object) -> object:
    """Return a text with its lines escaped, since a traceback has several; any other value unchanged."""
    return "\n".join(map(printable, value.split("\n"))) if isinstance(value, str) else value


def configure_logs(settings: Settings) -> None:
    """Log to standard error in the form of the settings."""

    def escape(_logger: object, _method: str, line: EventDict) -> EventDict:
        """Escape senders' texts, which may hold sequences that a terminal acts on. JSON escapes them anyway."""
        return {name: _printable_lines(value) for name, value in line.items()}

    human, json = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()), structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            add_request_id,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            *((escape, human) if settings.log_format == "human" else (json,)),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    # aiohttp logs a traceback for every malformed request; the response contains all that the sender needs.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
