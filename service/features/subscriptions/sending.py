"""One attempt to deliver: a signed request to an endpoint, and what became of it."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from time import monotonic, time
from typing import Final, Literal, NamedTuple, TypeAlias
from uuid import uuid4

import aiohttp
from aiohttp import hdrs
from aiohttp.abc import AbstractResolver
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12
from yarl import URL

from service.database.log_identity import LogIdentity
from service.features.subscriptions.message import OrderMessage, TestMessage, encode_test, make_message_id
from service.features.subscriptions.responses import (
    LIMITS,
    UNREAD_BYTES_MAX,
    EndpointConnection,
    ExcessError,
    ResponseLimits,
)
from service.features.subscriptions.subscription import Subscription, SubscriptionReason, SubscriptionState
from service.features.subscriptions.targets import ForbiddenAddressError, make_connector
from service.http.addresses import Network
from service.http.budgets import Budgets
from service.http.endpoints import OutgoingRequest
from service.http.request_ids import TRACE_HEADER
from service.http.responses import LOG_HEADER
from service.standard_webhooks import ID_HEADER, SIGNATURE_HEADER, TIMESTAMP_HEADER, sign
from service.version import build_info

ERROR_CHARACTERS_MAX: Final = 1_000
# A later time in Retry-After is ignored.
RETRY_AFTER_SECONDS_MAX: Final = 86_400.0
SUCCESS: Final = range(200, 300)
# For a character that cannot be shown.
REPLACEMENT: Final = "\ufffd"
GONE: Final = 410
LOOP_DETECTED: Final = 508

# What an endpoint receives.
HEADERS: Final = {
    ID_HEADER: "The id of the message: the same at each attempt and at each replay.",
    TIMESTAMP_HEADER: "The time of this attempt, in seconds since 1970.",
    SIGNATURE_HEADER: "One or two signatures by Standard Webhooks, separated by a space.",
    LOG_HEADER: "The id of the log that positions belong to.",
}
REQUESTS: Final = (
    OutgoingRequest(
        "orderEvent",
        "Receive an event of an order.",
        OrderMessage,
        {**HEADERS, TRACE_HEADER: "The trace of the report, if it had one."},
    ),
    OutgoingRequest("test", "Receive a test request.", TestMessage, HEADERS),
)

# "gone": the endpoint wants no further request. "loop": the request came back to this service.
AttemptOutcome: TypeAlias = Literal["delivered", "failed", "gone", "loop"]
# These outcomes stop the subscription until an operator resumes it.
ENDINGS: Final[Mapping[AttemptOutcome, tuple[SubscriptionState, SubscriptionReason]]] = {
    "gone": ("disabled", "gone"),
    "loop": ("paused", "loop"),
}


class Attempt(NamedTuple):
    """The result of one request.

    Attributes:
        outcome: what it means for the subscription.
        seconds: how long it took.
        status: the status of the response, None if there was none.
        error: why it failed, None if it did not.
        retry_after_seconds: how long the endpoint asked to wait, None if it did not.
    """

    outcome: AttemptOutcome
    seconds: float
    status: int | None = None
    error: str | None = None
    retry_after_seconds: float | None = None


class TestResult(TypedDict):
    """The result of a test request. ``status`` is null if the endpoint did not respond."""

    delivered: bool
    status: int | None
    ms: int
    error: str | None


class Sender:
    """Sends messages to endpoints, and only to allowed addresses.

    Args:
        networks: the networks that are allowed besides the public internet.
        log: the log's id, by which this service recognises its own requests.
        resolver: resolves host names; None for the system's.
        limits: the limits of each response.
        budgets: the budgets of the process; None for new ones.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        log: LogIdentity,
        resolver: AbstractResolver | None = None,
        *,
        limits: ResponseLimits = LIMITS,
        budgets: Budgets | None = None,
    ) -> None:
        self.networks = networks
        self.resolver = resolver
        self._log = log
        self._limits = limits
        self._budgets = budgets or Budgets()
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        # Endpoints whose connections are used once: they may close them after any response.
        self._closing: set[tuple[str, str | None, int | None]] = set()
        self._user_agent = f"order-tracking/{build_info()['version']}"

    async def send(
        self, url: URL, secrets: Sequence[str], message_id: str, body: bytes, traceparent: str | None = None
    ) -> Attempt:
        """Send a message once, and return the result.

        Args:
            url: the endpoint.
            secrets: the secrets to sign with.
            message_id: the message's id.
            body: the message's body.
            traceparent: the trace that the event belongs to, None if it has none.
        """
        headers = {
            **sign(secrets, message_id, time(), body),
            hdrs.CONTENT_TYPE: "application/json",
            hdrs.USER_AGENT: self._user_agent,
            hdrs.ACCEPT_ENCODING: "identity",
            LOG_HEADER: self._log.log_id,
        }
        if traceparent is not None:
            headers[TRACE_HEADER] = traceparent
        origin = (url.scheme, url.host, url.port)
        if origin in self._closing:
            headers[hdrs.CONNECTION] = "close"
        began = monotonic()
        try:
            response = await self._session(url).post(url, data=body, headers=headers, allow_redirects=False)
        except TimeoutError:
            error_text = f"no response within {self._limits.attempt_seconds_max:g} s"
            return Attempt("failed", monotonic() - began, None, error_text)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
                # Perhaps the endpoint had closed the connection, which was to be used again.
                self._closing.add(origin)
            return Attempt("failed", monotonic() - began, None, _clean(_describe(error)))
        return self._judge(response, monotonic() - began, await self._read_start(response))

    async def close(self) -> None:
        """Close every connection."""
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    def _session(self, url: URL) -> aiohttp.ClientSession:
        session = self._sessions.get(url.scheme)
        if session is None:
            connector = make_connector(self.networks, self.resolver, is_secure=url.scheme == "https")
            # aiohttp has no public way to choose the protocol of its connections.
            connect = partial(EndpointConnection, asyncio.get_running_loop(), self._limits, self._budgets)
            connector._factory = connect  # type: ignore[assignment]  # noqa: SLF001 - it makes a ResponseHandler
            session = self._sessions[url.scheme] = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                # A response is never decompressed: a few bytes could become gigabytes.
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(total=self._limits.attempt_seconds_max),
                read_bufsize=UNREAD_BYTES_MAX,
            )
        return session

    async def _read_start(self, response: aiohttp.ClientResponse) -> bytes:
        """Return a response's body; of a long or slow one, only the start. Its connection is closed then."""
        start, bytes_max = bytearray(), self._limits.body_bytes_max
        if response.content.is_eof():
            # The usual case: it arrived together with its head.
            while not response.content.at_eof():
                start += response.content.read_nowait(bytes_max - len(start))
                if len(start) >= bytes_max:
                    break
            response.release()
            return bytes(start)
        try:
            async with asyncio.timeout(self._limits.body_seconds_max):
                while len(start) < bytes_max:
                    part = await response.content.read(bytes_max - len(start))
                    if not part:
                        break
                    start += part
        except (TimeoutError, aiohttp.ClientError, OSError):
            # The status is the answer.
            pass
        finally:
            response.release()
        return bytes(start)

    def _judge(self, response: aiohttp.ClientResponse, seconds: float, body: bytes) -> Attempt:
        status = response.status
        if status in SUCCESS:
            return Attempt("delivered", seconds, status)
        # Cut first: of a large body, only the start is cleaned.
        text = _clean(body[: 4 * ERROR_CHARACTERS_MAX].decode(errors="replace"))[:ERROR_CHARACTERS_MAX]
        error = f"{status}: {text}" if text else f"{status} {_clean(response.reason or '')}".rstrip()
        outcome: AttemptOutcome = "failed"
        if status == GONE:
            outcome = "gone"
        elif status == LOOP_DETECTED and response.headers.get(LOG_HEADER) == self._log.log_id:
            outcome, error = "loop", f"{status}: the URL leads back to this service"
        return Attempt(
            outcome, seconds, status, error, _parse_retry_after(response.headers.get(hdrs.RETRY_AFTER))
        )


async def send_test(sender: Sender, found: Subscription, secrets: Sequence[str]) -> TestResult:
    """Send a test request to a subscription's endpoint, which carries no order, and return its result."""
    subscription_id = found["subscription_id"]
    message_id = make_message_id(subscription_id, str(uuid4()))
    attempt = await sender.send(URL(found["url"]), secrets, message_id, encode_test(subscription_id))
    return {
        "delivered": attempt.outcome == "delivered",
        "status": attempt.status,
        "ms": round(attempt.seconds * 1_000),
        "error": attempt.error,
    }


def _describe(error: Exception) -> str:
    """Return why no response came."""
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.os_error
        # The text of the event loop repeats the address.
        is_plain = cause.errno is not None and not isinstance(cause, ForbiddenAddressError)
        reason = os.strerror(cause.errno) if is_plain and cause.errno else cause.strerror or str(cause)
        return f"cannot connect to {error.host}:{error.port}: {reason}"
    # Other texts may have the URL, and so a token in it.
    if isinstance(error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError):
        return "the connection was closed before a response"
    if isinstance(error, ExcessError):
        return f"the response exceeds a limit: {error}"
    if isinstance(error, aiohttp.ClientResponseError):
        return f"the response is not valid HTTP: {error.message}"
    return f"the request failed: {type(error).__name__}"


def _clean(text: str) -> str:
    """Return a text on one line, in which every character can be stored and printed."""
    words = " ".join(text.encode(errors="replace").decode().split())
    return "".join(character if character.isprintable() else REPLACEMENT for character in words)


def _parse_retry_after(value: str | None) -> float | None:
    """Return the seconds that a header asks to wait, None if it is absent, invalid or too long."""
    if value is None:
        return None
    try:
        if value.strip().isdecimal():
            seconds = float(value)
        else:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return seconds if 0 <= seconds <= RETRY_AFTER_SECONDS_MAX else None
