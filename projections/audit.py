"""The audit: a filtered list of all reports with their verdicts, in the order of the log."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.statuses import Status
from domain.transitions import Verdict
from projections.postgres import Connection
from projections.timeline import KINDS, UNKNOWN_KIND
from projections.windows import POSITION_MAX, WALKED_ROWS_MAX, Span, Window, narrow

# The class syntax does not allow the keyword "from".
Transition = TypedDict(
    "Transition",
    {
        "position": int,
        "order_no": str,
        "version": int,
        "verdict": Verdict,
        "from": Status | None,
        "to": Status | None,
        "reported_status": str,
        "reason": str | None,
        "skipped": list[Status],
        "received_at": datetime,
        "rejudges": int | None,
    },
)
Transition.__doc__ = """One report and its verdict, in the audit.

``rejudges`` is the version of the report that this verdict judges again, null if this is a report.
"""


class TransitionsFilter(NamedTuple):
    """A filter of the audit. None selects everything.

    Args:
        verdict: the verdict.
        order_no: the order number.
        previous_status: the order's status before the report.
        recognised: the reported status.
        since: the report arrived at or after this time.
        until: the report arrived before this time.
    """

    verdict: Verdict | None = None
    order_no: str | None = None
    previous_status: Status | None = None
    recognised: Status | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def kinds(self) -> list[int]:
        """The kinds of reports that the filter selects, empty if it selects every kind."""
        wanted = (self.verdict, self.previous_status, self.recognised)
        if wanted == (None, None, None):
            return []
        kinds = (
            kind
            for parts, kind in KINDS.items()
            if all(want is None or want == part for want, part in zip(wanted, parts, strict=True))
        )
        return [*kinds, UNKNOWN_KIND]


# The reports at some positions. It is planned for each call, so the planner removes a filter that is null. The
# limited subquery keeps it from replacing the look-up of each walked row by a scan for the filter.
PAGE: Final = """
    SELECT position, order_no, version, verdict, previous_status AS "from", recognised AS "to", reported_status,
        reason, skipped, received_at, rejudges
    FROM unnest($1::bigint[]) AS walked (at)
    CROSS JOIN LATERAL (SELECT * FROM timeline.entries WHERE position = walked.at LIMIT 1) AS entry
    WHERE ($2::text IS NULL OR verdict = $2)
      AND ($3::text IS NULL OR order_no = $3)
      AND ($4::text IS NULL OR previous_status = $4)
      AND ($5::text IS NULL OR recognised = $5)
      AND ($6::timestamptz IS NULL OR received_at >= $6)
      AND ($7::timestamptz IS NULL OR received_at < $7)
    ORDER BY position
    LIMIT $8
"""

WALK_LOG: Final = """
    SELECT position FROM timeline.entries WHERE position BETWEEN $1 AND $2 ORDER BY position LIMIT $3
"""

# Within an order, versions rise with positions. A page begins behind a position that its order has.
WALK_ORDER: Final = """
    SELECT position FROM timeline.entries
    WHERE order_no = $4 AND position BETWEEN $1 AND $2
      AND version > coalesce(
          (SELECT version FROM timeline.entries WHERE position = $1::bigint - 1 AND order_no = $4), 0)
    ORDER BY version LIMIT $3
"""

# The kinds, of these, that the span has. An unlimited subquery would let the planner scan the table.
PRESENT_KINDS: Final = """
    SELECT requested.kind FROM unnest($3::smallint[]) AS requested (kind)
    CROSS JOIN LATERAL (
        SELECT FROM timeline.entries WHERE entries.kind = requested.kind AND position BETWEEN $1 AND $2 LIMIT 1
    ) AS found
"""

# The first positions of each kind. Where a kind has more, only those up to its last one are known to be next.
WALK_KINDS: Final = """
    WITH walked AS MATERIALIZED (
        SELECT requested.kind, found.position
        FROM unnest($3::smallint[]) AS requested (kind)
        CROSS JOIN LATERAL (
            SELECT position FROM timeline.entries
            WHERE entries.kind = requested.kind AND position BETWEEN $1 AND $2 ORDER BY position LIMIT $4
        ) AS found
    ), unfinished AS (
        SELECT max(position) AS last FROM walked GROUP BY kind HAVING count(*) = $4
    )
    SELECT (SELECT count(*) FROM walked), (SELECT min(last) FROM unfinished), ARRAY(
        SELECT position FROM walked WHERE position <= coalesce((SELECT min(last) FROM unfinished), $2)
        ORDER BY position LIMIT $5)
"""


class _Walk(NamedTuple):
    """The positions that a walk found, up to which one it is complete, and how many rows it read."""

    positions: list[int]
    reached: int | None
    read: int


async def transitions_page(
    connection: Connection, after: int, transitions_filter: TransitionsFilter, limit: int
) -> Window[Transition]:
    """Return at most ``limit`` reports and their verdicts at positions above ``after``, in log order."""
    since, until = transitions_filter.since, transitions_filter.until
    rows: list[Transition] = []
    walked = 0
    reached: int | None = after
    while reached is not None and reached < POSITION_MAX and len(rows) < limit and walked < WALKED_ROWS_MAX:
        span = await narrow(connection, Span(reached + 1, POSITION_MAX), since, until)
        if span is None:
            return Window(rows, None)
        # A first walk, which is short, is enough where most reports match.
        rows_max = limit if walked == 0 else WALKED_ROWS_MAX
        positions, reached, read = await _walk(connection, span, transitions_filter, rows_max, limit)
        found = await connection.fetch(PAGE, positions, *transitions_filter, limit - len(rows))
        rows += [cast("Transition", dict(row)) for row in found]
        walked += read
    return Window(rows, None if reached == POSITION_MAX else reached)


async def _walk(
    connection: Connection, span: Span, transitions_filter: TransitionsFilter, rows_max: int, limit: int
) -> _Walk:
    if transitions_filter.order_no is not None:
        order_no = transitions_filter.order_no
        return _to_walk(await connection.fetch(WALK_ORDER, *span, rows_max, order_no), rows_max)
    kinds = transitions_filter.kinds
    if not kinds:
        return _to_walk(await connection.fetch(WALK_LOG, *span, rows_max), rows_max)
    present = [kind for (kind,) in await connection.fetch(PRESENT_KINDS, *span, kinds)]
    if not present:
        return _Walk([], None, 0)
    each_max = min(limit, WALKED_ROWS_MAX // len(present))
    ((read, reached, positions),) = await connection.fetch(WALK_KINDS, *span, present, each_max, limit)
    if len(positions) == limit:
        reached = positions[-1]
    return _Walk(positions, reached, read)


def _to_walk(rows: Sequence[Any], rows_max: int) -> _Walk:
    positions = [position for (position,) in rows]
    return _Walk(positions, positions[-1] if len(positions) == rows_max else None, len(positions))
