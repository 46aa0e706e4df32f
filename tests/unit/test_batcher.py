"""The batcher processes waiting calls together, and each caller gets the outcome of its own item."""

import asyncio
import traceback
from collections.abc import Sequence
from contextvars import ContextVar

import pytest

from service.batcher import Batcher, BatchFailedError, OverloadedError

SECONDS_MAX = 10.0


class Work:
    """Doubles numbers and records its batches; a batch waits while ``gate`` is closed."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.dues: list[Sequence[float]] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, items: list[int], dues: Sequence[float]) -> Sequence[int | Exception]:
        self.batches.append(items)
        self.dues.append(dues)
        self.begun.set()
        await self.gate.wait()
        return [item * 2 for item in items]


def batcher(work: Work, **limits: float) -> Batcher[int, int]:
    return Batcher(
        work,
        batch_items_max=int(limits.get("batch_items_max", 3)),
        queue_items_max=int(limits.get("queue_items_max", 100)),
        seconds_max=limits.get("seconds_max", SECONDS_MAX),
        batch_weight_max=int(limits.get("batch_weight_max", 2**63)),
        queue_weight_max=int(limits.get("queue_weight_max", 2**63)),
    )


async def begin(calls: Batcher[int, int], *items: int, weight: int = 0) -> list["asyncio.Task[int]"]:
    """Submit each item from a separate caller, and let the callers start to wait."""

    async def call(item: int) -> int:
        return await calls.submit(item, weight)

    tasks = [asyncio.create_task(call(item)) for item in items]
    await asyncio.sleep(0)
    return tasks


async def held(work: Work, calls: Batcher[int, int], item: int = 0) -> "asyncio.Task[int]":
    """Submit an item whose batch is blocked until the gate opens, so that later items queue behind it."""
    work.gate.clear()
    (task,) = await begin(calls, item)
    await work.begun.wait()
    return task


async def test_each_caller_gets_the_outcome_of_its_own_item() -> None:
    """Each of 50 concurrent callers gets the outcome of its own item."""
    work = Work()
    calls = batcher(work, batch_items_max=7)
    assert await asyncio.gather(*(calls.submit(item) for item in range(50))) == [item * 2 for item in range(50)]


async def test_waiting_items_form_batches_up_to_the_limit() -> None:
    """Waiting items form batches of at most batch_items_max, in the order of their submission."""
    work = Work()
    await asyncio.gather(*await begin(batcher(work), *range(8)))
    assert work.batches == [[0, 1, 2], [3, 4, 5], [6, 7]]


async def test_a_single_call_is_processed_at_once() -> None:
    """A single call is processed at once, as a batch of one item."""
    work = Work()
    assert await batcher(work).submit(21) == 42
    assert work.batches == [[21]]


async def test_items_that_arrive_during_a_batch_form_the_next_one() -> None:
    """Items that arrive during a batch form the next batch, because only one batch runs at a time."""
    work = Work()
    calls = batcher(work)
    first = await held(work, calls)
    others = await begin(calls, 1, 2)
    assert work.batches == [[0]]
    work.gate.set()
    assert await asyncio.gather(first, *others) == [0, 2, 4]
    assert work.batches == [[0], [1, 2]]


async def test_a_batch_is_bounded_by_weight() -> None:
    """A batch ends before the item that would take it over batch_weight_max."""
    work = Work()
    await asyncio.gather(*await begin(batcher(work, batch_weight_max=10), 1, 2, 3, weight=5))
    assert work.batches == [[1, 2], [3]]


async def test_an_item_over_the_weight_of_a_batch_is_a_batch_of_its_own() -> None:
    """An item that is heavier than batch_weight_max is processed alone."""
    work = Work()
    calls = batcher(work, batch_weight_max=10)
    tasks = [
        *await begin(calls, 1, weight=1),
        *await begin(calls, 2, weight=11),
        *await begin(calls, 3, weight=1),
    ]
    # All three items were submitted before the leader could take any of them.
    assert await asyncio.gather(*tasks) == [2, 4, 6]
    assert [2] in work.batches


async def test_a_full_queue_refuses_at_once() -> None:
    """A call over queue_items_max is refused without waiting, and the calls before it are processed."""
    work = Work()
    calls = batcher(work, queue_items_max=2)
    first = await held(work, calls)
    waiting = await begin(calls, 1, 2)
    with pytest.raises(OverloadedError):
        await calls.submit(3)
    work.gate.set()
    assert await asyncio.gather(first, *waiting) == [0, 2, 4]
    assert work.batches == [[0], [1, 2]]


@pytest.mark.attacks("handler", "all")
async def test_a_heavy_queue_refuses_at_once() -> None:
    """An item that would take the waiting weight over queue_weight_max is refused, and a lighter one is
    accepted.
    """
    work = Work()
    calls = batcher(work, queue_weight_max=10)
    first = await held(work, calls)
    waiting = await begin(calls, 1, weight=8)
    with pytest.raises(OverloadedError):
        await calls.submit(2, 3)
    waiting += await begin(calls, 3, weight=2)
    work.gate.set()
    assert await asyncio.gather(first, *waiting) == [0, 2, 6]


async def test_the_queue_limits_exclude_the_running_batch() -> None:
    """The limits of the queue count only waiting items, not the items of the running batch."""
    work = Work()
    calls = batcher(work, queue_items_max=3, queue_weight_max=9)
    work.gate.clear()
    first = await begin(calls, 1, 2, 3, weight=3)
    await work.begun.wait()
    second = await begin(calls, 4, 5, 6, weight=3)
    with pytest.raises(OverloadedError):
        await calls.submit(7, 1)
    work.gate.set()
    assert await asyncio.gather(*first, *second) == [2, 4, 6, 8, 10, 12]


async def test_no_call_waits_for_a_batch_that_begins_too_late() -> None:
    """A wait of one and a half batches is time for one more, however the next one is filled."""
    gate = asyncio.Event()

    async def work(items: list[int], _dues: Sequence[float]) -> Sequence[int | Exception]:
        # The first batch takes so long that each further one is expected to take a tenth of it, or more.
        await (asyncio.sleep(0.2) if items == [0] else gate.wait())
        return items

    calls: Batcher[int, int] = Batcher(
        work, batch_items_max=3, queue_items_max=100, seconds_max=SECONDS_MAX, wait_seconds_max=0.03
    )
    assert await calls.submit(0) == 0
    running = await begin(calls, 1)
    await asyncio.sleep(0)
    assert not calls.waiting
    waiting = await begin(calls, 2, 3, 4)
    with pytest.raises(OverloadedError):
        await calls.submit(5)
    gate.set()
    assert await asyncio.gather(*running, *waiting) == [1, 2, 3, 4]


async def test_without_a_limit_of_the_wait_the_queue_stays_long() -> None:
    """However long batches take, as many calls may wait as the queue has places."""
    work = Work()
    calls = batcher(work, batch_items_max=2, queue_items_max=9)
    assert await calls.submit(0) == 0
    first = await held(work, calls)
    waiting = await begin(calls, *range(9))
    assert calls.waiting == len(waiting)
    with pytest.raises(OverloadedError):
        await calls.submit(9)
    work.gate.set()
    await asyncio.gather(first, *waiting)


async def test_an_item_whose_time_is_over_before_its_batch_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that expires before its batch gets TimeoutError and is not processed; the others are."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    monkeypatch.setattr(loop, "time", lambda: began)
    work = Work()
    calls = batcher(work, seconds_max=0.05)
    first = await held(work, calls)
    late = await begin(calls, 1, 2)
    monkeypatch.setattr(loop, "time", lambda: began + 0.06)
    in_time = await begin(calls, 3)
    work.gate.set()
    await asyncio.wait([first])
    for task in late:
        with pytest.raises(TimeoutError):
            await task
    assert await asyncio.gather(*in_time) == [6]
    assert work.batches == [[0], [3]]


async def test_a_batch_of_expired_items_does_not_call_the_work() -> None:
    """If every waiting item has expired, the work is not called."""
    work = Work()
    calls = batcher(work, seconds_max=0)
    with pytest.raises(TimeoutError):
        await calls.submit(1)
    await calls.drain()
    assert work.batches == []


async def test_the_work_receives_the_deadline_of_each_item() -> None:
    """The work receives each item's deadline, sorted, by the loop's clock from the time of submission."""
    work = Work()
    calls = batcher(work)
    loop = asyncio.get_running_loop()
    first = await held(work, calls)
    await begin(calls, 1)
    await asyncio.sleep(0.05)
    before_last = loop.time()
    second = calls.submit(2)
    work.gate.set()
    await asyncio.gather(first, second)
    assert work.batches[1] == [1, 2]
    first_due, last_due = work.dues[1]
    assert first_due < before_last + SECONDS_MAX <= last_due <= loop.time() + SECONDS_MAX


async def test_callers_can_be_answered_before_their_batch_ends() -> None:
    """The work may answer some callers early. A later failure reaches only the others."""

    async def work(items: list[int], _dues: Sequence[float]) -> Sequence[int | Exception]:
        calls.answer(1, [items[1] * 2, OSError("refused")])
        early.set()
        await gate.wait()
        raise OSError("the rest has failed")

    early, gate = asyncio.Event(), asyncio.Event()
    calls: Batcher[int, int] = Batcher(work, batch_items_max=3, queue_items_max=3, seconds_max=SECONDS_MAX)
    first, second, third = (calls.submit(item) for item in (1, 2, 3))
    await early.wait()
    assert await second == 4
    with pytest.raises(OSError, match="refused"):
        await third
    assert not first.done()
    gate.set()
    with pytest.raises(BatchFailedError):
        await first


async def test_each_caller_of_a_stalled_batch_has_its_own_time() -> None:
    """While a batch stalls, its expired callers get TimeoutError, and so do those behind it; others wait on."""
    work = Work()
    calls = batcher(work, batch_items_max=2, seconds_max=0.3)
    work.gate.clear()
    early = [calls.submit(1)]
    await work.begun.wait()
    early += [calls.submit(2), calls.submit(3)]
    await asyncio.sleep(0.2)
    late = calls.submit(4)
    expired, _ = await asyncio.wait(early)
    assert all(isinstance(one.exception(), TimeoutError) for one in expired)
    assert not late.done()
    work.gate.set()
    assert await late == 8


async def test_a_caller_that_went_before_its_batch_is_left_out() -> None:
    """The item of a cancelled caller is not processed, and the other callers are not affected."""
    work = Work()
    calls = batcher(work)
    first = await held(work, calls)
    gone, stays = await begin(calls, 1, 2)
    gone.cancel()
    await asyncio.wait([gone])
    work.gate.set()
    assert [await first, await stays] == [0, 4]
    assert gone.cancelled()
    assert work.batches == [[0], [2]]


async def test_a_caller_that_goes_during_its_batch_cancels_nothing() -> None:
    """If the caller that started a batch is cancelled, the work continues and the other callers get their
    outcomes.
    """
    work = Work()
    calls = batcher(work)
    work.gate.clear()
    starter, other = await begin(calls, 1, 2)
    await work.begun.wait()
    starter.cancel()
    await asyncio.wait([starter])
    assert work.batches == [[1, 2]]
    work.gate.set()
    assert await other == 4


async def test_failed_work_fails_its_whole_batch_and_no_other() -> None:
    """If a batch fails, each of its callers gets a separate error with the cause, and the next batch is
    processed.
    """
    work = Work()
    failure = OSError("the disk is full")

    async def fail_once(items: list[int], dues: Sequence[float]) -> Sequence[int | Exception]:
        outcomes = await work(items, dues)
        if len(work.batches) == 1:
            raise failure
        return outcomes

    calls: Batcher[int, int] = Batcher(
        fail_once, batch_items_max=3, queue_items_max=100, seconds_max=SECONDS_MAX
    )
    outcomes = await asyncio.gather(*(calls.submit(item) for item in range(5)), return_exceptions=True)
    errors = outcomes[:3]
    assert outcomes[3:] == [6, 8]
    assert [type(error) for error in errors] == [BatchFailedError] * 3
    assert len({id(error) for error in errors}) == 3
    for error in errors:
        assert isinstance(error, BatchFailedError)
        assert error.__cause__ is failure
        assert str(error) == "the disk is full"


async def test_an_error_of_many_callers_stays_small() -> None:
    """The traceback of an error does not grow with the number of callers.

    One exception instance that is raised in every caller would add each caller's frames to its traceback.
    """

    async def fail(_items: list[int], _dues: Sequence[float]) -> Sequence[int | Exception]:
        raise OSError

    calls: Batcher[int, int] = Batcher(fail, batch_items_max=512, queue_items_max=512, seconds_max=SECONDS_MAX)
    errors = await asyncio.gather(*(calls.submit(item) for item in range(512)), return_exceptions=True)
    assert len(errors) == 512
    for error in (errors[0], errors[-1]):
        assert isinstance(error, BatchFailedError)
        assert len(traceback.extract_tb(error.__traceback__)) < 5
        assert error.__cause__ is not None
        assert len(traceback.extract_tb(error.__cause__.__traceback__)) < 5


@pytest.mark.parametrize("outcomes", [[], [1], [1, 2, 3]])
async def test_another_number_of_outcomes_than_items_is_a_failure(outcomes: list[int]) -> None:
    """If the work returns too few or too many outcomes, every caller of the batch gets an error.

    Otherwise a caller could get the outcome of another caller's item.
    """

    async def miscount(_items: list[int], _dues: Sequence[float]) -> Sequence[int | Exception]:
        return outcomes

    calls: Batcher[int, int] = Batcher(miscount, batch_items_max=3, queue_items_max=3, seconds_max=SECONDS_MAX)
    errors = await asyncio.gather(calls.submit(1), calls.submit(2), return_exceptions=True)
    assert [type(error) for error in errors] == [BatchFailedError] * 2
    assert all(isinstance(error, BatchFailedError) and error.__cause__ is not None for error in errors)


async def test_an_outcome_that_is_an_error_is_raised_in_its_caller_alone() -> None:
    """An outcome that is an exception is raised only in the caller of that item."""
    bad = KeyError("bad")

    async def work(items: list[int], _dues: Sequence[float]) -> Sequence[int | Exception]:
        return [bad if item == 2 else item for item in items]

    calls: Batcher[int, int] = Batcher(work, batch_items_max=3, queue_items_max=3, seconds_max=SECONDS_MAX)
    assert await asyncio.gather(*map(calls.submit, (1, 2, 3)), return_exceptions=True) == [1, bad, 3]


async def test_the_leader_ends_and_another_one_begins() -> None:
    """The leader task ends with its work, and the next call starts a new one."""
    work = Work()
    calls = batcher(work)
    idle = asyncio.all_tasks()
    for item in range(3):
        assert await calls.submit(item) == item * 2
        await calls.drain()
        assert asyncio.all_tasks() == idle
    assert work.batches == [[0], [1], [2]]


async def test_a_leader_that_met_a_failure_is_replaced() -> None:
    """A call after a failed batch is processed."""

    async def work(items: list[int], _dues: Sequence[float]) -> Sequence[int | Exception]:
        if items == [0]:
            raise OSError
        return items

    calls: Batcher[int, int] = Batcher(work, batch_items_max=3, queue_items_max=3, seconds_max=SECONDS_MAX)
    with pytest.raises(BatchFailedError):
        await calls.submit(0)
    assert await calls.submit(1) == 1


async def test_the_leader_does_not_inherit_its_first_callers_context() -> None:
    """The leader does not run in the context of its first caller.

    It works for all callers, so it must not inherit one caller's context variables, such as its log context.
    """
    request: ContextVar[str] = ContextVar("request")
    seen: list[str | None] = []

    async def look(items: list[int], _dues: Sequence[float]) -> Sequence[int | Exception]:
        seen.append(request.get(None))
        return items

    calls: Batcher[int, int] = Batcher(look, batch_items_max=3, queue_items_max=3, seconds_max=SECONDS_MAX)
    request.set("the first caller's")
    assert await calls.submit(1) == 1
    assert seen == [None]


async def test_drain_waits_for_all_submitted_items() -> None:
    """``drain`` returns after every submitted item has its outcome."""
    work = Work()
    calls = batcher(work)
    first = await held(work, calls)
    others = await begin(calls, *range(1, 8))
    finishing = asyncio.create_task(calls.drain())
    await asyncio.sleep(0)
    assert not finishing.done()
    work.gate.set()
    await finishing
    await asyncio.sleep(0)
    assert all(task.done() for task in (first, *others))
    assert [item for batch in work.batches for item in batch] == list(range(8))


async def test_drain_without_calls_returns_at_once() -> None:
    """``drain`` returns at once if there were no calls."""
    await batcher(Work()).drain()


async def test_a_cancelled_leader_leaves_no_caller_waiting() -> None:
    """If the leader is cancelled, the callers of its batch get an error and the callers behind it are
    cancelled.

    This happens when the event loop shuts down.
    """
    work = Work()
    calls = batcher(work, batch_items_max=1)
    before = asyncio.all_tasks()
    first = await held(work, calls)
    (behind,) = await begin(calls, 1)
    (leader,) = asyncio.all_tasks() - before - {first, behind}
    leader.cancel()
    await asyncio.wait([leader, first, behind], timeout=SECONDS_MAX)
    assert leader.cancelled()
    with pytest.raises(BatchFailedError):
        await first
    assert behind.cancelled()
    work.gate.set()
    assert await calls.submit(2) == 4
