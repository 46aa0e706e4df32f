"""The batcher: concurrent calls share one piece of work, and no call waits for others to arrive."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from itertools import chain
from typing import Final, Generic, TypeAlias, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# An item, its weight, its due time by the loop's clock, and its caller's future. A plain tuple is cheapest.
_Call: TypeAlias = tuple[Item, int, float, asyncio.Future[Result]]

# The share of the last batch's duration in the expected duration of the next one (exponential smoothing).
BATCH_SECONDS_SMOOTHING: Final = 0.1
# Callers whose time limits are this close to each other are answered together.
EXPIRY_SECONDS: Final = 0.01


class OverloadedError(Exception):
    """Too many items are waiting."""


class BatchFailedError(Exception):
    """The batch with this call failed; ``__cause__`` is the batch's error."""


class Batcher(Generic[Item, Result]):
    """Gathers calls into batches. The first call starts a leader task, which runs until no call waits.

    Args:
        work: receives a batch's items and the loop times at which they are due, both sorted by these times;
            returns an outcome for each item, in the same order. An outcome that is an exception is raised in
            its caller. A caller is answered as soon as its own item is due, while the work continues for the
            others: the work must begin nothing more for an item that is due.
        batch_items_max: the maximum number of items in a batch.
        queue_items_max: the maximum number of waiting items; further ones are refused at once.
        seconds_max: the time limit for a call, including its wait.
        wait_seconds_max: the maximum wait, estimated from the last batches. A call that would wait longer is
            refused at once, so that its caller can act.
        batch_weight_max: the maximum total weight of a batch; ``submit`` takes each item's weight.
        queue_weight_max: the maximum total weight of the waiting items.
    """

    def __init__(  # noqa: PLR0913 - every limit is named by its caller
        self,
        work: Callable[[list[Item], Sequence[float]], Awaitable[Sequence[Result | Exception]]],
        *,
        batch_items_max: int,
        queue_items_max: int,
        seconds_max: float,
        wait_seconds_max: float = float("inf"),
        batch_weight_max: int = 2**63,
        queue_weight_max: int = 2**63,
    ) -> None:
        self._work = work
        self._batch_items_max = batch_items_max
        self._batch_weight_max = batch_weight_max
        self._queue_items_max = queue_items_max
        self._queue_weight_max = queue_weight_max
        self._seconds_max = seconds_max
        self._waiting: deque[_Call[Item, Result]] = deque()
        self._waiting_weight = 0
        self._wait_seconds_max = wait_seconds_max
        self._batch_seconds = 0.0
        self._waiting_items_max = queue_items_max
        self._batch: list[_Call[Item, Result]] = []
        self._leader: asyncio.Task[None] | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, item: Item, weight: int = 0) -> "asyncio.Future[Result]":
        """Submit an item, and return the future of its outcome.

        Raises:
            OverloadedError: too many items are waiting; this one was not accepted.

        The future may raise:
            TimeoutError: the time limit was reached. If the item's batch had begun, the work may still succeed.
            BatchFailedError: the whole batch failed.
        """
        is_full = len(self._waiting) >= self._waiting_items_max
        if is_full or self._waiting_weight + weight > self._queue_weight_max:
            raise OverloadedError("too many requests are waiting")
        # Cached: on Python 3.11 this call takes as long as the rest of this method.
        loop = self._loop = self._loop or asyncio.get_running_loop()
        caller: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, weight, loop.time() + self._seconds_max, caller))
        self._waiting_weight += weight
        if self._leader is None:
            # The leader outlives the caller that started it, so it inherits no context.
            self._leader = loop.create_task(self._lead(), context=Context())
        return caller

    def answer(self, first: int, outcomes: Sequence[Result | Exception]) -> None:
        """Answer some callers of the present batch before its work ends.

        Args:
            first: the number of the first of them in the batch.
            outcomes: their outcomes.
        """
        for (*_, caller), outcome in zip(self._batch[first:], outcomes, strict=False):
            _answer(caller, outcome)

    @property
    def waiting(self) -> int:
        """How many items wait for their batch."""
        return len(self._waiting)

    async def drain(self) -> None:
        """Wait until no item is waiting."""
        while self._leader is not None:
            await asyncio.wait([self._leader])

    async def _lead(self) -> None:
        try:
            while self._waiting:
                batch = self._take()
                if batch:
                    began = asyncio.get_running_loop().time()
                    # If items are left waiting, this batch is as large as batches get.
                    items_max = len(batch) if self._waiting else self._batch_items_max
                    await self._work_on(batch)
                    self._expect(items_max, asyncio.get_running_loop().time() - began)
        finally:
            self._leader = None
            # Items still wait here only if the event loop is being closed.
            while self._waiting:
                *_, caller = self._waiting.popleft()
                caller.cancel()
            self._waiting_weight = 0

    def _expect(self, items_max: int, seconds: float) -> None:
        """Update the number of items that may wait, from the expected duration of the next batch."""
        self._batch_seconds += BATCH_SECONDS_SMOOTHING * (seconds - self._batch_seconds)
        batches = max(1.0, self._wait_seconds_max / max(self._batch_seconds, 1e-9))
        # Whole batches: an item beyond them waits for one more. A batch has at least one item.
        whole_batches = int(min(self._queue_items_max, batches))
        self._waiting_items_max = min(self._queue_items_max, whole_batches * items_max)

    def _take(self) -> list[_Call[Item, Result]]:
        now = asyncio.get_running_loop().time()
        batch: list[_Call[Item, Result]] = []
        batch_weight = 0
        while self._waiting and len(batch) < self._batch_items_max:
            call = self._waiting[0]
            _, weight, due, caller = call
            if batch and batch_weight + weight > self._batch_weight_max:
                break
            self._waiting.popleft()
            self._waiting_weight -= weight
            if caller.done():
                continue
            if due <= now:
                caller.set_exception(TimeoutError("the time limit was reached before the batch began"))
                continue
            batch.append(call)
            batch_weight += weight
        return batch

    async def _work_on(self, batch: list[_Call[Item, Result]]) -> None:
        self._batch = batch
        items, _, dues, _ = zip(*batch, strict=True)
        self._expiry = asyncio.get_running_loop().call_at(dues[0] + EXPIRY_SECONDS, self._expire, batch)
        try:
            outcomes = await self._work([*items], dues)
            answered = list(zip(batch, outcomes, strict=True))
        except BaseException as error:
            for *_, caller in batch:
                if not caller.done():
                    # A shared exception would grow its traceback with every task that raises it.
                    failure = BatchFailedError(str(error))
                    failure.__cause__ = error
                    caller.set_exception(failure)
            if not isinstance(error, Exception):
                raise
            return
        finally:
            self._batch = []
            if self._expiry is not None:
                self._expiry.cancel()
        for (*_, caller), outcome in answered:
            _answer(caller, outcome)

    def _expire(self, batch: list[_Call[Item, Result]]) -> None:
        """Answer the callers whose time limit is reached, in the batch and behind it. Both are sorted by it."""
        loop = asyncio.get_running_loop()
        for _, _, due, caller in chain(batch, self._waiting):
            if due > loop.time():
                self._expiry = loop.call_at(due + EXPIRY_SECONDS, self._expire, batch)
                return
            if not caller.done():
                caller.set_exception(TimeoutError("the time limit was reached before the batch ended"))


def _answer(caller: asyncio.Future[Result], outcome: Result | Exception) -> None:
    if caller.done():
        return
    if isinstance(outcome, Exception):
        caller.set_exception(outcome)
    else:
        caller.set_result(outcome)
