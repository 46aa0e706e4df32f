"""Erasures, as views apply them: in the order of their ids, each under the view's own fence."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from projections.postgres import Connection

# The erasures that are applied together.
BATCH_ERASURES_MAX: Final = 500
# Of an erasure that was recorded before erasures had a version: all events.
ALL_VERSIONS: Final = 2**62

PAGE: Final = f"""
    SELECT erasure_id, order_no, coalesce(version, {ALL_VERSIONS})
    FROM public.erasures WHERE erasure_id > $1 ORDER BY erasure_id LIMIT {BATCH_ERASURES_MAX}
"""


class ErasedOrder(NamedTuple):
    """An erasure: the order's events up to the version have lost their bodies and unknown words."""

    erasure_id: int
    order_no: str
    version: int


async def read_erasures(connection: Connection, after: int) -> list[ErasedOrder]:
    """Return the next erasures above an id, at most BATCH_ERASURES_MAX."""
    return [ErasedOrder(*row) for row in await connection.fetch(PAGE, after)]


def last_versions(erasures: Sequence[ErasedOrder]) -> dict[str, int]:
    """Return the last erased version of each order."""
    versions: dict[str, int] = {}
    for _, order_no, version in erasures:
        versions[order_no] = max(version, versions.get(order_no, 0))
    return versions
