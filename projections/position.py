"""How far a follower of the log has come, and the readers that wait for it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

# How often a waiting reader has the follower check its position, in case no notification arrives.
CHECK_SECONDS: Final = 0.02
# How long a read waits for the position that it must include.
AFTER_POSITION_SECONDS_MAX: Final = 5.0


class AwaitedPosition:
    """A follower's position, for which readers wait.

    The follower calls ``move`` once the work up to a position is committed, and ``forget`` when commits may
    have been lost. It is only a hint for the right moment to read: what a reader then gets is for the database
    to say.

    Args:
        check: called every CHECK_SECONDS while a reader waits. It makes the follower check its position, which
            another process may have moved.

    Attributes:
        position: the position, 0 until the first move.
    """

    def __init__(self, check: Callable[[], object]) -> None:
        self.position = 0
        self._check = check
        self._readers = 0
        # Set by the next move, which replaces it.
        self._moved = asyncio.Event()

    @property
    def has_readers(self) -> bool:
        """Whether a reader waits."""
        return self._readers > 0

    def move(self, position: int) -> None:
        """Set the position, which may also be lower, and wake the readers."""
        if position != self.position:
            self.position = position
            self._moved.set()
            self._moved = asyncio.Event()

    def forget(self) -> None:
        """Believe no position until the next move. The readers keep waiting."""
        self.position = 0

    async def wait_for(self, position: int, seconds_max: float) -> bool:
        """Wait until the position is reached, and return True; return False after ``seconds_max``."""
        now = asyncio.get_running_loop().time
        deadline = now() + seconds_max
        self._readers += 1
        try:
            while self.position < position:
                if now() >= deadline:
                    return False
                moved = self._moved
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(min(deadline, now() + CHECK_SECONDS)):
                        await moved.wait()
                if not moved.is_set():
                    self._check()
        finally:
            self._readers -= 1
        return True
