"""A position with waiting readers: what a follower promises to those that wait for it."""

import asyncio

from projections.position import AwaitedPosition
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async


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
