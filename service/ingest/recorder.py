"""The recorder: it decides and appends reports in batches, and returns their receipts after the commit.

Two rules hold for every way through this module:

- A report whose caller was answered is never begun. A report is due at its time limit, when its caller gets
  503. From then on no append is sent with it; only one that was sent before may still be committed.
- What this process has seen of the log is used only together with a proof that the log still has it. Each
  append carries the newest events that its decisions rely on, and appends nothing if the log has lost one.
"""

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from time import monotonic
from typing import Final, Literal, NamedTuple, Protocol

import asyncpg
import structlog
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.order import Order, OrderState, Report, decide, evolve
from domain.statuses import STANDARD_VOCABULARY, Recognise, Status
from domain.transitions import Verdict
from projections.postgres import Connection, is_report_at_fault, is_row_at_fault, is_worth_repeating
from service.batcher import Batcher, BatchFailedError, OverloadedError
from service.database.connections import (
    RECONNECT_PAUSE_SECONDS,
    DedicatedConnection,
    StorageUnavailableError,
    TooLateError,
    UnsupportedServerError,
)
from service.event_log import store
from service.event_log.codec import UndecodableEventError
from service.event_log.store import (
    Appended,
    LogWentBackError,
    SeenEvent,
    UnreplicatedCommitError,
    VersionTakenError,
)
from service.ingest.order_states import OrderStates
from service.ingest.parser import ignored_members

# A larger batch gains nothing and delays its first report.
BATCH_REPORTS_MAX: Final = 512
BATCH_BYTES_MAX: Final = 4 * 1024 * 1024
# The maximum size of all waiting bodies, so that large ones cannot fill the memory. Bodies that are still
# arriving have a budget of their own.
QUEUE_BYTES_MAX: Final = 32 * 1024 * 1024
# A report that would wait longer is refused at once, and its retry finds a shorter queue. Without this limit,
# all reports in a long queue could reach their time limit, so that none would get a receipt.
WAIT_SECONDS_MAX: Final = 0.4
# A batch takes milliseconds. One that waits for this long is the reason why further reports are refused.
STALL_SECONDS: Final = 1.0
# Reports with a claim are recorded one by one, in turn with the batches, so more of them would wait too long.
CLAIMED_REPORTS_MAX: Final = 64
# The share of its time limit that a report must have left to open a connection. One that its caller abandons
# holds a backend until the server notices. While the log is locked, late callers could use up all of the
# server's.
OPENING_SHARE_MIN: Final = 0.1
# A full notification queue is logged at most once in this interval.
WARN_SECONDS: Final = 300.0
# For this long after another process has appended, each batch first looks for events above its cached states,
# half of which may be stale: a stale state costs its whole batch five more round trips under the lock.
SHARED_SECONDS: Final = 1.0
# About 500 bytes each: 50 MB.
ORDER_STATES_MAX: Final = 100_000

NOT_BEGUN: Final = "the time limit was reached before the report was sent to the database; it is not recorded"

logger = structlog.get_logger()

Outcome = Literal[Verdict, "quarantined"]


class Receipt(TypedDict):
    """The response to a report.

    ``quarantine_id`` is null unless the body was quarantined, or retried from the quarantine. ``ignored`` names
    the members that were sent but not taken, since their values are invalid.
    """

    outcome: Outcome
    report_id: str
    order_no: str | None
    version: int | None
    position: int | None
    status: Status | None
    reported_status: str | None
    skipped: list[Status] | None
    reason: str | None
    quarantine_id: int | None
    ignored: list[str]


class ClaimedEvent(NamedTuple):
    """The event that was recorded with a claim, its position, and whether the new report has the same body."""

    event: Order.StatusReported
    position: int
    same_body: bool


class Claim(Protocol):
    """What may be recorded at most once, such as a report with an idempotency key."""

    async def find(self, connection: Connection, report: Report) -> ClaimedEvent | Sequence[Report]:
        """Return the first event that was recorded with this claim, or the reports to record."""
        ...

    async def keep(self, connection: Connection, report: Report, event: Order.StatusReported) -> None:
        """Keep the claim with its first event, in the transaction that appends its events."""
        ...


class StalledError(StorageUnavailableError):
    """The database keeps the present reports waiting."""


class UnrecordableReportError(Exception):
    """The database rejects this report, or its order's last event is undecodable. No retry can succeed."""


class Recorder:
    """Records reports from many callers at once, and returns each receipt after its event's commit.

    Args:
        dedicated: the connection to the log.
        on_commit: called with the events and positions of every commit, in the order of the log, except that a
            commit that was in doubt may come after later ones.
        on_loss: called when the log has lost events that this process has seen, so that it forgets them.
        queue_reports_max: the maximum number of waiting reports.
        seconds_max: the time limit for one report, including its wait.
        recognise: the vocabulary.
        on_batch: called with the number of reports in a batch and its duration in seconds.
    """

    def __init__(  # noqa: PLR0913 - each is named by its caller
        self,
        dedicated: DedicatedConnection,
        on_commit: Callable[[Sequence[Order.StatusReported], Sequence[int]], None],
        *,
        on_loss: Callable[[], None] = lambda: None,
        queue_reports_max: int,
        seconds_max: float,
        recognise: Recognise = STANDARD_VOCABULARY.recognise,
        on_batch: Callable[[int, float], None] = lambda _reports, _seconds: None,
    ) -> None:
        self._dedicated = dedicated
        self._recognise = recognise
        self._on_batch = on_batch
        self._on_commit = on_commit
        self._on_loss = on_loss
        self._seconds_max = seconds_max
        self._states = OrderStates(ORDER_STATES_MAX)
        self._claimed_waiting = 0
        # One claim at a time waits for the connection, so that a batch waits for one at most.
        self._claim_turn = asyncio.Lock()
        self._claim_began: float | None = None
        # How often the connection had been opened when the statements under the lock were parsed.
        self._prepared_in = 0
        # The errors of the last batch and of the last report with a claim, None if they were committed.
        self._trouble: Exception | None = None
        self._claimed_trouble: Exception | None = None
        # When the present batch began, by the loop's clock; None if there is none.
        self._batch_began: float | None = None
        # The last commit.
        self._last: SeenEvent | None = None
        # Whether the log was found to have lost something that this process has seen, and not yet forgotten.
        self._went_back = False
        self.losses = 0
        self._shared_until = 0.0
        self._warn_at = 0.0
        self._batcher: Batcher[Report, Receipt] = Batcher(
            self._record_batch,
            batch_items_max=BATCH_REPORTS_MAX,
            batch_weight_max=BATCH_BYTES_MAX,
            queue_items_max=queue_reports_max,
            queue_weight_max=QUEUE_BYTES_MAX,
            seconds_max=seconds_max,
            wait_seconds_max=WAIT_SECONDS_MAX,
        )

    def trouble(self, *, keyed: bool = False) -> Exception | None:
        """Return why reports are not being committed now, None if they are.

        Args:
            keyed: reports with a claim, or else those without.
        """
        trouble, began = self._trouble, self._batch_began
        if keyed:
            trouble, began = self._claimed_trouble, self._claim_began
        if trouble is None and began is not None:
            seconds = asyncio.get_running_loop().time() - began
            if seconds > STALL_SECONDS:
                return StalledError(f"reports have been waiting for the database for {seconds:.1f} s")
        return trouble

    @property
    def waiting(self) -> int:
        """How many reports wait for their commit."""
        return self._batcher.waiting

    def forget(self) -> None:
        """Drop every cached order state, because commits may have been lost."""
        self._states.clear()

    async def drain(self) -> None:
        """Wait until no report is waiting for its receipt."""
        await self._batcher.drain()

    async def record(self, report: Report, claim: Claim | None = None) -> Receipt:
        """Record one report; when this returns, its event is committed.

        Args:
            report: the report.
            claim: a second report with the same claim and body gets the first receipt again, and no event; with
                another body, it is recorded as an ordinary report.

        Raises:
            OverloadedError: too many reports are waiting; nothing was recorded.
            StorageUnavailableError: no commit was confirmed in time. The report is not recorded, unless its
                append had been sent by then.
            UnrecordableReportError: this release cannot record the report.
        """
        if claim is None:
            return await self._record_in_batch(report)
        if self._claimed_waiting >= CLAIMED_REPORTS_MAX:
            raise OverloadedError("too many reports with idempotency keys are waiting")
        self._claimed_waiting += 1
        due = asyncio.get_running_loop().time() + self._seconds_max
        try:
            async with _time_limit(due), self._claim_turn:
                self._claim_began = asyncio.get_running_loop().time()
                try:
                    receipt = await self._record_claimed(report, claim, due)
                finally:
                    self._claim_began = None
        finally:
            self._claimed_waiting -= 1
        # Outside of the time limit: its batch has one of its own, after which nothing is begun.
        return receipt or await self._record_in_batch(report)

    async def _record_in_batch(self, report: Report) -> Receipt:
        try:
            return await self._batcher.submit(report, len(report.body))
        except TimeoutError as error:
            raise StorageUnavailableError(str(error)) from None
        except BatchFailedError as error:
            if isinstance(error.__cause__, StorageUnavailableError):
                raise StorageUnavailableError(str(error)) from error
            raise

    async def _record_batch(
        self, reports: list[Report], dues: Sequence[float]
    ) -> Sequence[Receipt | Exception]:
        loop = asyncio.get_running_loop()
        began = self._batch_began = loop.time()
        try:
            async with _time_limit(dues[-1]):
                receipts = await self._record(reports, dues, 0)
        except StorageUnavailableError as error:
            self._trouble = self._trouble or error
            raise
        except asyncpg.PostgresError as error:
            self._trouble = error
            raise _rejected(error) from error
        finally:
            self._batch_began = None
        self._on_batch(len(reports), loop.time() - began)
        return receipts

    async def _record(
        self, reports: list[Report], dues: Sequence[float], first: int
    ) -> Sequence[Receipt | Exception]:
        """Record some reports of the present batch, apart from those that fail by themselves.

        Args:
            reports: the reports.
            dues: when they are due.
            first: the number of the first of them in the batch.
        """
        try:
            return await self._record_together(reports, dues)
        except Exception as error:
            if _is_unrecordable(error):
                failure: Exception = UnrecordableReportError(str(error))
            elif is_row_at_fault(error):
                # Such as by a constraint that an operator has added: no fault of the report.
                failure = _rejected(error)
            else:
                raise
            if len(reports) == 1:
                return [failure]
        # One bad report must not fail the others in its batch. Halving the batch isolates it.
        middle = len(reports) // 2
        done = await self._record(reports[:middle], dues[:middle], first)
        # What is committed is acknowledged, whatever becomes of the other half.
        self._batcher.answer(first, done)
        return [*done, *await self._record(reports[middle:], dues[middle:], first + middle)]

    async def _record_together(
        self, reports: list[Report], dues: Sequence[float]
    ) -> Sequence[Receipt | Exception]:
        order_nos = {report.order_no for report in reports}
        # The events that may have been committed.
        sent: list[Order.StatusReported] | None = None
        appended: Appended | None
        # Before the look-up: the cached states are at most as new. Another report may move the last commit on
        # until these are sent, even to another log.
        seen = self._last
        try:
            states, newest = await self._known_states(order_nos, dues)
            sent = self._decide_all(reports, states)
            appended = await self._append(sent, {seen, newest}, dues)
        except (VersionTakenError, LogWentBackError, _LockNeededError) as error:
            # A state was stale, or the log has lost events. The whole statement was refused, or not sent.
            self._went_back |= isinstance(error, LogWentBackError)
            sent, appended = await self._record_locked(reports, dues, None)
        except Exception as error:
            if not _may_succeed_at_once(error):
                self._states.forget(order_nos)
                raise
            sent, appended = await self._record_locked(reports, dues, sent)
        except BaseException:
            self._states.forget(order_nos)
            raise
        # The first reports may have been left out, since they were due.
        late = [StorageUnavailableError(NOT_BEGUN) for _ in range(len(reports) - len(sent))]
        if appended is None:
            return late
        self._trouble = None
        self._commit(sent, appended)
        return [*late, *map(_receipt, sent, appended.positions)]

    async def _append(
        self, events: list[Order.StatusReported], seen: set[SeenEvent | None], dues: Sequence[float]
    ) -> Appended:
        loop = asyncio.get_running_loop()
        async with self._dedicated.connection(open_until=self._open_until(dues[-1])) as connection:
            if self._trouble is not None or loop.time() >= dues[0]:
                raise _LockNeededError
            proofs = [one for one in {*seen, self._last} if one is not None]
            warnings = self._dedicated.warnings
            try:
                appended = await store.append(connection, events, proofs)
            except asyncpg.ProgramLimitExceededError as error:
                if loop.time() >= dues[0]:
                    raise _LockNeededError from error
                appended = await store.append(connection, events, proofs, notify=False)
                await store.clear_notifications(connection)
                self._warn_of_full_queue(error)
        if self._dedicated.warnings != warnings:
            raise UnreplicatedCommitError(store.UNREPLICATED)
        return appended

    async def _record_locked(
        self,
        reports: list[Report],
        dues: Sequence[float],
        sent: list[Order.StatusReported] | None,
    ) -> tuple[list[Order.StatusReported], Appended | None]:
        """Record under the append lock, after a first attempt that was refused or whose outcome is unknown.

        A lost connection is reopened until the time limit. Under the lock, events that may have been committed
        are searched for: the transaction that wrote them holds the lock until it ends.

        Returns:
            The events and their places, of all reports or of the last ones: the others were due. None if all
            were due.
        """
        self._states.forget({report.order_no for report in reports})
        doubtful = [sent] if sent else []
        while True:
            try:
                async with self._locked(dues[-1]) as connection:
                    if found := await self._find_commit(connection, doubtful):
                        return found
                    events = await self._decide_undue(connection, reports, dues)
                    if not events:
                        return [], None
                    # Kept before the append, so that these events are searched for if it fails.
                    doubtful.append(events)
                    appended = await self._append_locked(connection, events)
            except (VersionTakenError, LogWentBackError):
                # Another writer does not take the lock, or its commit was not visible yet, or the log has lost
                # events. This append recorded nothing; the earlier ones are searched for again.
                doubtful.pop()
                await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
            except Exception as error:
                if _is_unrecordable(error) or is_row_at_fault(error):
                    raise
                if not isinstance(error, TooLateError):
                    self._trouble = error
                if not _may_succeed_at_once(error):
                    raise
                await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
            else:
                return events, appended

    async def _find_commit(
        self, connection: Connection, doubtful: Sequence[list[Order.StatusReported]]
    ) -> tuple[list[Order.StatusReported], Appended] | None:
        """Return the events that were committed without a confirmation, and their places, if any were."""
        for events in doubtful:
            if appended := await store.find_appended(connection, events):
                # It proves only itself: the log may have lost what came before, and have this from a late
                # statement.
                if self._last is not None and not await store.has_event(connection, self._last):
                    await self._forget_loss(connection)
                await store.await_standby(connection)
                return events, appended
        return None

    async def _decide_undue(
        self, connection: Connection, reports: list[Report], dues: Sequence[float]
    ) -> list[Order.StatusReported]:
        """Decide, from states read under the lock, on the reports whose callers were not answered yet."""
        states = await store.order_states(connection, {report.order_no for report in reports})
        now = asyncio.get_running_loop().time()
        return self._decide_all(reports[bisect_right(dues, now) :], states)

    async def _record_claimed(self, report: Report, claim: Claim, due: float) -> Receipt | None:
        """Record the reports of a claim together with it, in a transaction of their own.

        Returns:
            The receipt; the first receipt again if the claim was used with this body; None if it was used with
            another body.
        """
        while True:
            try:
                async with self._locked(due) as connection:
                    claimed = await claim.find(connection, report)
                    if isinstance(claimed, ClaimedEvent):
                        await store.await_standby(connection)
                    else:
                        order_nos = {one.order_no for one in claimed}
                        states = await store.order_states(connection, order_nos)
                        events = self._decide_all(claimed, states)
                        appended = await self._append_locked(connection, events)
                        await claim.keep(connection, report, events[0])
            except (VersionTakenError, LogWentBackError):
                await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
                continue
            except Exception as error:
                if _is_unrecordable(error):
                    raise UnrecordableReportError(str(error)) from error
                if isinstance(error, asyncpg.PostgresError) or _may_succeed_at_once(error):
                    self._claimed_trouble = error
                if isinstance(error, asyncpg.PostgresError) and not is_worth_repeating(error):
                    raise _rejected(error) from error
                if not _may_succeed_at_once(error):
                    raise
                # The next attempt finds the claim if this one was committed.
                await asyncio.sleep(RECONNECT_PAUSE_SECONDS)
                continue
            self._claimed_trouble = None
            if not isinstance(claimed, ClaimedEvent):
                self._commit(events, appended)
                return _receipt(events[0], appended.positions[0])
            return _receipt(claimed.event, claimed.position) if claimed.same_body else None

    def _decide_all(
        self, reports: Sequence[Report], states: dict[str, OrderState]
    ) -> list[Order.StatusReported]:
        """Decide on reports one after the other, and update ``states`` after each."""
        events = []
        for report in reports:
            state = states[report.order_no]
            event = decide(state, report, self._recognise)
            states[report.order_no] = evolve(state, event)
            events.append(event)
        return events

    async def _known_states(
        self, order_nos: set[str], dues: Sequence[float]
    ) -> tuple[dict[str, OrderState], SeenEvent | None]:
        """Return the states of these orders, and the newest event that was read for them, if any."""
        known, missing = self._states.look_up(order_nos)
        doubtful: Iterable[str] = order_nos if monotonic() < self._shared_until else missing
        newest = None
        if doubtful:
            async with self._dedicated.connection(open_until=self._open_until(dues[-1])) as connection:
                read, newest = await store.read_states(connection, doubtful, known)
            known.update(read)
        return known, newest

    def _open_until(self, due: float) -> float:
        return due - OPENING_SHARE_MIN * self._seconds_max

    @asynccontextmanager
    async def _locked(self, due: float) -> AsyncIterator[Connection]:
        """Keep all other writers from appending until the end of the block, which commits."""
        warnings = self._dedicated.warnings
        open_until = self._open_until(due)
        if self._prepared_in != self._dedicated.times_opened or not self._prepared_in:
            async with self._dedicated.connection(open_until=open_until) as connection:
                await store.prepare(connection)
                self._prepared_in = self._dedicated.times_opened
        async with self._dedicated.transaction(store.BEGIN_LOCKED, open_until=open_until) as connection:
            await store.take_append_lock(connection)
            if self._went_back:
                await self._forget_loss(connection)
            yield connection
        if self._dedicated.warnings != warnings:
            raise UnreplicatedCommitError(store.UNREPLICATED)

    def _warn_of_full_queue(self, error: Exception) -> None:
        if monotonic() >= self._warn_at:
            self._warn_at = monotonic() + WARN_SECONDS
            logger.warning("the notification queue is full: views and streams are late", error=str(error))

    async def _append_locked(self, connection: Connection, events: list[Order.StatusReported]) -> Appended:
        """Append events that were decided from states that were read under the lock.

        The last commit is proved even so: the feed and the next decisions take it and these events for one log.
        """
        try:
            return await store.append(connection, events, [] if self._last is None else [self._last])
        except LogWentBackError:
            self._went_back = True
            raise

    async def _forget_loss(self, connection: Connection) -> None:
        """Forget what this process has seen of the log, which has lost some of it, by a failover or a restore.

        The loss is logged and counted if it has a commit of this process.
        """
        self._on_loss()
        self.forget()
        if self._last is not None and not await store.has_event(connection, self._last):
            self.losses += 1
            head = await store.head_position(connection)
            logger.error(
                "the database has lost acknowledged reports", last_position=self._last.position, head=head
            )
        self._last = None
        self._went_back = False

    def _commit(self, events: Sequence[Order.StatusReported], appended: Appended) -> None:
        if self._last is not None and appended.positions[0] != self._last.position + 1:
            # Another process appends too. A gap of another origin costs a second of reading.
            self._shared_until = monotonic() + SHARED_SECONDS
        if self._last is None or appended.last.position > self._last.position:
            # A commit that was in doubt may be found after a later one.
            self._last = appended.last
        self._states.learn(events)
        self._on_commit(events, appended.positions)


@asynccontextmanager
async def _time_limit(due: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout_at(due):
            yield
    except TimeoutError:
        raise StorageUnavailableError("the commit was not confirmed in time") from None


class _LockNeededError(Exception):
    """The first reports of the batch are due, so they must be left out; or the last append was not committed.

    An append that its callers abandon may be committed, unless it is in a transaction.
    """


def _may_succeed_at_once(error: Exception) -> bool:
    """Return whether another attempt may succeed without an operator. A commit may be in doubt."""
    return is_worth_repeating(error) and not isinstance(error, UnsupportedServerError | TooLateError)


def _rejected(error: Exception) -> UnsupportedServerError:
    """Return the error of a report that the database rejects although the report is not to blame."""
    # Only the first line: PostgreSQL's further lines may quote a row.
    rejected = UnsupportedServerError(f"the database rejects reports: {str(error).partition(chr(10))[0]}")
    rejected.__cause__ = error
    return rejected


def _is_unrecordable(error: Exception) -> bool:
    return isinstance(error, UndecodableEventError) or is_report_at_fault(error)


def _receipt(event: Order.StatusReported, position: int) -> Receipt:
    return {
        "outcome": event.verdict,
        "report_id": event.report_id,
        "order_no": event.originator_id,
        "version": event.originator_version,
        "position": position,
        "status": event.status,
        "reported_status": event.reported_status,
        "skipped": event.skipped,
        "reason": event.reason,
        "quarantine_id": event.quarantine_id,
        "ignored": ignored_members(event.body, event.reported_cnote, event.occurred_at),
    }
