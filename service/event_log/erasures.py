"""The erasures, in their order: followers of the log learn from them what their copies must lose too."""

from collections import deque
from collections.abc import Mapping
from datetime import datetime
from time import monotonic
from typing import Final, NamedTuple, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.erasure import ErasedOrder, last_versions, read_erasures
from projections.postgres import Connection

PAGE: Final = """
    SELECT erasure_id, order_no, version, erased_at, events, entries
    FROM public.erasures WHERE erasure_id > $1 ORDER BY erasure_id LIMIT $2
"""
# A process that has not followed the erasures begins with those of the last minutes, at most so many, and with
# the last one in any case.
RECENT_MAX: Final = 10_000
RECENT: Final = """
    SELECT coalesce(min(erasure_id), (SELECT max(erasure_id) FROM public.erasures), 1) - 1
    FROM (SELECT * FROM public.erasures ORDER BY erasure_id DESC LIMIT $1) AS last
    WHERE erased_at > now() - interval '5 minutes'
"""
# How long a process remembers an erasure. It may hear later of the commit of an event that was erased, or of an
# endpoint's response to it.
REMEMBERED_SECONDS: Final = 60.0
# A memory lets an event out only if the newest erasure was read so short a time ago.
HEARD_SECONDS_MAX: Final = 1.0
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


class _Heard(NamedTuple):
    erasure: ErasedOrder
    at: float


class HeardUpTo(NamedTuple):
    """Up to where a memory has applied the erasures.

    Attributes:
        beginning: how often the process has begun to read the erasures again from their start. Ids of different
            beginnings cannot be compared.
        erasure_id: the last erasure, 0 if there is none.
    """

    beginning: int
    erasure_id: int


class HeardErasures:
    """The latest erasures, as the memories of one process know them."""

    def __init__(self) -> None:
        self._is_known = False
        self._beginning = 0
        self._last: ErasedOrder | None = None
        self._heard_at = float("-inf")
        self._recent: deque[_Heard] = deque()
        self._versions: dict[str, int] = {}

    @property
    def last_id(self) -> int | None:
        """The last one that was read, 0 if there is none; None if it must be found out."""
        if not self._is_known:
            return None
        return self._last.erasure_id if self._last is not None else 0

    @property
    def up_to(self) -> HeardUpTo:
        """Up to where they were read."""
        return HeardUpTo(self._beginning, self.last_id or 0)

    @property
    def is_fresh(self) -> bool:
        """Whether every erasure is known that was committed more than HEARD_SECONDS_MAX ago."""
        return self._is_known and monotonic() - self._heard_at <= HEARD_SECONDS_MAX

    def forget(self) -> None:
        """Read the latest erasures again: the database may be another one, with other erasures of these ids."""
        self._is_known, self._last, self._heard_at = False, None, float("-inf")

    def confirm(self, at: float) -> None:
        """Note that the last erasure was still the newest one at a time (monotonic clock)."""
        self._heard_at = max(self._heard_at, at)

    async def read(self, connection: Connection) -> Mapping[str, int] | None:
        """Read the erasures that this process does not know.

        Returns:
            The last erased version of each order. None if they do not follow those that are known, as in the
            beginning, and after a failover has lost some, whose ids others may have by now.
        """
        last, new = self._last, []
        if last is not None:
            new = await read_erasures(connection, last.erasure_id - 1)
        is_kept = last is not None and bool(new) and new.pop(0) == last
        if not is_kept:
            is_kept = last is None and self._is_known
            after = 0 if is_kept else await connection.fetchval(RECENT, RECENT_MAX)
            if not is_kept:
                self._recent.clear()
                self._beginning += 1
            new = await read_erasures(connection, after)
        while page := await read_erasures(connection, new[-1].erasure_id) if new else []:
            new += page
        now = monotonic()
        self._is_known = True
        self._last = new[-1] if new else last if is_kept else None
        self._recent += [_Heard(one, now) for one in new]
        while self._recent and self._recent[0].at < now - REMEMBERED_SECONDS:
            self._recent.popleft()
        self._versions = last_versions([one.erasure for one in self._recent])
        return last_versions(new) if is_kept else None

    def has_erased(self, order_no: str, version: int) -> bool:
        """Return whether an event was erased a short time ago."""
        return version <= self._versions.get(order_no, 0)

    def orders_after(self, heard: HeardUpTo) -> set[str] | None:
        """Return the orders that were erased since; None if that is not known."""
        last_id, (beginning, erasure_id) = self.last_id, heard
        if last_id is None or beginning != self._beginning:
            return None
        after = [one.erasure for one in self._recent if one.erasure.erasure_id > erasure_id]
        if erasure_id < last_id and (not after or after[0].erasure_id > erasure_id + 1):
            return None
        return {one.order_no for one in after}


async def erasures_page(connection: Connection, after: int, limit: int) -> list[Erasure]:
    """Return erasures with ids above ``after``, oldest first."""
    return [cast("Erasure", dict(row)) for row in await connection.fetch(PAGE, after, limit)]


async def last_erasure_id(connection: Connection) -> int:
    """Return the id of the last erasure, 0 if there is none."""
    last: int = await connection.fetchval(LAST)
    return last
