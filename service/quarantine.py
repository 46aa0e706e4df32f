"""Bodies that could not be understood, kept byte for byte until somebody deals with them."""

from datetime import datetime
from typing import Final

from service.database import Pool, borrowed

# Equal bodies share an entry: a sender that repeats itself costs a count.
KEEP_BODY: Final = """
    INSERT INTO quarantine (body, reason, remote, received_at, last_seen_at)
    VALUES ($1, $2, $3, $4, $4)
    ON CONFLICT (body_sha256) DO UPDATE
    SET times_seen = quarantine.times_seen + 1,
        last_seen_at = greatest(quarantine.last_seen_at, excluded.last_seen_at)
    RETURNING quarantine_id
"""


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
