"""Pages that read a limited number of rows, whatever their filter selects.

A page walks its list from the cursor. If few rows match, that could be the whole list, so a page ends after
WALKED_ROWS_MAX rows even if it is not full, and the next page continues there. A filter by time first skips
to the blocks of positions that have reports of that time. Times do not always rise with the position: several
processes record reports, each with its own clock.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final, Generic, NamedTuple, TypeVar

from projections.postgres import Connection

# A page walks at most this many rows after a first, short walk. It may try three indexes before, and it looks
# up each row, and its airway bills: at most 12 times as many rows in all.
WALKED_ROWS_MAX: Final = 2_000
# The number of positions in a block. If you change it, raise the fold_version of the timeline.
BLOCK_POSITIONS: Final = 8_192
# PostgreSQL's bigint.
POSITION_MAX: Final = 2**63 - 1

AnyRow = TypeVar("AnyRow")


class Window(NamedTuple, Generic[AnyRow]):
    """The rows of a page, and the position that the walk has reached; None at the end of the list."""

    rows: Sequence[AnyRow]
    reached: int | None


class Span(NamedTuple):
    """The positions from ``first`` to ``last``."""

    first: int
    last: int


NARROW: Final = """
    SELECT min(block), max(block) FROM timeline.blocks
    WHERE block BETWEEN $1 AND $2
      AND ($3::timestamptz IS NULL OR latest >= $3)
      AND ($4::timestamptz IS NULL OR earliest < $4)
"""


async def narrow(
    connection: Connection, span: Span, since: datetime | None, until: datetime | None
) -> Span | None:
    """Return the part of a span that can have a time in a range, None if no block of it has one.

    Args:
        connection: any connection.
        span: the positions.
        since: the beginning of the range; None for no beginning.
        until: the end of the range, which is not a part of it; None for no end.
    """
    if since is None and until is None:
        return span
    blocks = span.first // BLOCK_POSITIONS, span.last // BLOCK_POSITIONS
    ((first, last),) = await connection.fetch(NARROW, *blocks, since, until)
    if first is None:
        return None
    return Span(max(span.first, first * BLOCK_POSITIONS), min(span.last, (last + 1) * BLOCK_POSITIONS - 1))
