"""Reports to receipts: judged, appended in batches, and answered only when committed, exactly once."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import Final, TypeAlias

from domain.order import Order, Report, Standing, judge_report
from domain.statuses import Status
from domain.transitions import Verdict
from service.batcher import Batcher, BatchFailedError, OverloadedError
from service.database.connections import (
    RECONNECT_PAUSE_SECONDS,
    StorageUnavailableError,
    is_connection_lost,
    is_content_refused,
)
from service.event_log import store as event_store
from service.event_log.store import Claim, EventStore, VersionTakenError
from service.ingest import idempotency, quarantine

# A batch beyond this gains nothing and keeps the first of it waiting.
BATCH_REPORTS_MAX: Final = 512
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
# The bodies of what waits: a queue full of large ones must not fill the memory.
QUEUE_BYTES_MAX: Final = 64 * 1024 * 1024
# A report that would wait longer is refused: its next try finds a shorter queue, while a queue that everybody
# waits through to the end of their time would answer nobody.
WAIT_SECONDS_MAX: Final = 0.4
# Reports with a key wait one by one for the connection of the batches: few, so that those are not starved.
KEYED_REPORTS_MAX: Final = 64
# Where orders stood last, kept for judging without a read. About 500 bytes an order: 50 MB.
STANDINGS_MAX: Final = 100_000


# A report and the time of its arrival, in UTC.
Arrival: TypeAlias = tuple[Report, datetime]


@dataclass(slots=True)
class Receipt:
    """What became of a report: the event, and its place in the log."""

    outcome: Verdict
    report_id: str
    order_no: str
    version: int
    position: int
    status: Status | None
    reported_status: str
    skipped: Sequence[Status]
    reason: str | None


class RefusedReportError(Exception):
    """This one report cannot be recorded: the database refuses it, or its order's last event is unreadable."""


class Recorder:
    """Takes reports from many callers at once and gives each its receipt when its event is committed.

    Args:
        store: the log.
        on_commit: called with the events and positions of every commit, in the order of the log.
        queue_reports_max: how many reports may wait.
        seconds_max: how long one report may take, waiting included.
        on_batch: told how many reports a batch had, and the seconds that it took.
    """

    def __init__(
        self,
        store: EventStore,
        on_commit: Callable[[Sequence[Order.StatusReported], Sequence[int]], None],
        *,
        queue_reports_max: int,
        seconds_max: float,
        on_batch: Callable[[int, float], None] = lambda _reports, _seconds: None,
    ) -> None:
        self._store = store
        self._on_batch = on_batch
        self._on_commit = on_commit
        self._seconds_max = seconds_max
        self._standings = _Standings(STANDINGS_MAX)
        self._keyed_waiting = 0
        self._batcher: Batcher[Arrival, Receipt] = Batcher(
            self._record_batch,
            batch_items_max=BATCH_REPORTS_MAX,
            batch_weight_max=BATCH_BYTES_MAX,
            queue_items_max=queue_reports_max,
            queue_weight_max=QUEUE_BYTES_MAX,
            seconds_max=seconds_max,
            wait_seconds_max=WAIT_SECONDS_MAX,
        )

    async def record(self, report: Report, received_at: datetime) -> Receipt:
        """Record one report; when this returns, its event is committed.

        Raises:
            OverloadedError: too much is waiting; nothing was recorded.
            StorageUnavailableError: no commit was seen in time. The report may or may not be recorded.
            RefusedReportError: it cannot be recorded, now or later, by this release.
        """
        if report.quarantine_id is not None:
            return await self._record_once(report, received_at, quarantine.CLAIM)
        if report.idempotency_key is not None:
            return await self._record_once(report, received_at, idempotency.CLAIM)
        return await self._record_in_batch(report, received_at)

    async def _record_in_batch(self, report: Report, received_at: datetime) -> Receipt:
        try:
            return await self._batcher.submit((report, received_at), len(report.body))
        except TimeoutError as error:
            raise StorageUnavailableError(str(error)) from None
        except BatchFailedError as error:
            if isinstance(error.__cause__, StorageUnavailableError):
                raise StorageUnavailableError(str(error)) from error
            raise

    async def _record_once(self, report: Report, received_at: datetime, claim: Claim) -> Receipt:
        if self._keyed_waiting >= KEYED_REPORTS_MAX:
            raise OverloadedError("too many reports with keys are waiting")
        self._keyed_waiting += 1
        try:
            async with _in_time(asyncio.get_running_loop().time() + self._seconds_max):
                receipt = await self._record_claimed(report, received_at, claim)
                return receipt or await self._record_in_batch(report, received_at)
        finally:
            self._keyed_waiting -= 1

    @property
    def waiting(self) -> int:
        """How many reports wait for their commit."""
        return self._batcher.waiting

    async def finish(self) -> None:
        """Wait until everything that was handed in is answered."""
        await self._batcher.finish()

    async def _record_batch(self, arrivals: list[Arrival], due: float) -> Sequence[Receipt | Exception]:
        began = monotonic()
        async with _in_time(due):
            receipts = await self._record(arrivals)
        self._on_batch(len(arrivals), monotonic() - began)
        return receipts

    async def _record(self, arrivals: list[Arrival]) -> Sequence[Receipt | Exception]:
        try:
            return await self._record_together(arrivals)
        except Exception as error:
            if not _is_refused(error):
                raise
            if len(arrivals) == 1:
                return [RefusedReportError(str(error))]
        # One report that cannot be kept must not fail its neighbours: it is found by halving.
        middle = len(arrivals) // 2
        return [*await self._record(arrivals[:middle]), *await self._record(arrivals[middle:])]

    async def _record_together(self, arrivals: list[Arrival]) -> Sequence[Receipt]:
        order_nos = {report.order_no for report, _ in arrivals}
        # What was sent to be committed, as long as no answer has told what became of it.
        sent: list[Order.StatusReported] | None = None
        try:
            sent = _judge(arrivals, await self._known_standings(order_nos))
            positions = await self._store.append(sent)
        except VersionTakenError:
            # Judged from where an order no longer stood; the statement was refused whole.
            sent, positions = await self._record_locked(arrivals, order_nos, None)
        except Exception as error:
            if not is_connection_lost(error):
                self._standings.forget(order_nos)
                raise
            sent, positions = await self._record_locked(arrivals, order_nos, sent)
        except BaseException:
            self._standings.forget(order_nos)
            raise
        self._committed(sent, positions)
        return [_receipt(event, position) for event, position in zip(sent, positions, strict=True)]

    async def _record_locked(
        self, arrivals: list[Arrival], order_nos: set[str], sent: list[Order.StatusReported] | None
    ) -> tuple[list[Order.StatusReported], list[int]]:
        """Record with the log held still, where the first try was refused or its outcome is unknown.

        Until the time is over: a lost connection is made anew, and what it may have committed is looked for
        under the lock, which the transaction in doubt holds until it ends.
        """
        self._standings.forget(order_nos)
        while True:
            try:
                async with self._store.locked() as connection:
                    positions = await event_store.positions_of(connection, sent) if sent else None
                    if sent is None or positions is None:
                        # Set only when judged: were it lost before that, there would be nothing to look for.
                        sent = _judge(arrivals, await event_store.standings(connection, list(order_nos)))
                        positions = await event_store.append(connection, sent)
            except VersionTakenError:
                # Even now: a writer that takes no lock of ours. Nothing was kept.
                sent = None
            except Exception as error:
                if not is_connection_lost(error):
                    raise
                await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
            else:
                return sent, positions

    async def _record_claimed(self, report: Report, received_at: datetime, claim: Claim) -> Receipt | None:
        """Record a report that may be recorded once only, in a transaction of its own with its claim.

        Returns:
            Its receipt, the first one again where the claim was used with this body; None where it was used
            with another body, which makes it an ordinary report.
        """
        while True:
            try:
                async with self._store.locked() as connection:
                    seen = await claim.find(connection, report)
                    if seen is None:
                        standings = await event_store.standings(connection, [report.order_no])
                        (event,) = _judge([(report, received_at)], standings)
                        (position,) = await event_store.append(connection, [event])
                        await claim.keep(connection, report, event)
            except VersionTakenError:
                continue
            except Exception as error:
                if _is_refused(error):
                    raise RefusedReportError(str(error)) from error
                if not is_connection_lost(error):
                    raise
                # Whether it was committed is told by the claim itself.
                await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
                continue
            if seen is None:
                self._committed([event], [position])
                return _receipt(event, position)
            return _receipt(seen.event, seen.position) if seen.same_body else None

    async def _known_standings(self, order_nos: set[str]) -> dict[str, Standing]:
        known, missing = self._standings.look_up(order_nos)
        if missing:
            known.update(await self._store.standings(missing))
        return known

    def _committed(self, events: Sequence[Order.StatusReported], positions: Sequence[int]) -> None:
        self._standings.learn(events)
        self._on_commit(events, positions)


@asynccontextmanager
async def _in_time(due: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(due):
            yield
    except TimeoutError:
        raise StorageUnavailableError("the commit was not confirmed in time") from None


def _is_refused(error: Exception) -> bool:
    return isinstance(error, event_store.UndecodableEventError) or is_content_refused(error)


def _judge(arrivals: Sequence[Arrival], standings: dict[str, Standing]) -> list[Order.StatusReported]:
    """Judge reports one after the other; ``standings`` moves on with them."""
    events = []
    for report, received_at in arrivals:
        event = judge_report(standings[report.order_no], report, received_at)
        standings[report.order_no] = event.standing
        events.append(event)
    return events


def _receipt(event: Order.StatusReported, position: int) -> Receipt:
    return Receipt(
        event.verdict,
        event.report_id,
        event.originator_id,
        event.originator_version,
        position,
        event.status,
        event.reported_status,
        event.skipped,
        event.reason,
    )


class _Standings:
    """Where orders stood when last seen: a cache in two generations, the older dropped when the younger fills.

    It may be stale, since other processes record as well; the log's primary key refuses what comes of that.
    """

    def __init__(self, orders_max: int) -> None:
        self._generation_max = orders_max // 2
        self._young: dict[str, Standing] = {}
        self._old: dict[str, Standing] = {}

    def look_up(self, order_nos: Iterable[str]) -> tuple[dict[str, Standing], list[str]]:
        """Return what is known of these orders, and those of which nothing is."""
        known: dict[str, Standing] = {}
        missing: list[str] = []
        for order_no in order_nos:
            standing = self._young.get(order_no) or self._old.get(order_no)
            if standing is None:
                missing.append(order_no)
            else:
                known[order_no] = standing
        return known, missing

    def learn(self, events: Iterable[Order.StatusReported]) -> None:
        """Take in committed events."""
        for event in events:
            self._young[event.originator_id] = event.standing
        if len(self._young) > self._generation_max:
            self._young, self._old = {}, self._young

    def forget(self, order_nos: Iterable[str]) -> None:
        """Forget these orders: another writer knows them better."""
        for order_no in order_nos:
            self._young.pop(order_no, None)
            self._old.pop(order_no, None)
