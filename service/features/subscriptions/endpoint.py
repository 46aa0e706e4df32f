"""Whether the endpoint of a subscription is up: plain data, without I/O."""

from datetime import datetime, timedelta
from typing import Final

from service.features.subscriptions.sending import Attempt

# After so many failures in a row, of so many orders, the endpoint is down: no further event is read, so that
# the held orders stay few. One request from time to time, a probe, finds out whether it is up again.
DOWN_FAILURES: Final = 32
DOWN_ORDERS: Final = 16
PROBE_SECONDS_MIN: Final = 5.0
PROBE_SECONDS_MAX: Final = 60.0
# With these statuses an endpoint refuses one event. It is up.
REFUSALS: Final = frozenset({400, 409, 413, 422})


class Endpoint:
    """An endpoint, judged by the attempts since its subscription was loaded: down after many failures."""

    def __init__(self) -> None:
        self._failures = 0
        self._failing: set[str] = set()
        self._failing_since: datetime | None = None
        self._probe_at: datetime | None = None
        self._probe_seconds = PROBE_SECONDS_MIN

    @property
    def is_down(self) -> bool:
        """Whether it gets probes only."""
        return self._probe_at is not None

    @property
    def down_since(self) -> datetime | None:
        """Since when all attempts have failed, None while it is up."""
        return self._failing_since if self.is_down else None

    def succeed(self) -> None:
        """Record a delivered event: the endpoint is up."""
        self._failures, self._failing = 0, set()
        self._failing_since = self._probe_at = None

    def fail(self, order_no: str, attempt: Attempt, now: datetime) -> bool:
        """Record a failed attempt. Return whether it is the one that takes the endpoint down."""
        if attempt.status in REFUSALS:
            return False
        self._failures += 1
        self._failing.add(order_no)
        self._failing_since = self._failing_since or now
        is_news = not self.is_down and self._failures >= DOWN_FAILURES and len(self._failing) >= DOWN_ORDERS
        if is_news:
            self._probe_seconds = PROBE_SECONDS_MIN
            self._probe_at = now + timedelta(seconds=PROBE_SECONDS_MIN)
        if self._probe_at is not None and attempt.retry_after_seconds:
            self._probe_at = max(self._probe_at, now + timedelta(seconds=attempt.retry_after_seconds))
        return is_news

    def take_probe(self, now: datetime) -> bool:
        """Return whether it is time for a probe. If so, the next one waits twice as long."""
        is_due = self._probe_at is not None and now >= self._probe_at
        if not is_due:
            return False
        self._probe_seconds = min(PROBE_SECONDS_MAX, 2 * self._probe_seconds)
        self._probe_at = now + timedelta(seconds=self._probe_seconds)
        return True
