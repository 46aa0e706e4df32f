"""Gather concurrent calls into batches: many callers, one piece of work."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Final, Generic, TypeAlias, TypeVar

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


# Its item, its weight, when it is due by the loop's clock, and its caller. A plain tuple: one for each request.
_Call: TypeAlias = tuple[Item, int, float, asyncio.Future[Outcome]]


# How much the time of one batch weighs in what is expected of the next ones.
BATCH_SECONDS_WEIGHT: Final = 0.1


class OverloadedError(Exception):
    """More is waiting than may wait."""


class BatchFailedError(Exception):
    """The work that a call was part of failed; the cause says why."""


class Batcher(Generic[Item, Outcome]):
    """Callers wait together: whoever finds no leader starts one, which works batch after batch and ends.

    Args:
        work: given the items of a batch and the loop time by which the first of them is due; returns an
            outcome for each, in their order. An outcome that is an exception is raised in its caller.
        batch_items_max: items in one batch.
        queue_items_max: items waiting; more are refused at once.
        seconds_max: how long a call may take, waiting included.
        wait_seconds_max: how long a call may be expected to wait for its batch, by the time that batches took
            lately; what would wait longer is refused at once, while its caller can still do something else.
        batch_weight_max: the weight of one batch, as ``submit`` was told it.
        queue_weight_max: the weight of what waits.
    """

    def __init__(  # noqa: PLR0913 - every limit is named by its caller
        self,
        work: Callable[[list[Item], float], Awaitable[Sequence[Outcome | Exception]]],
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
        self._waiting: deque[_Call[Item, Outcome]] = deque()
        self._waiting_weight = 0
        self._wait_seconds_max = wait_seconds_max
        self._batch_seconds = 0.0
        self._admitted = queue_items_max
        self._leader: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def submit(self, item: Item, weight: int = 0) -> "asyncio.Future[Outcome]":
        """Hand in an item; the future gets its outcome.

        Raises:
            OverloadedError: too much is waiting already; nothing was done.

        The future may raise:
            TimeoutError: its time was over before its batch began; nothing was done.
            BatchFailedError: the work failed as a whole.
        """
        if len(self._waiting) >= self._admitted or self._waiting_weight + weight > self._queue_weight_max:
            raise OverloadedError("too many requests are waiting")
        # Asked for once: Python 3.11 takes as long for it as for all the rest here.
        loop = self._loop = self._loop or asyncio.get_running_loop()
        caller: asyncio.Future[Outcome] = loop.create_future()
        self._waiting.append((item, weight, loop.time() + self._seconds_max, caller))
        self._waiting_weight += weight
        if self._leader is None:
            # The leader outlives the caller that started it: it inherits none of its context.
            self._leader = loop.create_task(self._lead(), context=Context())
        return caller

    @property
    def waiting(self) -> int:
        """How many items wait for their batch."""
        return len(self._waiting)

    async def finish(self) -> None:
        """Wait until nothing waits any more."""
        while self._leader is not None:
            await asyncio.wait([self._leader])

    async def _lead(self) -> None:
        try:
            while self._waiting:
                batch = self._take()
                if batch:
                    began = asyncio.get_running_loop().time()
                    # What was left waiting tells that this one is as large as they come.
                    items_max = len(batch) if self._waiting else self._batch_items_max
                    await self._work_on(batch)
                    self._expect(items_max, asyncio.get_running_loop().time() - began)
        finally:
            self._leader = None
            # Reached with calls still waiting only when the loop itself is being torn down.
            while self._waiting:
                *_, caller = self._waiting.popleft()
                caller.cancel()
            self._waiting_weight = 0

    def _expect(self, items_max: int, seconds: float) -> None:
        """Admit as many as the next batches will take in time, if they take as long as the last ones did."""
        self._batch_seconds += BATCH_SECONDS_WEIGHT * (seconds - self._batch_seconds)
        batches = max(1.0, self._wait_seconds_max / max(self._batch_seconds, 1e-9))
        self._admitted = int(min(self._queue_items_max, batches * items_max))

    def _take(self) -> list[_Call[Item, Outcome]]:
        now = asyncio.get_running_loop().time()
        batch: list[_Call[Item, Outcome]] = []
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
                caller.set_exception(TimeoutError("the time was over before the work began"))
                continue
            batch.append(call)
            batch_weight += weight
        return batch

    async def _work_on(self, batch: list[_Call[Item, Outcome]]) -> None:
        _, _, first_due, _ = batch[0]
        try:
            outcomes = await self._work([item for item, *_ in batch], first_due)
            answered = list(zip(batch, outcomes, strict=True))
        except BaseException as error:
            for *_, caller in batch:
                if not caller.done():
                    # One instance raised in many tasks would grow its traceback with each of them.
                    failure = BatchFailedError(str(error))
                    failure.__cause__ = error
                    caller.set_exception(failure)
            if not isinstance(error, Exception):
                raise
            return
        for (*_, caller), outcome in answered:
            if caller.done():
                continue
            if isinstance(outcome, Exception):
                caller.set_exception(outcome)
            else:
                caller.set_result(outcome)
