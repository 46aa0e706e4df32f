"""Waiting for conditions: tests never wait for a fixed time."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

# Ten times the duration of the slowest condition on an idle machine. Only a real fault reaches it.
PATIENCE_SECONDS: Final = 60.0
POLL_SECONDS: Final = 0.02

Value = TypeVar("Value")


def _fail(describe: Callable[[], object] | None) -> None:
    detail = "" if describe is None else f": {describe()}"
    raise AssertionError(f"the condition was not met within {PATIENCE_SECONDS:.0f} s{detail}")


def until(condition: Callable[[], Value], describe: Callable[[], object] | None = None) -> Value:
    """Poll a condition until it is truthy, and return its value.

    Args:
        condition: called every POLL_SECONDS; may assert that waiting still makes sense.
        describe: returns the detail of the failure if the condition is not met within PATIENCE_SECONDS.
    """
    due = time.monotonic() + PATIENCE_SECONDS
    while not (value := condition()):
        if time.monotonic() > due:
            _fail(describe)
        time.sleep(POLL_SECONDS)
    return value


def condition(is_met: Callable[[], Value]) -> Callable[[], Awaitable[Value]]:
    """Wrap a plain condition in a coroutine function, for ``until_async``."""

    async def coroutine() -> Value:
        return is_met()

    return coroutine


async def until_async(
    condition: Callable[[], Awaitable[Value]], describe: Callable[[], object] | None = None
) -> Value:
    """Poll a coroutine function until its result is truthy, and return the result, as ``until`` does."""
    due = time.monotonic() + PATIENCE_SECONDS
    while not (value := await condition()):
        if time.monotonic() > due:
            _fail(describe)
        await asyncio.sleep(POLL_SECONDS)
    return value
