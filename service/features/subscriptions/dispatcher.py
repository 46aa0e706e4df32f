"""The dispatcher: of all processes, one delivers each subscription. If it ends, another one goes on."""

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from datetime import UTC, datetime
from typing import Final, NoReturn
from uuid import UUID

import structlog

from service.background import wait_for_event
from service.event_log.follow import Log, Place
from service.features.subscriptions.delivery import WENT_BACK, Clock, Delivery, log_end
from service.features.subscriptions.pace import Pace
from service.features.subscriptions.progress import Present, Progress
from service.features.subscriptions.sending import AttemptOutcome, Sender

# How often the table is read: so long may another process's change, or a dead deliverer, go unnoticed.
POLL_SECONDS: Final = 1.0
# How long a stopping process waits for requests in flight. They are sent again by the next one otherwise.
STOP_SECONDS_MAX: Final = 5.0

logger = structlog.get_logger()


def _now() -> datetime:
    return datetime.now(UTC)


class Dispatcher:
    """Runs a deliverer for each active subscription that no other process delivers.

    Args:
        progress: loads and saves subscriptions, and holds their locks.
        log: the log.
        sender: sends messages.
        retry_seconds: the pauses before each attempt at an event, the first of which is 0.
        now: returns the time.
        count_losses: returns how often others in this process have found that the log has lost events.

    Attributes:
        outcomes: the attempts of this process, by subscription and outcome.
        changed: set when a subscription was changed through this process.
        pace: delays requests while many reports arrive.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that it connects
        self,
        progress: Progress,
        log: Log,
        sender: Sender,
        retry_seconds: Sequence[float],
        now: Clock = _now,
        count_losses: Callable[[], int] = lambda: 0,
    ) -> None:
        self.outcomes: Counter[tuple[UUID, AttemptOutcome]] = Counter()
        self.changed = asyncio.Event()
        self.pace = Pace()
        self._progress = progress
        self._log = log
        self._sender = sender
        self._retry_seconds = retry_seconds
        self._now = now
        self._deliveries: dict[UUID, tuple[Delivery, asyncio.Task[None]]] = {}
        self._failures: dict[UUID, str] = {}
        self._is_stopping = False
        self._count_losses = count_losses
        self._losses = 0
        # Whether the log has lost events, so that every subscription must pause.
        self._has_lost_events = False
        # The last commit of this process, until a loss of it is known, and the recorder's losses at that time.
        self._committed: Place | None = None
        self._recorder_losses = 0
        # The session of ``progress`` whose server is known to have that commit.
        self._proved_in = 0
        # Up to where this process has read the log for each subscription, even if another one delivers it now.
        self._reached: dict[UUID, Place] = {}

    def observe_commit(self, place: Place, losses: int) -> None:
        """Learn of a commit of this process, before a deliverer can find its events in memory.

        Args:
            place: its last event's place.
            losses: how often the recorder has found by now that the log has lost a commit.
        """
        if losses != self._recorder_losses and self._committed is not None:
            self._has_lost_events = True
            for delivery, _ in self._deliveries.values():
                delivery.stop()
            self.changed.set()
        if (
            losses != self._recorder_losses
            or self._committed is None
            or place.position > self._committed.position
        ):
            # A commit that was in doubt may be found after a later one.
            self._committed = place
        self._recorder_losses = losses

    def wake(self) -> None:
        """Let every deliverer look at the log at once."""
        for delivery, _ in self._deliveries.values():
            delivery.log_grown.set()

    async def run(self) -> NoReturn:
        """Start and stop deliverers as the table demands. Run this under ``supervise``."""
        while True:
            self.changed.clear()
            await self._match()
            await wait_for_event(self.changed, POLL_SECONDS)

    async def stop(self) -> None:
        """Wait for the requests in flight, and end every deliverer. None is started any more."""
        self._is_stopping = True
        for delivery, _ in self._deliveries.values():
            delivery.stop()
        tasks = [task for _, task in self._deliveries.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS_MAX)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._deliveries.clear()
        await self._sender.close()

    async def _match(self) -> None:
        if self._is_stopping:
            return
        states = await self._progress.read_states()
        self._forget_paused(states)
        for key in [key for key in self.outcomes if key[0] not in states]:
            del self.outcomes[key]
        await self._match_running(states)
        if await self._pause_after_loss():
            return
        for subscription_id, present in states.items():
            if present.state == "active" and subscription_id not in self._deliveries:
                await self._try_start(subscription_id)

    async def _match_running(self, states: Mapping[UUID, Present]) -> None:
        for subscription_id, (delivery, task) in [*self._deliveries.items()]:
            present = states.get(subscription_id)
            if task.done():
                await self._clear(subscription_id, task)
            elif delivery.session != self._progress.session:
                # The locks are lost, so another process may deliver by now.
                await self._cut_off(subscription_id, task)
            elif present is None or present.state != "active":
                delivery.stop()
            elif present.revision > delivery.revision > 0:
                delivery.reload()

    async def _pause_after_loss(self) -> bool:
        """Pause every subscription if this process knows that the log has lost events; return whether it does.

        After a failover, each process proves its last commit at once, and not when its next report arrives:
        otherwise it would pause again what an operator has resumed in the meantime.
        """
        if (losses := self._count_losses()) != self._losses:
            self._losses, self._has_lost_events = losses, True
        committed, session = self._committed, self._progress.session
        if committed is not None and session != self._proved_in:
            # If the connection is lost in the meantime, the next round has another session.
            self._has_lost_events = self._has_lost_events or not await self._progress.has(committed)
            self._proved_in = session
        if not self._has_lost_events:
            return False
        for subscription_id, (_, task) in [*self._deliveries.items()]:
            await self._cut_off(subscription_id, task)
        for subscription_id in await self._progress.pause_all():
            # The operator learns of the loss, and decides where it goes on.
            self._reached.pop(subscription_id, None)
            log_end(subscription_id, WENT_BACK)
        self._has_lost_events = False
        if committed is self._committed:
            self._committed = None
        return True

    def _forget_paused(self, states: Mapping[UUID, Present]) -> None:
        """Forget what was read for subscriptions that are removed, or that another process has paused."""
        for subscription_id in [*self._reached]:
            present = states.get(subscription_id)
            if present is None or present.reason == "log_went_back":
                del self._reached[subscription_id]

    async def _cut_off(self, subscription_id: UUID, task: asyncio.Task[None]) -> None:
        """End a deliverer at once. Its requests in flight are sent again when the subscription goes on."""
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        delivery = self._remove(subscription_id)
        await self._give_up(delivery)

    async def _give_up(self, delivery: Delivery) -> None:
        if delivery.session == self._progress.session:
            await self._progress.give_up_lead(delivery.subscription_id)

    def _remove(self, subscription_id: UUID) -> Delivery:
        delivery, _ = self._deliveries.pop(subscription_id)
        if (reached := delivery.reached) is not None:
            self._reached[subscription_id] = reached
        self._has_lost_events = self._has_lost_events or delivery.has_lost_events
        return delivery

    async def _try_start(self, subscription_id: UUID) -> None:
        if not await self._progress.try_lead(subscription_id):
            return
        delivery = Delivery(
            subscription_id,
            self._progress.session,
            self._progress,
            self._log,
            self._sender,
            self._retry_seconds,
            self._now,
            self.outcomes,
            self.pace,
            self._reached.get(subscription_id),
        )
        name = f"deliver {subscription_id}"
        task = asyncio.create_task(delivery.run(), name=name, context=Context())
        # At once. A failed one waits for the next round.
        task.add_done_callback(lambda _task: self.changed.set() if delivery.has_lost_events else None)
        self._deliveries[subscription_id] = delivery, task

    async def _clear(self, subscription_id: UUID, task: asyncio.Task[None]) -> None:
        """Remove an ended deliverer. If it failed, the next round starts another one."""
        delivery = self._remove(subscription_id)
        error = None if task.cancelled() else task.exception()
        if error is None:
            self._failures.pop(subscription_id, None)
        elif repr(error) != self._failures.get(subscription_id):
            # The same failure again is not news.
            self._failures[subscription_id] = repr(error)
            logger.warning(
                "deliveries of a subscription failed and begin again",
                subscription=str(subscription_id),
                error=repr(error),
            )
        await self._give_up(delivery)
