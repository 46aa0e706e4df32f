"""The table of browser sessions. Of each session's id it holds only the hash."""

import secrets
from datetime import datetime, timedelta
from typing import Final, NamedTuple

from projections.postgres import Connection
from service.database.api_keys import KEYS_MAX, SECRET_BYTES, USE_INTERVAL, hash_secret

# A session ends when it was not used for this long, and at the latest after its whole duration.
IDLE_MAX: Final = timedelta(hours=12)
DURATION_MAX: Final = timedelta(days=7)
# A further session of a key ends the oldest one of that key.
SESSIONS_PER_KEY_MAX: Final = 20
# The service keeps all sessions in memory.
SESSIONS_MAX: Final = KEYS_MAX * SESSIONS_PER_KEY_MAX

LIVE: Final = """
    SELECT session_sha256, key_name, used_at FROM public.sessions
    WHERE used_at > now() - $1::interval AND opened_at > now() - $2::interval
    ORDER BY opened_at DESC LIMIT $3
"""
OPEN: Final = "INSERT INTO public.sessions (session_sha256, key_name) VALUES ($1, $2)"
# Those that have ended by time, and the oldest of one key beyond the maximum.
REMOVE_ENDED: Final = """
    DELETE FROM public.sessions
    WHERE used_at <= now() - $1::interval OR opened_at <= now() - $2::interval
       OR session_sha256 IN (
           SELECT session_sha256 FROM public.sessions WHERE key_name = $3 ORDER BY opened_at DESC OFFSET $4)
"""
END: Final = "DELETE FROM public.sessions WHERE session_sha256 = $1 RETURNING key_name"
END_OF_KEY: Final = "DELETE FROM public.sessions WHERE key_name = $1"
RECORD_USE: Final = """
    UPDATE public.sessions SET used_at = $2 WHERE session_sha256 = $1 AND used_at < $3
"""


class Session(NamedTuple):
    """A session, without its id."""

    session_sha256: bytes
    key_name: str
    used_at: datetime


async def list_sessions(connection: Connection) -> list[Session]:
    """Return the sessions that have not ended, newest first."""
    return [Session(*row) for row in await connection.fetch(LIVE, IDLE_MAX, DURATION_MAX, SESSIONS_MAX)]


async def open_session(connection: Connection, key_name: str) -> str:
    """Open a session of a key, and return its id, which cannot be read again."""
    await connection.execute(REMOVE_ENDED, IDLE_MAX, DURATION_MAX, key_name, SESSIONS_PER_KEY_MAX - 1)
    session_id = secrets.token_urlsafe(SECRET_BYTES)
    await connection.execute(OPEN, hash_secret(session_id), key_name)
    return session_id


async def end_session(connection: Connection, session_id: str) -> str | None:
    """End a session, and return its key's name; None if there is no such session."""
    name: str | None = await connection.fetchval(END, hash_secret(session_id))
    return name


async def end_sessions_of(connection: Connection, key_name: str) -> None:
    """End every session of a key."""
    await connection.execute(END_OF_KEY, key_name)


async def record_use(connection: Connection, session_sha256: bytes, now: datetime) -> None:
    """Record that a session was used, unless a use was recorded within USE_INTERVAL."""
    await connection.execute(RECORD_USE, session_sha256, now, now - USE_INTERVAL)
