"""API keys: who may read and who may operate. Of a key's secret the database has only the hash."""

import asyncio
import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import wraps
from time import monotonic
from typing import Final, Literal, NamedTuple, TypeAlias

import asyncpg
import structlog
from aiohttp import hdrs, web

from service.batcher import Batcher
from service.database.connections import Connection, HeldConnection, StorageUnavailableError
from service.http.problems import Handler, Kind, ProblemError
from service.settings import is_loopback

log = structlog.get_logger()

Scope: TypeAlias = Literal["read", "admin"]

# Before a secret, so that scanners of source code can know one.
KEY_PREFIX: Final = "otk_"
SECRET_BYTES: Final = 32
NAME_CHARACTERS_MAX: Final = 100
# All of them are held in memory.
KEYS_MAX: Final = 1_000
# How old what is known of the keys may be: a key that is revoked is refused after this time at most.
KNOWN_SECONDS_MAX: Final = 1.0
# Who is refused has them looked at again after this time, so that a new key is good at once.
LOOK_AGAIN_SECONDS: Final = 0.1
# The last use of a key is written once in this time at most.
USE_NOTED: Final = timedelta(minutes=1)
WAITING_MAX: Final = 16_384
KEY_COOKIE: Final = "order_tracking_key"
SAFE_METHODS: Final = ("GET", "HEAD")
# What a browser says of a request that another site's page made.
OWN_SITE: Final = ("same-origin", "none")

_LOCAL_HOSTS: Final = ("localhost", "127.0.0.1")
_PORT: Final = re.compile(r":\d+$")

ALL_KEYS: Final = """
    SELECT name, scope, secret_sha256, created_at, expires_at, last_used_at, revoked_at
    FROM api_keys ORDER BY created_at, name LIMIT $1
"""
ADD_KEY: Final = """
    INSERT INTO api_keys (name, scope, secret_sha256, expires_at)
    SELECT $1, $2, $3, $4 WHERE (SELECT count(*) FROM api_keys) < $5
"""
REVOKE_KEY: Final = "UPDATE api_keys SET revoked_at = now() WHERE name = $1 AND revoked_at IS NULL"
NOTE_USE: Final = """
    UPDATE api_keys SET last_used_at = $2 WHERE name = $1 AND (last_used_at IS NULL OR last_used_at < $3)
"""


class ApiKey(NamedTuple):
    """A key, without its secret."""

    name: str
    scope: Scope
    secret_sha256: bytes
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None

    def is_valid(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyNotMadeError(Exception):
    """A key cannot be made as asked. ``str()`` says why."""


async def all_keys(connection: Connection) -> list[ApiKey]:
    """Return every key that was ever made, the oldest first."""
    return [ApiKey(*row) for row in await connection.fetch(ALL_KEYS, KEYS_MAX)]


async def create_key(connection: Connection, name: str, scope: Scope, expires_at: datetime | None) -> str:
    """Make a key and return its secret, which nobody can be told again.

    Raises:
        KeyNotMadeError: the name is taken or no name, or there are too many keys.
    """
    if not name.isprintable() or not 0 < len(name.strip()) <= NAME_CHARACTERS_MAX:
        raise KeyNotMadeError(f"a name has 1 to {NAME_CHARACTERS_MAX} printable characters")
    secret = KEY_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    try:
        done = await connection.execute(ADD_KEY, name, scope, _sha256(secret), expires_at, KEYS_MAX)
    except asyncpg.UniqueViolationError:
        raise KeyNotMadeError(f"there is a key of the name {name}: revoked ones keep theirs") from None
    if done != "INSERT 0 1":
        raise KeyNotMadeError(f"there are {KEYS_MAX} keys already")
    return secret


async def revoke_key(connection: Connection, name: str) -> bool:
    """Revoke a key for good; return whether there was one of this name that was not revoked."""
    return await connection.execute(REVOKE_KEY, name) == "UPDATE 1"


def _sha256(secret: str) -> bytes:
    # The secret has 256 random bits: nothing is gained by a slow hash, or by comparing in constant time.
    return hashlib.sha256(secret.encode(errors="replace")).digest()


class Access:
    """Lets requests through by their keys.

    Args:
        held: where the keys are: a connection that waits for no reader.
        seconds_max: how long looking at them may take.
        is_open_without_keys: whether everybody may do everything as long as no key was ever made.
    """

    def __init__(self, held: HeldConnection, seconds_max: float, *, is_open_without_keys: bool) -> None:
        self._held = held
        self._seconds_max = seconds_max
        self._is_open_without_keys = is_open_without_keys
        self._keys: Mapping[bytes, ApiKey] = {}
        self._known_until = 0.0
        self._blind_until = 0.0
        self._noted: dict[str, datetime] = {}
        self._noting: asyncio.Task[None] | None = None
        # Whoever comes while the keys are being looked at waits for the same look.
        self._look: Batcher[None, None] = Batcher(
            self._look_at_keys,
            batch_items_max=WAITING_MAX,
            queue_items_max=WAITING_MAX,
            seconds_max=seconds_max,
        )

    def requires(self, scope: Scope, handler: Handler) -> Handler:
        """Return a handler that asks for a key of this scope first; ``admin`` may do what ``read`` may."""

        @wraps(handler)
        async def guarded(request: web.Request) -> web.StreamResponse:
            await self.admit(request, scope)
            if request.method not in SAFE_METHODS:
                refuse_other_sites(request)
            return await handler(request)

        guarded.scope = scope  # type: ignore[attr-defined]  # told to whoever walks the routes
        return guarded

    async def admit(self, request: web.Request, scope: Scope) -> None:
        """Let a request pass by its key; to be asked again while its answer goes on.

        Raises:
            ProblemError: 401 or 403, its key is missing, not known any more, or of another scope.
            StorageUnavailableError: the keys cannot be looked at.
        """
        if monotonic() >= self._known_until:
            await self._look.submit(None)
        if not self._keys and self._is_open_without_keys:
            refuse_other_names(request)
            return
        try:
            self._admit(request, scope)
        except ProblemError:
            # Perhaps its key was made just now.
            if self._known_until - monotonic() > KNOWN_SECONDS_MAX - LOOK_AGAIN_SECONDS:
                raise
            await self._look.submit(None)
            self._admit(request, scope)

    async def is_without_keys(self) -> bool:
        """Tell whether no key was ever made."""
        await self._look.submit(None)
        return not self._keys

    async def is_valid(self, secret: str) -> bool:
        """Tell whether a key is good for reading, now."""
        await self._look.submit(None)
        key = self._keys.get(_sha256(secret))
        return key is not None and key.is_valid(datetime.now(UTC))

    async def _look_at_keys(self, callers: Sequence[None], due: float) -> Sequence[None]:
        if monotonic() < self._blind_until:
            raise StorageUnavailableError("the keys could not be looked at a moment ago")
        try:
            async with asyncio.timeout_at(due), self._held.lent(self._seconds_max) as connection:
                self._keys = {key.secret_sha256: key for key in await all_keys(connection)}
        except (StorageUnavailableError, TimeoutError):
            # Those who waited meanwhile have no time left for another try.
            self._blind_until = monotonic() + KNOWN_SECONDS_MAX
            raise
        self._known_until = monotonic() + KNOWN_SECONDS_MAX
        return callers

    def _admit(self, request: web.Request, scope: Scope) -> None:
        if not self._keys:
            raise _unauthorised("no key has been made yet: order-tracking keys create")
        secret = _secret_of(request)
        if not secret:
            raise _unauthorised("this needs a key: Authorization: Bearer ...")
        now = datetime.now(UTC)
        key = self._keys.get(_sha256(secret))
        if key is None or not key.is_valid(now):
            raise _unauthorised("the key is unknown, revoked or expired", 'error="invalid_token"')
        if scope == "admin" and key.scope != "admin":
            headers = {"WWW-Authenticate": 'Bearer error="insufficient_scope", scope="admin"'}
            raise ProblemError(Kind.FORBIDDEN, "this needs a key of the scope admin", headers=headers)
        last_used_at = self._noted.get(key.name, key.last_used_at)
        is_noting = self._noting is not None and not self._noting.done()
        if not is_noting and (last_used_at is None or last_used_at < now - USE_NOTED):
            self._noted[key.name] = now
            self._noting = asyncio.create_task(self._note_use(key.name, now), name="note the use of a key")

    async def _note_use(self, name: str, now: datetime) -> None:
        """Write down that a key was used; no request waits for it, and none fails with it."""
        try:
            async with self._held.lent(self._seconds_max) as connection:
                await connection.execute(NOTE_USE, name, now, now - USE_NOTED)
        except Exception as error:  # noqa: BLE001 - a use that cannot be noted is noted a minute later
            log.warning("the use of a key could not be noted", error=repr(error))


def _secret_of(request: web.Request) -> str:
    """Return the key of a request; a browser's pages, which can set no header, have it in a cookie, to read."""
    kind, _, secret = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    if kind:
        return secret.strip() if kind.lower() == "bearer" else ""
    return request.cookies.get(KEY_COOKIE, "") if request.method in SAFE_METHODS else ""


def _unauthorised(detail: str, *challenge: str) -> ProblemError:
    headers = {"WWW-Authenticate": ", ".join(('Bearer realm="order-tracking"', *challenge))}
    return ProblemError(Kind.UNAUTHORIZED, detail, headers=headers)


def refuse_other_sites(request: web.BaseRequest) -> None:
    """Refuse what a page of another site has a browser send, without a key where none is needed.

    Raises:
        ProblemError: 403.
    """
    headers = request.headers
    origin = headers.get(hdrs.ORIGIN)
    is_own = origin is None or origin.partition("://")[2] == headers.get(hdrs.HOST)
    if headers.get("Sec-Fetch-Site", "none") not in OWN_SITE or not is_own:
        raise ProblemError(Kind.FORBIDDEN, "another site's page may not ask for this")


def refuse_other_names(request: web.BaseRequest) -> None:
    """Refuse a name that is not this machine's own: what is open to it alone is asked for by that alone.

    A page may have its own name point to this machine, and then reads what it likes (DNS rebinding).

    Raises:
        ProblemError: 403.
    """
    host = request.headers.get(hdrs.HOST, "localhost")
    if host not in _LOCAL_HOSTS and not is_loopback(_PORT.sub("", host).strip("[]")):
        raise ProblemError(Kind.FORBIDDEN, "without keys it is asked by a name of this machine's own alone")
