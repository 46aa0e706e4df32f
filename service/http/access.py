"""Access: requests are admitted by their API keys; in the open mode, this machine needs none."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import wraps
from time import monotonic
from typing import Final

import structlog
from aiohttp import hdrs, web
from multidict import istr

from service.batcher import Batcher
from service.database.api_keys import USE_INTERVAL, ApiKey, Scope, hash_secret, list_keys, record_use
from service.database.connections import READER, DedicatedConnection, StorageUnavailableError
from service.http.problems import ProblemError, ProblemType
from service.settings import is_loopback

logger = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# The age at which cached keys are read again, and so the longest time that a revoked key still works.
CACHE_SECONDS_MAX: Final = 1.0
# Before a request is refused, cached keys that are older than this are read again: a new key works at once.
REFRESH_SECONDS: Final = 0.1
WAITING_MAX: Final = 16_384
KEY_COOKIE: Final = "order_tracking_key"
SAFE_METHODS: Final = ("GET", "HEAD")
# A browser sends these values of Sec-Fetch-Site unless a page of another site made the request.
OWN_SITE: Final = ("same-origin", "none")
# Proxies and tunnels add at least one of these.
FORWARDING_HEADERS: Final = (
    *(istr("X-Forwarded-For"), istr("X-Forwarded-Host"), istr("X-Forwarded-Proto"), istr("X-Forwarded-Port")),
    *(istr("X-Forwarded-Server"), istr("Forwarded"), istr("X-Real-IP"), istr("Via")),
)

# The one who reads without a key, in the open mode. No key has an empty name.
OPEN_READER: Final = ""

_PORT: Final = re.compile(r":\d+$")


class Access:
    """Admits requests by their API keys, which it reads at most once a second.

    Args:
        dedicated: a dedicated connection to read keys with, so that slow reads do not delay it.
        seconds_max: the time limit for reading them.
        is_open: whether this machine's requests need no key until the first key is created.
    """

    def __init__(self, dedicated: DedicatedConnection, seconds_max: float, *, is_open: bool) -> None:
        self._dedicated = dedicated
        self._is_open = is_open
        self._keys: Mapping[bytes, ApiKey] = {}
        self._valid_until = 0.0
        self._retry_at = 0.0
        self._used_at: dict[str, datetime] = {}
        self._recording: asyncio.Task[None] | None = None
        # Requests that arrive while the keys are being read wait for the same read.
        self._reads: Batcher[None, None] = Batcher(
            self._read_keys, batch_items_max=WAITING_MAX, queue_items_max=WAITING_MAX, seconds_max=seconds_max
        )

    def require(self, scope: Scope, handler: Handler) -> Handler:
        """Return a handler that first requires a key of this scope; ``admin`` includes ``read``."""

        @wraps(handler)
        async def guarded(request: web.Request) -> web.StreamResponse:
            await self.admit(request, scope)
            refuse_other_sites(request)
            return await handler(request)

        guarded.scope = scope  # type: ignore[attr-defined]  # for tests that walk all routes
        return guarded

    async def admit(self, request: web.Request, scope: Scope) -> None:
        """Admit a request by its key. An endless response calls this again from time to time.

        Raises:
            ProblemError: 401, the key is missing or invalid; 403, its scope is too small, or the host is wrong.
            StorageUnavailableError: the keys cannot be read.
        """
        if monotonic() >= self._valid_until:
            await self._reads.submit(None)
        if not self._keys and self._is_open:
            refuse_other_machines(request)
            READER.set(OPEN_READER)
            return
        try:
            self._admit(request, scope)
        except ProblemError:
            # The request's key may be new.
            if self._valid_until - monotonic() > CACHE_SECONDS_MAX - REFRESH_SECONDS:
                raise
            await self._reads.submit(None)
            self._admit(request, scope)

    async def has_no_keys(self) -> bool:
        """Return whether no key has ever been created."""
        await self._reads.submit(None)
        return not self._keys

    async def is_valid(self, secret: str) -> bool:
        """Return whether a key is valid now."""
        await self._reads.submit(None)
        key = self._keys.get(hash_secret(secret))
        return key is not None and key.is_valid(datetime.now(UTC))

    async def _read_keys(self, callers: Sequence[None], due: float) -> Sequence[None]:
        if monotonic() < self._retry_at:
            raise StorageUnavailableError("the API keys could not be read a moment ago")
        try:
            async with asyncio.timeout_at(due), self._dedicated.connection() as connection:
                self._keys = {key.secret_sha256: key for key in await list_keys(connection)}
        except (StorageUnavailableError, TimeoutError):
            # Requests that waited for this read have no time left for another one.
            self._retry_at = monotonic() + CACHE_SECONDS_MAX
            raise
        self._valid_until = monotonic() + CACHE_SECONDS_MAX
        return callers

    def _admit(self, request: web.Request, scope: Scope) -> None:
        if not self._keys:
            raise _unauthorized("create an API key first: order-tracking keys create")
        secret = _read_secret(request)
        if not secret:
            raise _unauthorized("an API key is required: Authorization: Bearer ...")
        now = datetime.now(UTC)
        key = self._keys.get(hash_secret(secret))
        if key is None or not key.is_valid(now):
            raise _unauthorized("the API key is unknown, revoked or expired", 'error="invalid_token"')
        if scope == "admin" and key.scope != "admin":
            headers = {"WWW-Authenticate": 'Bearer error="insufficient_scope", scope="admin"'}
            raise ProblemError(
                ProblemType.FORBIDDEN, "an API key with the scope admin is required", headers=headers
            )
        READER.set(key.name)
        used_at = self._used_at.get(key.name, key.last_used_at)
        is_recording = self._recording is not None and not self._recording.done()
        if not is_recording and (used_at is None or used_at < now - USE_INTERVAL):
            self._used_at[key.name] = now
            self._recording = asyncio.create_task(self._record_use(key.name, now), name="record a key's use")

    async def _record_use(self, name: str, now: datetime) -> None:
        """Record that a key was used. No request waits for it or fails with it."""
        try:
            async with self._dedicated.connection() as connection:
                await record_use(connection, name, now)
        except Exception as error:  # noqa: BLE001 - the next use is recorded instead
            logger.warning("the use of a key could not be recorded", error=repr(error))


def _read_secret(request: web.Request) -> str:
    """Return a request's key: from its header or, because browsers cannot set that, from a cookie."""
    kind, _, secret = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if kind:
        return secret.strip() if kind.lower() == "bearer" else ""
    return request.cookies.get(KEY_COOKIE, "") if request.method in SAFE_METHODS else ""


def _unauthorized(detail: str, *challenge: str) -> ProblemError:
    headers = {"WWW-Authenticate": ", ".join(('Bearer realm="order-tracking"', *challenge))}
    return ProblemError(ProblemType.UNAUTHORIZED, detail, headers=headers)


def refuse_other_sites(request: web.BaseRequest) -> None:
    """Refuse a request that a page of another site made in a browser, unless the user followed a link.

    Raises:
        ProblemError: 403.
    """
    headers = request.headers
    is_own = headers.get("Sec-Fetch-Site", "none") in OWN_SITE
    if request.method in SAFE_METHODS:
        # A hidden request would reveal to the other site, by its status or its duration, whether an order exists.
        is_link = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
        is_own = is_own or is_link
    elif (origin := headers.get(hdrs.ORIGIN) or headers.get(hdrs.REFERER)) is not None:
        is_own = is_own and origin.partition("://")[2].partition("/")[0] == headers.get(hdrs.HOST)
    if not is_own:
        raise ProblemError(ProblemType.FORBIDDEN, "pages of other sites may not make this request")


def refuse_other_machines(request: web.BaseRequest) -> None:
    """Refuse a request that may come from another machine: in the open mode, only this machine is admitted.

    A proxy passes on the requests of strangers. A site could point its own host name at this machine, and
    would then read everything (DNS rebinding).

    Raises:
        ProblemError: 403.
    """
    headers = request.headers
    if not is_loopback(_PORT.sub("", headers.get(hdrs.HOST, "localhost")).strip("[]")):
        detail = "without a webhook token and an API key, only localhost may be used as the host name"
        raise ProblemError(ProblemType.FORBIDDEN, detail)
    for name in FORWARDING_HEADERS:
        if name in headers:
            detail = (
                f"the request came through a proxy ({name}), but anyone could read and write: "
                "set ORDER_TRACKING_WEBHOOK_TOKENS and create an API key first (order-tracking keys create)"
            )
            raise ProblemError(ProblemType.FORBIDDEN, detail)
