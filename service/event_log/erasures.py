"""The erasures, in their order: followers of the log learn from them what their copies must lose too."""

from datetime import datetime
from typing import Final, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.postgres import Connection

PAGE: Final = """
    SELECT erasure_id, order_no, version, erased_at, events, entries
    FROM public.erasures WHERE erasure_id > $1 ORDER BY erasure_id LIMIT $2
"""
LAST: Final = "SELECT coalesce(max(erasure_id), 0) FROM public.erasures"


class Erasure(TypedDict):
    """An erasure: an order's events up to ``version`` have neither bodies nor addresses any more.

    ``entries`` is the number of emptied quarantine entries.
    """

    erasure_id: int
    order_no: str
    version: int | None
    erased_at: datetime
    events: int
    entries: int


async def erasures_page(connection: Connection, after: int, limit: int) -> list[Erasure]:
    """Return erasures with ids above ``after``, oldest first."""
    return [cast("Erasure", dict(row)) for row in await connection.fetch(PAGE, after, limit)]


async def last_erasure_id(connection: Connection) -> int:
    """Return the id of the last erasure, 0 if there is none."""
    last: int = await connection.fetchval(LAST)
    return last
