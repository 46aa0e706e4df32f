"""The pace of deliveries: while many reports arrive, the process records them first."""

import asyncio
from time import monotonic
from typing import Final

# A commit of so many reports shows that reports had to wait for it.
BUSY_REPORTS: Final = 16
# For how long such a commit counts.
BUSY_SECONDS: Final = 0.2
# All requests of a busy process. Each costs about as much processor time as a webhook.
BUSY_REQUESTS_PER_SECOND: Final = 100


class Pace:
    """Delays requests while the process is busy with reports."""

    def __init__(self) -> None:
        self._busy_until = 0.0
        self._due = 0.0

    def observe_commit(self, reports: int) -> None:
        """Learn how many reports shared a commit."""
        if reports >= BUSY_REPORTS:
            self._busy_until = monotonic() + BUSY_SECONDS

    def delay_seconds(self) -> float:
        """Return how long to wait before asking again; 0 if a request may begin now."""
        now = monotonic()
        if now >= self._busy_until:
            return 0.0
        if now < self._due:
            return self._due - now
        self._due = now + 1 / BUSY_REQUESTS_PER_SECOND
        return 0.0

    async def take_turn(self) -> None:
        """Wait until a request may begin."""
        delay = self.delay_seconds()
        while delay > 0:
            await asyncio.sleep(delay)
            delay = self.delay_seconds()
