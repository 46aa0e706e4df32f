"""The deliverer of one subscription: it follows the log, sends what matches, and saves how far it is.

At least once, in order for each order: an event is sent only after the order's previous one was delivered,
and the saved position lies behind everything that is not. An event that fails *holds* its order: the order's
later events wait while the other orders go on. After a kill, at most UNSAVED_MAX messages are sent again.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from contextvars import Context
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from time import monotonic
from typing import Any, Final
from uuid import UUID

import structlog
from yarl import URL

from domain.logged import FailedEvent
from domain.order import Order
from service.background import wait_for_event
from service.event_log.erasures import HeardUpTo
from service.event_log.follow import Log, Place, PlaceLostError, follow, place_of
from service.features.subscriptions.endpoint import Endpoint
from service.features.subscriptions.held_orders import HELD_ORDERS_MAX
from service.features.subscriptions.holding import Held, Holding
from service.features.subscriptions.latest_responses import LatestResponses
from service.features.subscriptions.message import Selection, make_message_id
from service.features.subscriptions.pace import Pace
from service.features.subscriptions.progress import Changes, ErasedError, Loaded, Progress
from service.features.subscriptions.responses import ATTEMPT_SECONDS_MAX
from service.features.subscriptions.sending import ENDINGS, Attempt, AttemptOutcome, Sender
from service.features.subscriptions.subscription import SubscriptionReason, SubscriptionState
from service.features.subscriptions.window import STARTED_MAX, Entry, Message, Window

# The requests in flight of one subscription, and of one order: one.
IN_FLIGHT_MAX: Final = 32
# Requests that were begun but whose results are not saved yet.
UNSAVED_MAX: Final = STARTED_MAX
# How long results wait for others to be saved with them.
SAVE_SECONDS: Final = 0.1
# How long a change waits for the requests in flight.
DRAIN_SECONDS_MAX: Final = 2.0
# How long the end of a subscription waits for them.
END_SECONDS_MAX: Final = ATTEMPT_SECONDS_MAX + 5.0
# An entry in flight for so long, while no other one can be started, becomes a held order.
BLOCKED_SECONDS_MAX: Final = 0.1
# The longest pause, in case a wake is lost or the clock jumps.
POLL_SECONDS: Final = 1.0
# The log has lost events that the endpoint may have, or is another one.
WENT_BACK: Final[tuple[SubscriptionState, SubscriptionReason]] = ("paused", "log_went_back")
BATCH_EVENTS: Final = 200

Clock = Callable[[], datetime]

logger = structlog.get_logger()


@dataclass(eq=False)
class _Work:
    """A subscription since it was loaded. A result that arrives after the next load is dropped.

    Attributes:
        heard: up to where the erasures are applied to its events and texts.
        begun: the number of requests that were begun.
        covered: the number of those whose results the next save covers.
        saved: the number of those whose results are saved.
        delivered: the number of successful attempts since the last save.
        failed: the number of the others.
        takes_held: whether the last request that had a choice was one of a held order.
    """

    loaded: Loaded
    heard: HeardUpTo
    url: URL
    window: Window
    held: Holding
    endpoint: Endpoint = field(default_factory=Endpoint)
    begun: int = 0
    covered: int = 0
    saved: int = 0
    delivered: int = 0
    failed: int = 0
    takes_held: bool = False

    @property
    def selection(self) -> Selection:
        return self.loaded.selection

    @property
    def unsaved(self) -> int:
        return self.begun - self.saved


class Delivery:
    """Delivers one subscription, which this process leads.

    Args:
        subscription_id: the subscription.
        session: the session of ``progress`` that holds the subscription's lock.
        progress: loads and saves it.
        log: the log.
        sender: sends the messages.
        retry_seconds: the pauses before each attempt at an event, the first of which is 0.
        now: returns the time.
        outcomes: counts the attempts by subscription and outcome.
        pace: delays requests while many reports arrive.
        reached: up to where this process has read the log for it before.

    Attributes:
        log_grown: set by others when the log has grown.
        has_lost_events: whether the log has lost events that were read for the subscription. The deliverer has
            ended then, and the dispatcher pauses every subscription.
        revision: the revision of the subscription that is being delivered; 0 before it is loaded.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that it connects
        self,
        subscription_id: UUID,
        session: int,
        progress: Progress,
        log: Log,
        sender: Sender,
        retry_seconds: Sequence[float],
        now: Clock,
        outcomes: Counter[tuple[UUID, AttemptOutcome]],
        pace: Pace,
        reached: Place | None = None,
    ) -> None:
        self.subscription_id = subscription_id
        self.session = session
        self.log_grown = asyncio.Event()
        self.revision = 0
        self._progress = progress
        self._log = log
        self._sender = sender
        self._retry_seconds = retry_seconds
        self._now = now
        self._outcomes = outcomes
        self._pace = pace
        self.has_lost_events = False
        self._reached = reached
        self._work: _Work | None = None
        self._wake = asyncio.Event()
        self._space = asyncio.Event()
        self._dirty = asyncio.Event()
        self._urgent = asyncio.Event()
        # Set when the present work must end: to load it again, or to stop. No further request is begun then.
        self._interrupted = asyncio.Event()
        self._is_stopping = False
        self._ending: tuple[SubscriptionState, SubscriptionReason] | None = None
        self._has_ended = False
        self._tasks: dict[asyncio.Task[None], str] = {}
        # Orders with a request in flight, also of an earlier load.
        self._busy: set[str] = set()
        self._failure: BaseException | None = None
        self._responses = LatestResponses()
        self._is_full = False
        self._saved = asyncio.Event()
        self._saving: asyncio.Task[None] | None = None

    @property
    def reached(self) -> Place | None:
        """Up to where this process has ever read the log for the subscription, None if that does not matter."""
        reached = self._reached
        if self._work is not None:
            read = self._work.window.read
            reached = read if reached is None or read.position >= reached.position else reached
        return reached

    def reload(self) -> None:
        """Save, and load the subscription again, since an operator has changed it."""
        self._interrupted.set()

    def stop(self) -> None:
        """Begin no further request, and end when those in flight have ended."""
        self._is_stopping = True
        self._interrupted.set()

    async def run(self) -> None:
        """Deliver until the subscription is paused or removed, ``stop`` was called, or something fails.

        Raises:
            LeadLostError: the session with the lock has ended.
            Exception: whatever a read or a save raises. What was not saved is sent again after the next start.
        """
        try:
            while not (self._is_stopping or self._has_ended or self.has_lost_events):
                # From here on, the results of earlier requests are dropped.
                self._drop_work()
                self._interrupted.clear()
                self._ending = None
                # First: what is loaded later lacks what these erasures have erased.
                await self._log.memory.hear_in_time()
                heard = self._log.memory.erasures.up_to
                now = self._now()
                loaded = await self._progress.load(self.subscription_id, self.session, now, self.reached)
                if loaded is None:
                    return
                self.revision = loaded.revision
                self.has_lost_events = loaded.has_lost_events
                if loaded.is_other_log:
                    await self._end(loaded, WENT_BACK)
                elif not self.has_lost_events:
                    await self._deliver_while_proved(self._begin(loaded, heard))
        finally:
            self._drop_work()
            remaining = [*self._tasks, *([self._saving] if self._saving is not None else [])]
            for task in remaining:
                task.cancel()
            await asyncio.gather(*remaining, return_exceptions=True)

    def _drop_work(self) -> None:
        self._reached, self._work = self.reached, None

    async def _end(self, loaded: Loaded, ending: tuple[SubscriptionState, SubscriptionReason]) -> None:
        """Stop the subscription until an operator resumes it, unless one has changed it in the meantime."""
        self._has_ended = await self._progress.end(self.subscription_id, loaded, *ending)
        if self._has_ended:
            log_end(self.subscription_id, ending)

    def _begin(self, loaded: Loaded, heard: HeardUpTo) -> _Work:
        held = Holding(loaded.held, self._retry_seconds, self._busy, self._wake_loops)
        work = _Work(loaded, heard, URL(loaded.url), Window(loaded.place), held)
        self._work = work
        return work

    async def _deliver_while_proved(self, work: _Work) -> None:
        try:
            await self._deliver(work)
        except PlaceLostError as error:
            logger.warning("the log has lost events that were read for a subscription", error=str(error))
            self.has_lost_events = True

    async def _deliver(self, work: _Work) -> None:
        """Follow the log until interrupted; then wait for the requests in flight, and save their results."""
        loops = [
            asyncio.create_task(loop, context=Context())
            for loop in (self._read(work), self._start_requests(work), self._save_often(work))
        ]
        interrupted = asyncio.create_task(self._interrupted.wait())
        try:
            await asyncio.wait([*loops, interrupted], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*loops, interrupted):
                task.cancel()
            await asyncio.gather(*loops, interrupted, return_exceptions=True)
        if self._saving is not None:
            await self._saving
        for loop in loops:
            if not loop.cancelled() and (error := loop.exception()) is not None:
                raise error
        if self._failure is not None:
            raise self._failure
        if self._ending is not None:
            await self._end(work.loaded, self._ending)
        if self._tasks:
            is_end = self._is_stopping or self._has_ended
            # A slow endpoint must not delay a change for long. What is in flight then is sent again.
            await asyncio.wait(self._tasks, timeout=END_SECONDS_MAX if is_end else DRAIN_SECONDS_MAX)
        await self._save(work)

    # The log.

    async def _hear(self, work: _Work, *, at_once: bool = False) -> None:
        """Drop what erasures have erased: the events of these orders are read again from the log."""
        await self._log.memory.hear_in_time(at_once=at_once)
        erasures = self._log.memory.erasures
        erased = erasures.after(work.heard)
        if erased == [] or work is not self._work:
            return
        if erased is None:
            # Which orders were erased is unknown.
            self._responses.erase(None)
            self._interrupted.set()
            return
        orders = {one["order_no"] for one in erased}
        self._responses.erase(orders)
        work.heard = erasures.up_to
        for order_no in orders:
            if order_no in work.held:
                work.held.erase_error(order_no)
            elif (first := work.window.first_of(order_no)) is not None:
                self._hold(work, order_no, first.message.version, first.place.position)

    async def _read(self, work: _Work) -> None:
        await follow(partial(self._read_next, work), self.log_grown, poll_seconds=POLL_SECONDS)

    async def _read_next(self, work: _Work) -> int:
        while self._must_not_read(work):
            self._space.clear()
            await wait_for_event(self._space, POLL_SECONDS)
        events = await self._log.read_after(work.window.read, BATCH_EVENTS)
        for position, event in events:
            self._admit(work, position, event)
        if events:
            self._wake.set()
            self._dirty.set()
        return len(events)

    def _must_not_read(self, work: _Work) -> bool:
        is_full = len(work.held) >= HELD_ORDERS_MAX
        if is_full and not self._is_full:
            logger.error(
                "subscription holds too many orders: retry or skip some",
                subscription=str(self.subscription_id),
                held_orders=len(work.held),
            )
        self._is_full = is_full
        # A down endpoint gets what was read; if it was all held, a probe needs one more event.
        return is_full or work.window.is_full or (work.endpoint.is_down and work.window.first is not None)

    def _admit(self, work: _Work, position: int, event: Order.StatusReported | FailedEvent) -> None:
        place = place_of(position, event)
        order_no, version = event.originator_id, event.originator_version
        if (held := work.held.get(order_no)) is not None:
            held.latest = max(held.latest, version)
            work.window.pass_over(place)
        elif isinstance(event, FailedEvent):
            is_next = work.window.first_of(order_no) is None
            held = self._hold(work, order_no, version, position)
            held.latest = version
            work.window.pass_over(place)
            if is_next:
                self._give_up(work, order_no, held, event.reason)
        elif not work.selection.matches(event):
            work.window.pass_over(place)
        else:
            work.window.add(place, self._make_message(work, position, event))

    # The requests.

    async def _start_requests(self, work: _Work) -> None:
        while True:
            self._wake.clear()
            await self._hear(work)
            delay = 0.0
            while len(self._tasks) < IN_FLIGHT_MAX and work.unsaved < UNSAVED_MAX and self._goes_on(work):
                if delay := self._pace.delay_seconds():
                    break
                request = self._next_request(work)
                if request is None:
                    break
                self._start(*request)
            self._hold_blocking_entry(work)
            if work.unsaved >= UNSAVED_MAX:
                self._urgent.set()
            pause = BLOCKED_SECONDS_MAX if work.window.is_stuck else POLL_SECONDS
            if (until_due := work.held.seconds_until_due(self._now())) is not None:
                pause = min(pause, until_due)
            if delay:
                await asyncio.sleep(delay)
            else:
                await wait_for_event(self._wake, pause)

    def _next_request(self, work: _Work) -> tuple[str, Coroutine[Any, Any, None]] | None:
        """Return the next order and the work to do for it, None if nothing is due.

        Held orders and new events take turns, so that neither has to wait for all of the others.
        """
        now = self._now()
        if work.endpoint.is_down:
            return self._next_held(work, now) or self._next_probe(work, now)
        work.takes_held = not work.takes_held
        if work.takes_held:
            return self._next_held(work, now) or self._next_entry(work)
        return self._next_entry(work) or self._next_held(work, now)

    def _next_held(self, work: _Work, now: datetime) -> tuple[str, Coroutine[Any, Any, None]] | None:
        if (order_no := work.held.take_due(now)) is None:
            return None
        return order_no, self._deliver_held(work, order_no)

    def _next_entry(
        self, work: _Work, *, at_random: bool = False
    ) -> tuple[str, Coroutine[Any, Any, None]] | None:
        while (entry := work.window.start(at_random=at_random)) is not None:
            if entry.message.order_no not in self._busy:
                work.begun += 1
                return entry.message.order_no, self._deliver_entry(work, entry)
            # A request of before the last load is still in flight.
            work.window.postpone(entry)
        return None

    def _next_probe(self, work: _Work, now: datetime) -> tuple[str, Coroutine[Any, Any, None]] | None:
        """Return a request that finds out whether a down endpoint is up again, if it is time for one."""
        if not work.endpoint.take_probe(now):
            return None
        # In turns, since the endpoint may refuse just those orders that are held, or just the next ones.
        work.takes_held = not work.takes_held
        if work.takes_held and (order_no := work.held.take_probe()) is not None:
            return order_no, self._deliver_held(work, order_no)
        return self._next_entry(work, at_random=True)

    def _start(self, order_no: str, request: Coroutine[Any, Any, None]) -> None:
        self._busy.add(order_no)
        task = asyncio.create_task(request)
        self._tasks[task] = order_no
        task.add_done_callback(self._end_request)

    def _end_request(self, task: asyncio.Task[None]) -> None:
        order_no = self._tasks.pop(task)
        self._busy.discard(order_no)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
            self._interrupted.set()
        if (work := self._work) is not None:
            work.window.resume(order_no)
            work.held.end_request(order_no)
        self._wake_loops()

    async def _deliver_entry(self, work: _Work, entry: Entry) -> None:
        order_no, version = entry.message.order_no, entry.message.version
        attempt = await self._send(work, entry.message, 1)
        if work is not self._work:
            return
        held = work.held.get(order_no)
        if attempt.outcome != "delivered":
            if held is None:
                held = self._hold(work, order_no, version, entry.place.position)
            self._postpone(work, order_no, held, attempt)
        elif held is None:
            work.covered += work.window.finish(entry)
        else:
            # It took so long that the order became a held one.
            work.held.go_on(order_no, version + 1, self._now())
            await self._deliver_held(work, order_no)

    async def _deliver_held(self, work: _Work, order_no: str) -> None:
        """Send the events of a held order, one after the other, until one fails or none waits any more."""
        held = work.held[order_no]
        while self._goes_on(work):
            await self._hear(work)
            heard = work.heard
            events = await self._log.read_order(order_no, held.version - 1, work.window.read)
            if work is not self._work:
                return
            for position, event in events:
                await self._hear(work)
                erased = self._log.memory.erasures.after(heard) or ()
                if any(one["order_no"] == order_no for one in erased):
                    # Read the events again, as they are now.
                    break
                if position > work.window.read.position:
                    # The log has not been read so far: the order's next event is an ordinary one.
                    work.held.release(order_no)
                    return
                if not await self._deliver_next(work, held, position, event):
                    return
            if not events and held.latest < held.version:
                work.held.release(order_no)
                return

    async def _deliver_next(
        self, work: _Work, held: Held, position: int, event: Order.StatusReported | FailedEvent
    ) -> bool:
        """Send the next event of a held order. Return whether to go on with the event after it."""
        order_no, version = event.originator_id, event.originator_version
        held.position = position
        if isinstance(event, FailedEvent):
            self._give_up(work, order_no, held, event.reason)
            return False
        if work.selection.matches(event):
            if not await self._may_begin(work):
                return False
            attempt = await self._send(work, self._make_message(work, position, event), held.attempts + 1)
            if work is not self._work:
                return False
            work.covered += 1
            if attempt.outcome != "delivered":
                self._postpone(work, order_no, held, attempt)
                return False
        work.held.go_on(order_no, version + 1, self._now())
        return self._goes_on(work)

    def _goes_on(self, work: _Work) -> bool:
        """Return whether requests may still be begun for what was loaded then."""
        return work is self._work and not self._interrupted.is_set()

    async def _may_begin(self, work: _Work) -> bool:
        """Wait until there are not too many unsaved requests, and count a further one.

        Returns:
            False if the subscription is to be loaded again, or was so in the meantime.
        """
        while self._goes_on(work) and work.unsaved >= UNSAVED_MAX:
            self._saved.clear()
            self._dirty.set()
            self._urgent.set()
            await wait_for_event(self._saved, POLL_SECONDS)
        await self._pace.take_turn()
        if not self._goes_on(work):
            return False
        work.begun += 1
        return True

    def _make_message(self, work: _Work, position: int, event: Order.StatusReported) -> Message:
        return Message(
            event.originator_id,
            event.originator_version,
            make_message_id(self.subscription_id, event.report_id),
            work.selection.encode(position, event),
            event.traceparent,
        )

    async def _send(self, work: _Work, message: Message, number: int) -> Attempt:
        """Send a message, which is attempted for the ``number``-th time."""
        loaded = work.loaded
        is_over = loaded.secrets_until is not None and self._now() >= loaded.secrets_until
        secrets = loaded.secrets[:1] if is_over else loaded.secrets
        attempt = await self._sender.send(
            work.url, secrets, message.message_id, message.body, message.traceparent
        )
        if self._log.memory.erasures.has_erased(message.order_no, message.version):
            # The endpoint may repeat what was erased while it responded.
            attempt = attempt._replace(error=None)
        self._outcomes[self.subscription_id, attempt.outcome] += 1
        self._responses.add(self._now(), message, number, attempt)
        if work is self._work:
            self._judge(work, message.order_no, attempt)
        return attempt

    def _judge(self, work: _Work, order_no: str, attempt: Attempt) -> None:
        """Find out from an attempt whether the endpoint is up, down or gone."""
        now, endpoint = self._now(), work.endpoint
        if attempt.outcome == "delivered":
            work.delivered += 1
            if (since := endpoint.down_since) is not None:
                logger.info("endpoint of a subscription is up again", subscription=str(self.subscription_id))
                work.held.make_due(since, now)
            endpoint.succeed()
            work.held.end_probe(order_no)
            return
        work.failed += 1
        if endpoint.fail(order_no, attempt, now):
            work.takes_held = True
            self._dirty.set()
            logger.warning(
                "endpoint of a subscription is down",
                subscription=str(self.subscription_id),
                status=attempt.status,
            )
        if (ending := ENDINGS.get(attempt.outcome)) is not None:
            self._ending = ending
            self._interrupted.set()

    # Held orders.

    def _hold(self, work: _Work, order_no: str, version: int, position: int) -> Held:
        """Hold an order from its first event in the window on, from this one if it has none there."""
        if (first := work.window.first_of(order_no)) is not None:
            version, position = first.message.version, first.place.position
        held = work.held.hold(order_no, version, position, self._now())
        work.covered += work.window.release(order_no)
        return held

    def _hold_blocking_entry(self, work: _Work) -> None:
        """Hold the order of the first entry if it keeps others from being read or saved."""
        window, first = work.window, work.window.first
        if first is None or first.is_done:
            return
        # If it is not started, a request of before the last load holds up its order.
        is_slow = first.started_at is None or monotonic() - first.started_at > BLOCKED_SECONDS_MAX
        if window.is_stuck and is_slow:
            self._hold(work, first.message.order_no, first.message.version, first.place.position)

    def _postpone(self, work: _Work, order_no: str, held: Held, attempt: Attempt) -> None:
        if not work.held.postpone(order_no, attempt, self._now()):
            self._log_wait(held)

    def _give_up(self, work: _Work, order_no: str, held: Held, reason: str) -> None:
        work.held.give_up(order_no, reason)
        self._log_wait(held)

    def _log_wait(self, held: Held) -> None:
        logger.warning(
            "delivery awaits an operator",
            subscription=str(self.subscription_id),
            position=held.position,
            version=held.version,
            attempts=held.attempts,
        )

    def _wake_loops(self) -> None:
        for event in (self._dirty, self._wake, self._space):
            event.set()

    # The saves.

    async def _save_often(self, work: _Work) -> None:
        while True:
            await self._dirty.wait()
            await wait_for_event(self._urgent, SAVE_SECONDS)
            self._dirty.clear()
            self._urgent.clear()
            await self._save(work)
            self._wake.set()

    async def _save(self, work: _Work) -> None:
        """Save what was delivered, or begin to load the subscription again if it has changed.

        A save that has begun is completed. Cut off, it would cost the connection with the locks of all
        subscriptions.
        """
        self._saving = asyncio.create_task(self._save_now(work), context=Context())
        await asyncio.shield(self._saving)

    async def _save_now(self, work: _Work) -> None:
        while not await self._try_save(work):
            heard = work.heard
            await self._hear(work, at_once=True)
            if work.heard == heard:
                # What was erased is unknown. What is not saved is sent again.
                self._interrupted.set()
                return

    async def _try_save(self, work: _Work) -> bool:
        """Save; return False if an order was erased whose texts were to be saved."""
        counts, covered = (work.delivered, work.failed), work.covered
        work.delivered, work.failed = 0, 0
        changes = Changes(
            place=work.window.done,
            delivered=counts[0],
            failed=counts[1],
            responses=self._responses.take(is_last=self._interrupted.is_set()),
            held=work.held.take_changes(),
            down_since=work.endpoint.down_since,
            read=work.window.read,
            erasure_id=work.heard.erasure_id,
        )
        if self._responses.is_changed:
            self._dirty.set()
        try:
            is_saved = await self._progress.save(
                self.subscription_id, self.session, work.loaded.generation, changes
            )
        except ErasedError:
            work.held.put_back(changes.held)
            work.delivered, work.failed = work.delivered + counts[0], work.failed + counts[1]
            if changes.responses is not None:
                self._responses.put_back()
            return False
        if is_saved:
            work.saved = covered
            self._saved.set()
        else:
            self._interrupted.set()
        return True


def log_end(subscription_id: UUID, ending: tuple[SubscriptionState, SubscriptionReason]) -> None:
    """Log that a subscription has stopped by itself."""
    state, reason = ending
    logger.warning("subscription ended", subscription=str(subscription_id), state=state, reason=reason)
