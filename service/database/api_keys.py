"""The table of API keys. Of each secret it holds only the hash."""

import hashlib
import secrets
from datetime import datetime, timedelta
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import asyncpg

from projections.postgres import Connection
from service.errors import OperatorError

# Each includes those before it. "read" shows neither raw bodies nor senders' addresses.
Scope: TypeAlias = Literal["read", "read:bodies", "admin"]
SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)

# Scanners of source code recognise leaked secrets by this prefix.
KEY_PREFIX: Final = "otk_"
SECRET_BYTES: Final = 32
NAME_CHARACTERS_MAX: Final = 100
# The service keeps all keys in memory.
KEYS_MAX: Final = 1_000
# A key's last use is written at most once in this interval.
USE_INTERVAL: Final = timedelta(minutes=1)

ALL_KEYS: Final = """
    SELECT name, scope, secret_sha256, created_at, expires_at, last_used_at, revoked_at
    FROM api_keys ORDER BY created_at, name LIMIT $1
"""
ADD_KEY: Final = """
    INSERT INTO api_keys (name, scope, secret_sha256, expires_at)
    SELECT $1, $2, $3, $4 WHERE (SELECT count(*) FROM api_keys) < $5
"""
REVOKE_KEY: Final = "UPDATE api_keys SET revoked_at = now() WHERE name = $1 AND revoked_at IS NULL"
RECORD_USE: Final = """
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
        """Return whether the key is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class InvalidKeyError(OperatorError):
    """The key cannot be created. ``str()`` is the reason."""


def hash_secret(secret: str) -> bytes:
    """Return the SHA-256 of a secret.

    A secret has 256 random bits, so neither a slow hash nor a comparison in constant time would add anything.
    """
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def includes(held: Scope, required: Scope) -> bool:
    """Return whether a scope includes another one."""
    return SCOPES.index(held) >= SCOPES.index(required)


async def list_keys(connection: Connection) -> list[ApiKey]:
    """Return all keys, including expired and revoked ones, oldest first."""
    return [ApiKey(*row) for row in await connection.fetch(ALL_KEYS, KEYS_MAX)]


async def create_key(connection: Connection, name: str, scope: Scope, expires_at: datetime | None) -> str:
    """Create a key and return its secret, which cannot be read again.

    Raises:
        InvalidKeyError: the name is taken or invalid, or there are too many keys.
    """
    if not name.isprintable() or not 0 < len(name.strip()) <= NAME_CHARACTERS_MAX:
        raise InvalidKeyError(f"a key's name must have 1 to {NAME_CHARACTERS_MAX} printable characters")
    secret = KEY_PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    try:
        result = await connection.execute(ADD_KEY, name, scope, hash_secret(secret), expires_at, KEYS_MAX)
    except asyncpg.UniqueViolationError:
        raise InvalidKeyError(
            f"the name {name} is taken, perhaps by a revoked key: choose another name"
        ) from None
    if result != "INSERT 0 1":
        raise InvalidKeyError(f"{KEYS_MAX} keys exist already, which is the maximum")
    return secret


async def revoke_key(connection: Connection, name: str) -> bool:
    """Revoke a key permanently; return False if no valid key has this name."""
    return await connection.execute(REVOKE_KEY, name) == "UPDATE 1"


async def record_use(connection: Connection, name: str, now: datetime) -> None:
    """Record that a key was used, unless a use was recorded within USE_INTERVAL."""
    await connection.execute(RECORD_USE, name, now, now - USE_INTERVAL)
