"""Bodies that could not be understood, kept byte for byte until somebody deals with them."""

from datetime import datetime
from typing import Final, NamedTuple

from service.database import Connection, Pool, borrowed

# Equal bodies share an entry: a sender that repeats itself costs a count.
KEEP_BODY: Final = """
    INSERT INTO quarantine (body, reason, remote, received_at, last_seen_at)
    VALUES ($1, $2, $3, $4, $4)
    ON CONFLICT (body_sha256) DO UPDATE
    SET times_seen = quarantine.times_seen + 1,
        last_seen_at = greatest(quarantine.last_seen_at, excluded.last_seen_at)
    RETURNING quarantine_id
"""


ENTRIES_PAGE: Final = """
    SELECT quarantine_id, received_at, reason, state, times_seen, last_seen_at
    FROM quarantine WHERE quarantine_id < $1 ORDER BY quarantine_id DESC LIMIT $2
"""

ENTRY: Final = """
    SELECT quarantine_id, received_at, reason, state, times_seen, last_seen_at, body
    FROM quarantine WHERE quarantine_id = $1
"""


class QuarantineEntry(NamedTuple):
    """A body that could not be understood: when it came, why it is here, and how often it came again."""

    quarantine_id: int
    received_at: datetime
    reason: str
    state: str
    times_seen: int
    last_seen_at: datetime
    body: bytes | None = None


async def entries_page(connection: Connection, before: int, limit: int) -> list[QuarantineEntry]:
    """Return entries with ids below ``before``, newest first, without their bodies."""
    return [QuarantineEntry(*row) for row in await connection.fetch(ENTRIES_PAGE, before, limit)]


async def find_entry(connection: Connection, quarantine_id: int) -> QuarantineEntry | None:
    """Return one entry with its body, None where there is none of this id."""
    row = await connection.fetchrow(ENTRY, quarantine_id)
    return QuarantineEntry(*row) if row is not None else None


class Quarantine:
    """Keeps what cannot be understood.

    Args:
        pool: where its connections come from.
        seconds_max: how long keeping one body may take.
    """

    def __init__(self, pool: Pool, seconds_max: float) -> None:
        self._pool = pool
        self._seconds_max = seconds_max

    async def keep(self, body: bytes, reason: str, remote: str | None, received_at: datetime) -> int:
        """Keep a body and return the id of its entry; committed when this returns.

        Raises:
            StorageUnavailableError: the database did not confirm it in time.
        """
        async with borrowed(self._pool, self._seconds_max) as connection:
            quarantine_id: int = await connection.fetchval(KEEP_BODY, body, reason, remote, received_at)
            return quarantine_id
