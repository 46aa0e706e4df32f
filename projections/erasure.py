"""Erasure of an order's words outside the vocabulary from the two views that have them."""

from typing import Final

from projections.locks import TAKE_VIEW_LOCK
from projections.postgres import Connection
from projections.timeline import KINDS

POSITION: Final = """
    SELECT least((SELECT position FROM timeline.projection), (SELECT position FROM statistics.projection))
"""
# An erased word is empty. The counters of words move with it, as if the log had always had it empty.
ERASE_WORDS: Final = """
    WITH words AS (
        SELECT reported_status, count(*) AS reports, max(received_at) AS last_received_at
        FROM timeline.entries
        WHERE order_no = $1 AND verdict = 'unrecognised' AND reported_status <> ''
          AND version <= $2
        GROUP BY reported_status
    ), emptied AS (
        UPDATE timeline.entries SET reported_status = ''
        WHERE order_no = $1 AND verdict = 'unrecognised' AND version <= $2
    ), added AS (
        INSERT INTO statistics.unrecognised AS counted (reported_status, reports, rejudged, last_received_at)
        SELECT '', sum(reports), 0, max(last_received_at) FROM words HAVING count(*) > 0
        ON CONFLICT (reported_status) DO UPDATE
        SET reports = counted.reports + excluded.reports,
            last_received_at = greatest(counted.last_received_at, excluded.last_received_at)
    )
    UPDATE statistics.unrecognised AS counted SET reports = counted.reports - words.reports
    FROM words WHERE counted.reported_status = words.reported_status
    RETURNING counted.reported_status
"""
REMOVE_UNUSED: Final = "DELETE FROM statistics.unrecognised WHERE reports <= 0 AND rejudged = 0"
RENEW_TIMES: Final = """
    UPDATE statistics.unrecognised AS counted
    SET last_received_at = (
        SELECT max(received_at) FROM timeline.entries
        WHERE kind = ANY($2::smallint[]) AND reported_status = counted.reported_status)
    WHERE reported_status = ANY($1::text[])
"""
UNRECOGNISED_KINDS: Final = [kind for (verdict, _, _), kind in KINDS.items() if verdict == "unrecognised"]


async def erase_words(connection: Connection, order_no: str, version: int, head: int) -> bool:
    """Empty an order's words outside the vocabulary in the views, in one transaction.

    Args:
        connection: a connection as the role that owns the views.
        order_no: the order.
        version: the last erased version; a word that was recorded later stays.
        head: a position that the views must have reached: they would add words that were recorded before it.

    Returns:
        False if a view has not reached it; then nothing was changed.
    """
    async with connection.transaction():
        for view in ("timeline", "statistics"):
            await connection.execute(TAKE_VIEW_LOCK, view)
        if await connection.fetchval(POSITION) < head:
            return False
        words = [word for (word,) in await connection.fetch(ERASE_WORDS, order_no, version)]
        await connection.execute(REMOVE_UNUSED)
        await connection.execute(RENEW_TIMES, words, UNRECOGNISED_KINDS)
    return True
