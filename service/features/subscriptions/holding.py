"""The held orders of a deliverer, and when each of them is due: plain data, without I/O."""

import random
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timedelta
from heapq import heappop, heappush
from typing import Final

from service.features.subscriptions.sending import ENDINGS, Attempt

# The share by which a pause before the next attempt is longer or shorter at random.
JITTER: Final = 0.1


@dataclass(slots=True)
class Held:
    """An order that is held: see ``held_orders.HeldOrder``.

    Attributes:
        version: the first event that is not delivered.
        latest: the highest version that is known to wait.
        was_told_to_wait: whether the endpoint has asked for the pause before the next attempt.
    """

    version: int
    position: int
    since: datetime
    attempts: int
    last_attempt_at: datetime | None
    next_attempt_at: datetime | None
    last_error: str | None
    latest: int = 0
    was_told_to_wait: bool = False


class Holding:
    """The held orders of one subscription.

    Args:
        held: the orders as they were saved.
        retry_seconds: the pauses before each attempt at an event, the first of which is 0.
        busy: the orders with a request in flight, kept up to date by the caller. They are not due.
        changed: called after each change that needs a save.
    """

    def __init__(
        self,
        held: Mapping[str, Held],
        retry_seconds: Sequence[float],
        busy: AbstractSet[str],
        changed: Callable[[], None],
    ) -> None:
        self._held = dict(held)
        self._retry_seconds = retry_seconds
        self._busy = busy
        self._changed = changed
        # An entry is valid while the held order has the same time.
        self._due: list[tuple[datetime, str]] = []
        # The orders that have changed since the last save.
        self._unsaved: set[str] = set()
        # The orders with a probe in flight. It is sent ahead of its time, and shows whether the endpoint is up.
        self._probed: set[str] = set()
        for order_no in self._held:
            self._schedule(order_no)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, order_no: str) -> bool:
        return order_no in self._held

    def __getitem__(self, order_no: str) -> Held:
        return self._held[order_no]

    def get(self, order_no: str) -> Held | None:
        """Return how an order is held, None if it is not."""
        return self._held.get(order_no)

    def hold(self, order_no: str, version: int, position: int, now: datetime) -> Held:
        """Hold an order from an event on. It is due at once."""
        held = self._held[order_no] = Held(version, position, now, 0, None, now, None, latest=version)
        self._schedule(order_no)
        self._mark(order_no)
        return held

    def postpone(self, order_no: str, attempt: Attempt, now: datetime) -> bool:
        """Record a failed attempt at an order's event, and schedule the next one.

        Returns:
            False if no attempt is left: the order waits for an operator.
        """
        held = self._held[order_no]
        held.last_attempt_at, held.last_error = now, attempt.error
        held.was_told_to_wait = bool(attempt.retry_after_seconds)
        self._mark(order_no)
        if attempt.outcome in ENDINGS:
            # The endpoint refuses every event, not just this one, which is due once the subscription goes on.
            held.next_attempt_at = now
        elif order_no not in self._probed:
            # A probed order keeps its schedule.
            held.attempts += 1
            if held.attempts >= len(self._retry_seconds):
                held.next_attempt_at = None
                return False
            pause = self._retry_seconds[held.attempts] * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret  # nosec B311
            held.next_attempt_at = now + timedelta(seconds=max(pause, attempt.retry_after_seconds or 0.0))
        return True

    def give_up(self, order_no: str, reason: str) -> None:
        """Hold an order until an operator acts, since its event cannot be sent."""
        held = self._held[order_no]
        held.next_attempt_at, held.last_error = None, reason
        self._mark(order_no)

    def go_on(self, order_no: str, version: int, now: datetime) -> None:
        """Hold an order from a later event on, since the earlier ones are delivered. It is due at once."""
        held = self._held[order_no]
        held.version, held.attempts, held.last_error = version, 0, None
        held.next_attempt_at = now
        held.latest = max(held.latest, version - 1)
        self._mark(order_no)

    def release(self, order_no: str) -> None:
        """Hold an order no longer: none of its events waits."""
        del self._held[order_no]
        self._mark(order_no)

    def erase_error(self, order_no: str) -> None:
        """Drop what the endpoint said about an order, since it may quote an erased text."""
        self._held[order_no].last_error = None
        self._mark(order_no)

    # The schedule.

    def take_due(self, now: datetime) -> str | None:
        """Return an order that is due, or None. ``end_request`` schedules the order again."""
        while self._due and self._due[0][0] <= now:
            at, order_no = heappop(self._due)
            held = self._held.get(order_no)
            # A busy order is scheduled again when its request ends.
            if held is not None and held.next_attempt_at == at and order_no not in self._busy:
                return order_no
        return None

    def take_probe(self) -> str | None:
        """Return the order that is due next, to be sent ahead of its time, or None if no order may be."""
        waiting = (
            (held.next_attempt_at, order_no)
            for order_no, held in self._held.items()
            if held.next_attempt_at is not None and order_no not in self._busy and not held.was_told_to_wait
        )
        order_no = min(waiting, default=(None, None))[1]
        if order_no is not None:
            self._probed.add(order_no)
        return order_no

    def end_probe(self, order_no: str) -> None:
        """Let an order follow its schedule again, after a probe that delivered its event."""
        self._probed.discard(order_no)

    def end_request(self, order_no: str) -> None:
        """Schedule an order whose request has ended."""
        self._probed.discard(order_no)
        if order_no in self._held:
            self._schedule(order_no)

    def seconds_until_due(self, now: datetime) -> float | None:
        """Return how long it takes until an order is due, or None if no order is scheduled."""
        return max(0.0, (self._due[0][0] - now).total_seconds()) if self._due else None

    def make_due(self, since: datetime, now: datetime) -> None:
        """Schedule at once each order that has failed since the endpoint went down."""
        for order_no, held in self._held.items():
            is_waiting = held.next_attempt_at is not None and not held.was_told_to_wait
            if is_waiting and held.last_attempt_at is not None and held.last_attempt_at >= since:
                held.next_attempt_at = now
                self._schedule(order_no)

    def _schedule(self, order_no: str) -> None:
        if (at := self._held[order_no].next_attempt_at) is not None:
            heappush(self._due, (at, order_no))

    # Saving.

    def take_changes(self) -> dict[str, Held | None]:
        """Return the unsaved orders, with None for each that is no longer held. They count as saved now."""
        changes = {order_no: self._held.get(order_no) for order_no in self._unsaved}
        self._unsaved = set()
        return changes

    def put_back(self, changes: Mapping[str, Held | None]) -> None:
        """Mark orders as unsaved again, because their save failed."""
        self._unsaved |= changes.keys()

    def _mark(self, order_no: str) -> None:
        self._unsaved.add(order_no)
        self._changed()
