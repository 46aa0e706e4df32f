"""Selections of the log: the positions of the events with some verdicts and statuses, found by an index."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from domain.statuses import Status
from domain.transitions import Verdict
from projections.audit import PRESENT_KINDS, WALK_KINDS
from projections.postgres import Connection
from projections.timeline import KINDS, UNKNOWN_KIND

# A page walks at most this many entries of the index, whatever it selects.
WALKED_ROWS_MAX: Final = 20_000

POSITION: Final = "SELECT position FROM timeline.projection"
# Of these positions, those that are selected: a kind that this release does not know may be any of them.
SELECTED: Final = """
    SELECT walked.position
    FROM unnest($1::bigint[]) AS walked (position)
    CROSS JOIN LATERAL (
        SELECT verdict, status FROM timeline.entries WHERE entries.position = walked.position LIMIT 1
    ) AS entry
    WHERE ($2::text[] IS NULL OR verdict = ANY($2)) AND ($3::text[] IS NULL OR status = ANY($3))
    ORDER BY walked.position
"""


class Selection(NamedTuple):
    """A selection of events. None selects everything.

    Args:
        verdicts: the verdict is one of these.
        statuses: the order's status after the event is one of these.
    """

    verdicts: Sequence[Verdict] | None = None
    statuses: Sequence[Status] | None = None

    @property
    def kinds(self) -> list[int]:
        """The kinds of entries that may be selected."""
        return [UNKNOWN_KIND, *(kind for parts, kind in KINDS.items() if self._includes(*parts))]

    def _includes(self, verdict: Verdict, before: Status | None, recognised: Status | None) -> bool:
        # Only a report that advanced changes the status.
        status = recognised if verdict == "advanced" else before
        return (self.verdicts is None or verdict in self.verdicts) and (
            self.statuses is None or status in self.statuses
        )


class SelectedPositions(NamedTuple):
    """Positions of selected events, and the position up to which the view was searched for them."""

    positions: list[int]
    reached: int


async def selected_positions(
    connection: Connection, selection: Selection, after: int, limit: int
) -> SelectedPositions:
    """Return the first positions of selected events above a position, at most ``limit``.

    The search ends at the view's own position, or earlier after WALKED_ROWS_MAX entries.
    """
    # First, since later statements see every event up to it. One snapshot for all of them would not: a rebuild
    # may swap in tables with rows that are newer than the snapshot.
    end: int = await connection.fetchval(POSITION) or 0
    span = (after + 1, end)
    present = [kind for (kind,) in await connection.fetch(PRESENT_KINDS, *span, selection.kinds)]
    if not present:
        return SelectedPositions([], max(after, end))
    each_max = min(limit, max(1, WALKED_ROWS_MAX // len(present)))
    ((_, reached, walked),) = await connection.fetch(WALK_KINDS, *span, present, each_max, limit)
    rows = await connection.fetch(SELECTED, walked, selection.verdicts, selection.statuses)
    if len(walked) == limit:
        reached = walked[-1]
    return SelectedPositions([position for (position,) in rows], end if reached is None else reached)
