"""The events that were read from the log and are not all delivered yet, in order for each order.

Plain data, without I/O. An event is *started* when a sender takes it and *done* when it is delivered or its
order is held. The window's position can be saved up to the first event that is not done.
"""

import random
from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from time import monotonic
from typing import Final, NamedTuple

from service.event_log.follow import Place

# Enough for all senders. More would only have to be read again after a restart.
EVENTS_MAX: Final = 256
BYTES_MAX: Final = 4 * 1024 * 1024
# So many started events may wait for the first one, so that they can be saved.
STARTED_MAX: Final = 64


class Message(NamedTuple):
    """An event as it is sent.

    Attributes:
        order_no: its order.
        version: its version.
        message_id: the message's id.
        body: the message's body.
        traceparent: the trace that the event belongs to, None if it has none.
    """

    order_no: str
    version: int
    message_id: str
    body: bytes
    traceparent: str | None


@dataclass(eq=False, slots=True)
class Entry:
    """A message to deliver.

    Attributes:
        message: the message.
        place: its event's place in the log.
        before: the place up to which the log is done once all earlier entries are.
        started_at: when a sender took it (monotonic clock); None before.
        is_done: whether it is delivered or its order is held.
    """

    message: Message
    place: Place
    before: Place
    started_at: float | None = None
    is_done: bool = False


class Window:
    """The read events of one subscription.

    Args:
        place: the saved place, above which events are read.

    Attributes:
        read: the place of the last event that was read.
        started: the number of started events that cannot be saved yet.
    """

    def __init__(self, place: Place) -> None:
        self.read = place
        self._entries: deque[Entry] = deque()
        self._lanes: dict[str, deque[Entry]] = {}
        # The orders whose first event may be started, by its position: the lowest one first, since the place up
        # to which all is done waits for it.
        self._ready: list[tuple[int, str]] = []
        self._bytes = 0
        self.started = 0

    @property
    def is_stuck(self) -> bool:
        """Whether neither can an event be started nor a further one be read before the first one is done."""
        return self.started >= STARTED_MAX or (self.is_full and not self._ready)

    @property
    def is_full(self) -> bool:
        """Whether no further event should be read."""
        return len(self._entries) >= EVENTS_MAX or self._bytes >= BYTES_MAX

    @property
    def done(self) -> Place:
        """The place up to which everything is done."""
        return self._entries[0].before if self._entries else self.read

    def first_of(self, order_no: str) -> Entry | None:
        """Return the first entry of an order, None if it has none."""
        lane = self._lanes.get(order_no)
        return lane[0] if lane else None

    @property
    def first(self) -> Entry | None:
        """The first entry that is not done."""
        return self._entries[0] if self._entries else None

    def pass_over(self, place: Place) -> None:
        """Read an event that is not to be delivered, or that waits behind a held one."""
        self.read = place

    def add(self, place: Place, message: Message) -> None:
        """Read an event that is to be delivered."""
        entry = Entry(message, place, self.read)
        self.read = place
        self._entries.append(entry)
        self._bytes += len(message.body)
        lane = self._lanes.get(message.order_no)
        if lane is None:
            self._lanes[message.order_no] = deque([entry])
            self.resume(message.order_no)
        else:
            lane.append(entry)

    def start(self, *, at_random: bool = False) -> Entry | None:
        """Return the next event that may be started, None if there is none: one at a time for each order.

        Args:
            at_random: return any of them instead of the one with the lowest position.
        """
        if at_random and self._ready:
            chosen = random.randrange(len(self._ready))  # noqa: S311 - no secret  # nosec B311
            # Zero is below every position.
            self._ready[chosen] = (0, self._ready[chosen][1])
            heapify(self._ready)
        while self._ready:
            # An order may have become held in the meantime.
            lane = self._lanes.get(heappop(self._ready)[1])
            if lane and lane[0].started_at is None:
                lane[0].started_at = monotonic()
                self.started += 1
                return lane[0]
        return None

    def postpone(self, entry: Entry) -> None:
        """Take back the start of an event. Its order is not ready again until ``resume``."""
        entry.started_at = None
        self.started -= 1

    def resume(self, order_no: str) -> None:
        """Make an order ready: its first event may be started."""
        if (lane := self._lanes.get(order_no)) is not None:
            heappush(self._ready, (lane[0].place.position, order_no))

    def finish(self, entry: Entry) -> int:
        """Mark a started event as delivered. Return how many more started events can be saved now."""
        lane = self._lanes[entry.message.order_no]
        lane.popleft()
        if lane:
            self.resume(entry.message.order_no)
        else:
            del self._lanes[entry.message.order_no]
        entry.is_done = True
        return self._advance()

    def release(self, order_no: str) -> int:
        """Hand an order with all of its events to the held orders. Return as ``finish`` does."""
        for entry in self._lanes.pop(order_no, ()):
            entry.is_done = True
        return self._advance()

    def _advance(self) -> int:
        started = 0
        while self._entries and self._entries[0].is_done:
            entry = self._entries.popleft()
            self._bytes -= len(entry.message.body)
            started += entry.started_at is not None
        self.started -= started
        return started
