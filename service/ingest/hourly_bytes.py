"""The volume of accepted bodies: measured, and limited, since rows of the log cannot be deleted."""

from collections import deque
from time import monotonic
from typing import Final

from service.batcher import OverloadedError

PERIOD_SECONDS: Final = 3_600.0
# The period slides in steps of this length.
STEP_SECONDS: Final = 60.0


class VolumeFullError(OverloadedError):
    """The bodies of the last hour reach the limit, so this one was not accepted."""


class HourlyBytes:
    """Counts the bytes of bodies.

    Args:
        hourly_bytes_max: the most that is accepted within an hour.

    Attributes:
        bytes_total: the bytes that were accepted since the start.
    """

    def __init__(self, hourly_bytes_max: int) -> None:
        self._hourly_bytes_max = hourly_bytes_max
        self.bytes_total = 0
        self._recent = 0
        # When each step ended, and its bytes.
        self._steps: deque[tuple[float, int]] = deque()
        self._step_bytes = 0
        self._step_ends = 0.0

    def accept(self, size: int) -> None:
        """Count a body.

        Raises:
            VolumeFullError: the bodies of the last hour would exceed the limit; nothing was counted.
        """
        now = monotonic()
        if now >= self._step_ends:
            self._begin_step(now)
        if self._recent + size > self._hourly_bytes_max:
            raise VolumeFullError("the bodies of the last hour reach ORDER_TRACKING_WEBHOOK_BYTES_HOURLY_MAX")
        self.bytes_total += size
        self._recent += size
        self._step_bytes += size

    def _begin_step(self, now: float) -> None:
        self._steps.append((self._step_ends, self._step_bytes))
        self._step_bytes, self._step_ends = 0, now + STEP_SECONDS
        while self._steps and self._steps[0][0] <= now - PERIOD_SECONDS:
            _, size = self._steps.popleft()
            self._recent -= size
