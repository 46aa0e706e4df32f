"""Access: requests are admitted by their API keys; in the open mode, this machine needs none."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache, wraps
from time import monotonic
from typing import Final, NamedTuple

import structlog
from aiohttp import hdrs, web
from aiohttp.http import HttpVersion11

from service.batcher import Batcher
from service.database import sessions
from service.database.api_keys import USE_INTERVAL, ApiKey, Scope, hash_secret, includes, list_keys, record_use
from service.database.connections import READER, DedicatedConnection, StorageUnavailableError
from service.database.operations import Actor, record_operation
from service.database.sessions import Session
from service.http.auth_refusals import AuthCause, AuthRefusals, RefusedError
from service.http.problems import ProblemType, only_reads
from service.settings import is_loopback

logger = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# The age at which cached keys are read again, and so the longest time that a revoked key still works.
CACHE_SECONDS_MAX: Final = 1.0
# Before a request is refused, cached keys that are older than this are read again: a new key works at once.
REFRESH_SECONDS: Final = 0.1
WAITING_MAX: Final = 16_384
# A key has many spellings of its header, since spaces around it are allowed.
ADMISSIONS_CACHED_MAX: Final = 4_096
SESSION_COOKIE: Final = "order_tracking_session"
# A browser takes a cookie with this prefix only from the host itself, over https.
HOST_PREFIX: Final = "__Host-"
SAFE_METHODS: Final = ("GET", "HEAD")
# A browser sends these values of Sec-Fetch-Site unless a page of another site made the request.
OWN_SITE: Final = ("same-origin", "none")
HOSTS_CACHED_MAX: Final = 64
# Most proxies and tunnels add at least one of these, or one that begins with X-Forwarded.
FORWARDING_HEADERS: Final = frozenset(
    {
        *("forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip"),
        *("cf-connecting-ip", "cdn-loop", "x-original-forwarded-for", "x-envoy-external-address"),
    }
)

_PORT: Final = re.compile(r":\d+$")


class Admission(NamedTuple):
    """Who was admitted, and with which scope."""

    actor: Actor
    scope: Scope


# Without a key, in the open mode.
OPEN_ADMISSION: Final = Admission(Actor("api", None), "admin")
_ADMISSION: Final = web.RequestKey("admission", Admission)


def admission(request: web.Request) -> Admission:
    """Return who was admitted with a request, which a guard must have admitted before."""
    return request[_ADMISSION]


def has_scope(request: web.Request, scope: Scope) -> bool:
    """Return whether a request was admitted with a scope that includes this one; False if no guard did."""
    return _ADMISSION in request and includes(request[_ADMISSION].scope, scope)


class Access:
    """Admits requests by their API keys, which it reads at most once a second.

    Args:
        dedicated: a dedicated connection to read keys with, so that slow reads do not delay it.
        seconds_max: the time limit for reading them.
        refusals: counts the requests that are not admitted.
        is_open: whether this machine's requests need no key until the first key is created.
        is_reader: whether this process only reads: it admits no writing request, and records no use of a key.
    """

    def __init__(
        self,
        dedicated: DedicatedConnection,
        seconds_max: float,
        refusals: AuthRefusals,
        *,
        is_open: bool,
        is_reader: bool = False,
    ) -> None:
        self._dedicated = dedicated
        self._refusals = refusals
        self._is_open = is_open
        self._is_reader = is_reader
        self._keys: Mapping[bytes, ApiKey] = {}
        self._keys_by_name: Mapping[str, ApiKey] = {}
        self._sessions: Mapping[bytes, Session] = {}
        # Of this reading of the keys: who was admitted, by the Authorization header and the required scope.
        self._admissions: dict[tuple[str, Scope], Admission] = {}
        self._valid_until = 0.0
        self._retry_at = 0.0
        # When a use of a key or a session was recorded last, by its name or its hash.
        self._used_at: dict[str | bytes, datetime] = {}
        self._recording: asyncio.Task[None] | None = None
        # Requests that arrive while the keys are being read wait for the same read.
        self._reads: Batcher[None, None] = Batcher(
            self._read_keys, batch_items_max=WAITING_MAX, queue_items_max=WAITING_MAX, seconds_max=seconds_max
        )

    def require(self, scope: Scope, handler: Handler) -> Handler:
        """Return a handler that first requires a key whose scope includes this one."""

        @wraps(handler)
        async def guarded(request: web.Request) -> web.StreamResponse:
            await self.admit(request, scope)
            return await handler(request)

        guarded.scope = scope  # type: ignore[attr-defined]  # for tests that walk all routes
        return guarded

    async def admit(self, request: web.Request, scope: Scope) -> None:
        """Admit a request by its key. An endless response calls this again from time to time.

        Raises:
            RefusedError: 401, the key is missing or invalid; 403, its scope is too small, or a page of another
                site made the request, or, in the open mode, it may come from another machine.
            ProblemError: 503, the request writes, but this process only reads.
            StorageUnavailableError: the keys cannot be read.
        """
        if monotonic() >= self._valid_until:
            await self._reads.submit(None)
        try:
            if not self._keys and self._is_open:
                refuse_other_machines(request)
                admitted = OPEN_ADMISSION
            else:
                header = request.headers.get(hdrs.AUTHORIZATION, "")
                known = self._admissions.get((header, scope))
                admitted = await self._admit_by_key(request, scope) if known is None else known
            refuse_other_sites(request)
        except RefusedError as error:
            self._refusals.count(error.cause, request)
            raise
        if request.method not in SAFE_METHODS:
            self._refuse_writes()
        request[_ADMISSION] = admitted
        READER.set(admitted.actor.name)

    def refuse_other_sites(self, request: web.BaseRequest) -> None:
        """Refuse a request that a page of another site made, and count it; see the function of this name."""
        try:
            refuse_other_sites(request)
        except RefusedError as error:
            self._refusals.count(error.cause, request)
            raise

    async def has_no_keys(self) -> bool:
        """Return whether no key has ever been created."""
        await self._reads.submit(None)
        return not self._keys

    async def open_session(self, request: web.Request, secret: str) -> str | None:
        """Open a session for a key, and return its id; None if the key is not valid.

        Raises:
            ProblemError: 503, this process only reads.
        """
        self._refuse_writes()
        await self._reads.submit(None)
        key = self._keys.get(hash_secret(secret))
        if key is None or not key.is_valid(datetime.now(UTC)):
            self._refusals.count("unknown_key", request)
            return None
        async with self._dedicated.transaction() as connection:
            session_id = await sessions.open_session(connection, key.name)
            await record_operation(connection, Actor("page", key.name), "session_opened", key.name)
        await self._reads.submit(None)
        return session_id

    async def end_session(self, request: web.Request) -> None:
        """End the session that a request's cookie names, if there is one.

        Raises:
            ProblemError: 503, this process only reads.
        """
        self._refuse_writes()
        async with self._dedicated.transaction() as connection:
            name = await sessions.end_session(connection, request.cookies.get(session_cookie(request), ""))
            if name is not None:
                await record_operation(connection, Actor("page", name), "session_ended", name)
        await self._reads.submit(None)

    def _refuse_writes(self) -> None:
        if self._is_reader:
            raise only_reads()

    async def _read_keys(self, callers: Sequence[None], dues: Sequence[float]) -> Sequence[None]:
        if monotonic() < self._retry_at:
            raise StorageUnavailableError("the API keys could not be read a moment ago")
        try:
            async with asyncio.timeout_at(dues[-1]), self._dedicated.connection() as connection:
                keys = await list_keys(connection)
                live = await sessions.list_sessions(connection)
        except (StorageUnavailableError, TimeoutError):
            # Requests that waited for this read have no time left for another one.
            self._retry_at = monotonic() + CACHE_SECONDS_MAX
            raise
        self._keys = {key.secret_sha256: key for key in keys}
        self._keys_by_name = {key.name: key for key in keys}
        self._sessions = {session.session_sha256: session for session in live}
        self._admissions = {}
        # Ended sessions leave their times behind.
        if len(self._used_at) > len(keys) + len(live):
            known = self._keys_by_name.keys() | self._sessions.keys()
            self._used_at = {who: at for who, at in self._used_at.items() if who in known}
        self._valid_until = monotonic() + CACHE_SECONDS_MAX
        return callers

    async def _admit_by_key(self, request: web.Request, scope: Scope) -> Admission:
        try:
            return self._find_key(request, scope)
        except RefusedError:
            # The request's key may be new.
            if self._valid_until - monotonic() > CACHE_SECONDS_MAX - REFRESH_SECONDS:
                raise
            await self._reads.submit(None)
            return self._find_key(request, scope)

    def _find_key(self, request: web.Request, scope: Scope) -> Admission:
        if not self._keys:
            raise _unauthorized("no_key", "create an API key first: order-tracking keys create NAME")
        now = datetime.now(UTC)
        session: Session | None = None
        kind, _, secret = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
        if kind:
            key = self._keys.get(hash_secret(secret.strip())) if kind.lower() == "bearer" else None
        elif session_id := request.cookies.get(session_cookie(request)):
            if (session := self._sessions.get(hash_secret(session_id))) is None:
                raise _unauthorized("ended_session", "the session has ended: sign in again")
            key = self._keys_by_name.get(session.key_name)
            _require_own_page(request)
        else:
            raise _unauthorized("no_key", "an API key is required: Authorization: Bearer ...")
        if key is None or not key.is_valid(now):
            detail = "the API key is unknown, revoked or expired"
            raise _unauthorized("unknown_key", detail, 'error="invalid_token"')
        if not includes(key.scope, scope):
            headers = {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{scope}"'}
            detail = f"an API key with the scope {scope} is required"
            raise RefusedError("scope", ProblemType.FORBIDDEN, detail, headers=headers)
        self._note_use(key, session, now)
        admitted = Admission(Actor("api" if session is None else "page", key.name), key.scope)
        # A key that expires is compared with the time at each request.
        if session is None and key.expires_at is None and len(self._admissions) < ADMISSIONS_CACHED_MAX:
            self._admissions[request.headers[hdrs.AUTHORIZATION], scope] = admitted
        return admitted

    def _note_use(self, key: ApiKey, session: Session | None, now: datetime) -> None:
        if self._is_reader or (self._recording is not None and not self._recording.done()):
            return
        latest = now - USE_INTERVAL
        key_at = self._used_at.get(key.name, key.last_used_at)
        session_at = now if session is None else self._used_at.get(session.session_sha256, session.used_at)
        if key_at is None or min(key_at, session_at) < latest:
            self._used_at[key.name] = now
            if session is not None:
                self._used_at[session.session_sha256] = now
            use = self._record_use(key.name, session, now)
            self._recording = asyncio.create_task(use, name="record a key's use")

    async def _record_use(self, name: str, session: Session | None, now: datetime) -> None:
        """Record that a key and a session were used. No request waits for it or fails with it."""
        try:
            async with self._dedicated.connection() as connection:
                await record_use(connection, name, now)
                if session is not None:
                    await sessions.record_use(connection, session.session_sha256, now)
        except Exception as error:  # noqa: BLE001 - the next use is recorded instead
            logger.warning("the use of a key could not be recorded", error=repr(error))


def session_cookie(request: web.BaseRequest) -> str:
    """Return the name of the cookie with a session's id, which depends on the host of the request."""
    return SESSION_COOKIE if is_local_host(request) else HOST_PREFIX + SESSION_COOKIE


def is_local_host(request: web.BaseRequest) -> bool:
    """Return whether a request names this machine as its host."""
    return _is_local(request.headers.get(hdrs.HOST, "localhost"))


@lru_cache(HOSTS_CACHED_MAX)
def _is_local(host: str) -> bool:
    return is_loopback(_PORT.sub("", host).strip("[]"))


def _require_own_page(request: web.BaseRequest) -> None:
    """Require proof that a page of this service made a writing request: a browser sends a session by itself."""
    headers = request.headers
    if request.method not in SAFE_METHODS and not (hdrs.ORIGIN in headers or hdrs.REFERER in headers):
        detail = "with a session, only this service's own pages may make this request"
        raise RefusedError("other_site", ProblemType.FORBIDDEN, detail)


def _unauthorized(cause: AuthCause, detail: str, *challenge: str) -> RefusedError:
    headers = {"WWW-Authenticate": ", ".join(('Bearer realm="order-tracking"', *challenge))}
    return RefusedError(cause, ProblemType.UNAUTHORIZED, detail, headers=headers)


def refuse_other_sites(request: web.BaseRequest) -> None:
    """Refuse a request that a page of another site made in a browser, unless the user followed a link.

    Raises:
        RefusedError: 403.
    """
    headers = request.headers
    is_own = headers.get("Sec-Fetch-Site", "none") in OWN_SITE
    if request.method in SAFE_METHODS:
        # The status or the duration of a hidden request would reveal to the other site whether an order exists.
        is_link = headers.get("Sec-Fetch-Mode") == "navigate" and headers.get("Sec-Fetch-Dest") == "document"
        is_own = is_own or is_link
    elif (origin := headers.get(hdrs.ORIGIN) or headers.get(hdrs.REFERER)) is not None:
        host = origin.partition("://")[2].partition("/")[0]
        is_own = is_own and host != "" and host.lower() == headers.get(hdrs.HOST, "").lower()
    if not is_own:
        detail = "pages of other sites may not make this request"
        raise RefusedError("other_site", ProblemType.FORBIDDEN, detail)


def refuse_other_machines(request: web.BaseRequest) -> None:
    """Refuse a request that may come from another machine: in the open mode, only this machine is admitted.

    A proxy passes on the requests of strangers. Not every proxy adds a header, but for years nginx spoke
    HTTP/1.0 to its upstream by default, which no browser and no curl does. A site could point its own host name
    at this machine, and would then read everything (DNS rebinding).

    Raises:
        RefusedError: 403.
    """
    if not is_local_host(request):
        detail = "without a webhook token and an API key, only localhost may be used as the host name"
        raise RefusedError("other_machine", ProblemType.FORBIDDEN, detail)
    if request.version < HttpVersion11:
        raise _came_through_proxy("HTTP/1.0; a local program must speak HTTP/1.1")
    for name in request.headers:
        lower = name.lower()
        if lower.startswith("x-forwarded") or lower in FORWARDING_HEADERS:
            raise _came_through_proxy(name)


def _came_through_proxy(sign: str) -> RefusedError:
    detail = (
        f"the request came through a proxy ({sign}), but anyone could read and write: first set "
        "ORDER_TRACKING_WEBHOOK_TOKENS and create an API key (order-tracking keys create NAME)"
    )
    return RefusedError("other_machine", ProblemType.FORBIDDEN, detail)
