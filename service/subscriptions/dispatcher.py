"""The dispatcher: of all processes, one delivers each subscription. If it ends, another one goes on."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextvars import Context
from datetime import UTC, datetime
from typing import Final, NoReturn
from uuid import UUID

import structlog

from service.background import wait_for_event
from service.subscriptions.delivery import Clock, Delivery
from service.subscriptions.log_reader import LogReader
from service.subscriptions.pace import Pace
from service.subscriptions.progress import Progress
from service.subscriptions.sending import Outcome, Sender

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
        reader: reads the log.
        sender: sends messages.
        retry_seconds: the pauses before each attempt at an event, the first of which is 0.
        now: returns the time.

    Attributes:
        outcomes: the attempts of this process, by subscription and outcome.
        changed: set when a subscription was changed through this process.
        pace: delays requests while many reports arrive.
    """

    def __init__(
        self,
        progress: Progress,
        reader: LogReader,
        sender: Sender,
        retry_seconds: Sequence[float],
        now: Clock = _now,
    ) -> None:
        self.outcomes: Counter[tuple[UUID, Outcome]] = Counter()
        self.changed = asyncio.Event()
        self.pace = Pace()
        self._progress = progress
        self._reader = reader
        self._sender = sender
        self._retry_seconds = retry_seconds
        self._now = now
        self._deliveries: dict[UUID, tuple[Delivery, asyncio.Task[None]]] = {}
        self._failures: dict[UUID, str] = {}
        self._is_stopping = False

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
        for key in [key for key in self.outcomes if key[0] not in states]:
            del self.outcomes[key]
        for subscription_id, (delivery, task) in [*self._deliveries.items()]:
            present = states.get(subscription_id)
            if task.done():
                await self._clear(subscription_id, task)
            elif delivery.session != self._progress.session:
                # The locks are lost, so another process may deliver by now.
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                del self._deliveries[subscription_id]
            elif present is None or present.state != "active":
                delivery.stop()
            elif present.revision > delivery.revision > 0:
                delivery.reload()
        for subscription_id, present in states.items():
            if present.state == "active" and subscription_id not in self._deliveries:
                await self._try_start(subscription_id)

    async def _try_start(self, subscription_id: UUID) -> None:
        if not await self._progress.try_lead(subscription_id):
            return
        delivery = Delivery(
            subscription_id,
            self._progress.session,
            self._progress,
            self._reader,
            self._sender,
            self._retry_seconds,
            self._now,
            self.outcomes,
            self.pace,
        )
        name = f"deliver {subscription_id}"
        task = asyncio.create_task(delivery.run(), name=name, context=Context())
        self._deliveries[subscription_id] = delivery, task

    async def _clear(self, subscription_id: UUID, task: asyncio.Task[None]) -> None:
        """Remove an ended deliverer. If it failed, the next round starts another one."""
        delivery, _ = self._deliveries.pop(subscription_id)
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
        if delivery.session == self._progress.session:
            await self._progress.give_up_lead(subscription_id)
