"""The erasures, in their order: followers of the log learn from them what their copies must lose too."""

from collections import deque
from collections.abc import Mapping, Sequence
from datetime import datetime
from time import monotonic
from typing import Final, NamedTuple, cast

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.postgres import Connection

# The erasures that a follower applies together.
PAGE_ERASURES_MAX: Final = 500
# Of an erasure that was recorded before erasures had a version: all events.
ALL_VERSIONS: Final = 2**62

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
        self._beginning = 0
        self._last: Erasure | None = None
        # Whether the last one is known to be in the present database.
        self._is_proved = False
        self._heard_at = float("-inf")
        # Each with the time at which this process read it (monotonic clock).
        self._recent: deque[tuple[float, Erasure]] = deque()
        self._versions: dict[str, int] = {}

    @property
    def last_id(self) -> int | None:
        """The last one that was read, 0 if there is none; None if it must be found out."""
        return self.up_to.erasure_id if self._is_proved else None

    @property
    def up_to(self) -> HeardUpTo:
        """Up to where they were read."""
        return HeardUpTo(self._beginning, 0 if self._last is None else self._last["erasure_id"])

    @property
    def is_fresh(self) -> bool:
        """Whether every erasure is known that was committed more than HEARD_SECONDS_MAX ago."""
        return self._is_proved and monotonic() - self._heard_at <= HEARD_SECONDS_MAX

    def forget(self) -> None:
        """Prove the last one again: the database may be another one, with other erasures of these ids."""
        self._is_proved, self._heard_at = False, float("-inf")

    def confirm(self, at: float) -> None:
        """Note that the last erasure was still the newest one at a time (monotonic clock)."""
        self._heard_at = max(self._heard_at, at)

    async def read(self, connection: Connection) -> Mapping[str, int] | None:
        """Read the erasures that this process does not know.

        Returns:
            The last erased version of each order. None if they do not follow those that are known, as in the
            beginning, and after a failover has lost some, whose ids others may have by now.
        """
        last, is_kept = self._last, self._beginning > 0
        new = [] if last is None else await read_erasures(connection, last["erasure_id"] - 1)
        if last is not None:
            is_kept = bool(new) and new.pop(0) == last
        elif is_kept:
            new = await read_erasures(connection, 0)
        if not is_kept:
            self._recent.clear()
            self._beginning += 1
            new = await read_erasures(connection, await connection.fetchval(RECENT, RECENT_MAX))
        while page := await read_erasures(connection, new[-1]["erasure_id"]) if new else []:
            new += page
        now = monotonic()
        self._is_proved = True
        self._last = new[-1] if new else last if is_kept else None
        self._recent += [(now, one) for one in new]
        while self._recent and self._recent[0][0] < now - REMEMBERED_SECONDS:
            self._recent.popleft()
        self._versions = last_versions([one for _, one in self._recent])
        return last_versions(new) if is_kept else None

    def has_erased(self, order_no: str, version: int) -> bool:
        """Return whether an event was erased a short time ago."""
        return version <= self._versions.get(order_no, 0)

    def after(self, heard: HeardUpTo) -> list[Erasure] | None:
        """Return the erasures since; None if some of them are not known."""
        beginning, erasure_id = heard
        if beginning != self._beginning:
            return None
        after = [one for _, one in self._recent if one["erasure_id"] > erasure_id]
        if erasure_id < self.up_to.erasure_id and (not after or after[0]["erasure_id"] > erasure_id + 1):
            return None
        return after


async def read_erasures(connection: Connection, after: int, limit: int = PAGE_ERASURES_MAX) -> list[Erasure]:
    """Return erasures with ids above ``after``, oldest first."""
    return [cast("Erasure", dict(row)) for row in await connection.fetch(PAGE, after, limit)]


def last_versions(erasures: Sequence[Erasure]) -> dict[str, int]:
    """Return the last erased version of each order."""
    versions: dict[str, int] = {}
    for one in erasures:
        version = ALL_VERSIONS if one["version"] is None else one["version"]
        versions[one["order_no"]] = max(version, versions.get(one["order_no"], 0))
    return versions


async def last_erasure_id(connection: Connection) -> int:
    """Return the id of the last erasure, 0 if there is none."""
    last: int = await connection.fetchval(LAST)
    return last
