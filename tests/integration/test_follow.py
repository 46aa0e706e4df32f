"""Following the log: what the memory gives away, and what a follower promises to those that wait for it."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from domain.logged import FailedEvent, LoggedEvent
from domain.order import NEW_ORDER, Order, decide
from projections.postgres import Connection
from service.database.connections import DedicatedConnection, connected
from service.database.operations import Actor
from service.event_log import store
from service.event_log.codec import MAPPER
from service.event_log.follow import (
    MEMORY_CHARACTERS_MAX,
    MEMORY_EVENTS_MAX,
    AwaitedPosition,
    Log,
    Memory,
    decode_logged,
)
from service.event_log.store import RecordedEvent
from service.maintenance.erasure import erase_order
from tests.support.examples import RECEIVED_AT, SENT, SENT_EVENT, history
from tests.support.recording import dedicated_connection
from tests.support.reports import report
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async


class DatabaseAskedError(Exception):
    """A read was not served from memory."""


async def no_database() -> Connection:
    raise DatabaseAskedError


@pytest.fixture
async def log(dsn: str) -> AsyncIterator[Log]:
    """Return a log whose events can only come from memory."""
    async with dedicated_connection(dsn) as to_hear:
        yield await begin(Log(DedicatedConnection(no_database), Memory(to_hear)))


async def begin(log: Log) -> Log:
    """Let a memory hear of the erasures for the first time."""
    await log.memory.hear_in_time(at_once=True)
    return log


async def read(log: Log, after: int, limit: int) -> Sequence[LoggedEvent]:
    await log.memory.hear_in_time(at_once=True)
    return await log.read_log(after, limit)


EVENTS = history(*["Packed", "Sent"] * 5)


def logged(events: Sequence[Order.StatusReported], first_position: int) -> list[LoggedEvent]:
    return [(first_position + i, event) for i, event in enumerate(events)]


async def test_recent_commits_are_read_from_memory(log: Log) -> None:
    """Events of consecutive commits are served from memory, from any position among them and up to
    the limit.
    """
    log.memory.remember(EVENTS[:3], [7, 8, 9])
    log.memory.remember(EVENTS[3:5], [10, 11])
    for after in range(6, 11):
        assert await read(log, after, 100) == logged(EVENTS[after - 6 : 5], after + 1)
        assert await read(log, after, 1) == logged(EVENTS[after - 6 : after - 5], after + 1)


@pytest.mark.parametrize("after", [0, 5, 11, 12, 1_000])
async def test_events_outside_the_memory_are_read_from_the_database(log: Log, after: int) -> None:
    """A read from before the memory or from its end goes to the database.

    Earlier positions may hold other events, and other processes may have written later ones.
    """
    log.memory.remember(EVENTS[:5], [7, 8, 9, 10, 11])
    with pytest.raises(DatabaseAskedError):
        await read(log, after, 100)


async def test_a_reader_with_an_empty_memory_reads_from_the_database(log: Log) -> None:
    """A reader with an empty memory reads from the database at every position."""
    for after in (-1, 0, 1):
        with pytest.raises(DatabaseAskedError):
            await read(log, after, 100)


@pytest.mark.parametrize(
    ("batches", "kept_from"),
    [
        ([[7, 8], [10, 11]], 10),
        ([[7, 9, 10]], 9),
        ([[7, 8, 11], [12]], 11),
        ([[7, 8], [8, 9]], 8),
        ([[7, 8], [3, 4]], 3),
        ([[7, 9, 11]], 11),
    ],
    ids=[
        "a gap between batches",
        "a gap within a batch",
        "and a batch that goes on",
        "a position twice",
        "an earlier batch",
        "two gaps",
    ],
)
async def test_events_before_a_gap_are_dropped_from_memory(
    log: Log, batches: list[list[int]], kept_from: int
) -> None:
    """After a gap in the positions, only the events that follow the gap are served from memory.

    Another process may have written an event in the gap.
    """
    for positions in batches:
        log.memory.remember(EVENTS[: len(positions)], positions)
    served = await read(log, kept_from - 1, 100)
    assert [position for position, _ in served] == list(range(kept_from, batches[-1][-1] + 1))
    for after in range(kept_from - 1):
        with pytest.raises(DatabaseAskedError):
            await read(log, after, 100)


async def test_memory_never_leaves_anything_out(dsn: str) -> None:
    """Events from memory are always consecutive and begin right after ``after``."""

    async def try_one(steps: list[list[int]], after: int) -> None:
        log = await begin(Log(DedicatedConnection(no_database), Memory(to_hear)))
        position = 0
        for batch in steps:
            positions = []
            for step in batch:
                position += step
                positions.append(position)
            log.memory.remember([SENT_EVENT] * len(batch), positions)
        try:
            served = await read(log, after, 100)
        except DatabaseAskedError:
            return
        assert [position for position, _ in served] == list(range(after + 1, position + 1))
        assert served

    loop = asyncio.get_running_loop()

    @settings(deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=6),
        st.integers(0, 40),
    )
    def experiment(steps: list[list[int]], after: int) -> None:
        asyncio.run_coroutine_threadsafe(try_one(steps, after), loop).result()

    async with dedicated_connection(dsn) as to_hear:
        await asyncio.to_thread(experiment)


async def test_memory_is_bounded_by_events(log: Log) -> None:
    """Beyond MEMORY_EVENTS_MAX the older half of the events is dropped and the newer half remains."""
    total = 2 * MEMORY_EVENTS_MAX
    for first in range(1, total, 512):
        log.memory.remember([SENT_EVENT] * 512, range(first, first + 512))
    with pytest.raises(DatabaseAskedError):
        await read(log, total - MEMORY_EVENTS_MAX - 1, 1)
    assert len(await read(log, total - MEMORY_EVENTS_MAX // 2, total)) == MEMORY_EVENTS_MAX // 2


async def test_memory_is_bounded_by_bytes(log: Log) -> None:
    """Whenever the bodies exceed MEMORY_CHARACTERS_MAX, the older half of the events is dropped."""
    heavy = decide(NEW_ORDER, SENT._replace(body="x" * (MEMORY_CHARACTERS_MAX // 4)))
    for position in range(1, 21):
        log.memory.remember([heavy], [position])
        kept = 0
        while kept < position:
            try:
                await read(log, position - kept - 1, 1)
            except DatabaseAskedError:
                break
            kept += 1
        assert 1 <= kept <= 4


async def test_a_batch_of_before_an_erasure_is_not_shared(
    dsn: str, owner_dsn: str, connection: Connection
) -> None:
    """What one view has read from the log, another one gets again, but not after an erasure."""
    await store.append(connection, [Order.new("KOM1").report(report("KOM1"))])
    async with dedicated_connection(dsn) as held, connected(owner_dsn) as owner:
        log = await begin(Log(held))
        ((_, before),) = await read(log, 0, 10)
        assert await read(log, 0, 10) == [(1, before)]
        await erase_order(owner, "KOM1", "asked for", Actor("cli", "tests"))
        ((_, after),) = await read(log, 0, 10)
        assert isinstance(before, Order.StatusReported)
        assert isinstance(after, Order.StatusReported)
        assert (bool(before.body), after.body) == (True, "")


# The log as a follower receives it


def recorded(position: int, version: int, topic: str, state: bytes) -> RecordedEvent:
    return RecordedEvent(position, SENT.order_no, version, topic, state, RECEIVED_AT)


def test_decode_logged() -> None:
    """A decodable event is returned with its position."""
    stored = MAPPER.to_stored_event(SENT_EVENT)
    assert decode_logged(recorded(7, 1, stored.topic, stored.state)) == (7, SENT_EVENT)


@pytest.mark.parametrize(
    ("topic", "state"), [("order.status_reported", b"state4"), ("order.unknown", b"{}"), ("", b"")]
)
def test_decode_an_undecodable_event(topic: str, state: bytes) -> None:
    """An undecodable event is returned with its position, its order, its version and the reason, without an
    exception.
    """
    position, found = decode_logged(recorded(7, 3, topic, state))
    assert isinstance(found, FailedEvent)
    assert (position, found.originator_id, found.originator_version) == (7, SENT.order_no, 3)
    assert found.reason


# A position with waiting readers


async def test_readers_wait_until_the_position_is_reached() -> None:
    """Each reader is woken by the move to its position or beyond, and by no lower one."""
    reach = AwaitedPosition(lambda: None)
    assert await reach.wait_for(0, 0)
    first, second = (asyncio.create_task(reach.wait_for(at, PATIENCE_SECONDS)) for at in (1, 3))
    await until_async(condition(lambda: reach.has_readers))
    reach.move(2)
    assert await first
    assert not second.done()
    reach.move(3)
    assert await second
    assert not reach.has_readers


async def test_a_reader_gives_up_in_time() -> None:
    """A position that is not reached is False, also if the follower went back or forgot where it was."""
    reach = AwaitedPosition(lambda: None)
    reach.move(5)
    reach.move(3)
    assert not await reach.wait_for(4, 0.01)
    reach.forget()
    assert not await reach.wait_for(3, 0.01)
    assert not reach.has_readers
    reach.move(3)
    assert await reach.wait_for(3, 0)


async def test_a_waiting_reader_has_the_follower_check() -> None:
    """A move that no notification announced is found, since the follower checks as long as a reader waits."""
    moves = iter((1, 2, 3))
    reach = AwaitedPosition(lambda: reach.move(next(moves)))
    assert await reach.wait_for(3, PATIENCE_SECONDS)
    assert next(moves, None) is None
