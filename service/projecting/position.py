"""How far each view has come, in this process or in another one, and the readers that wait for it."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from time import monotonic
from typing import Final, TypeAlias

from projections.view import View
from service.event_log.follow import AwaitedPosition

# How long a read waits for the position that it must include.
AFTER_POSITION_SECONDS_MAX: Final = 5.0


class ViewPosition:
    """What the readers of a view know of it.

    Args:
        view: the view.
        read_head: returns the highest position of the log.
        is_observed: whether this process only reads, so that others write the view.

    Attributes:
        is_outdated: whether the view has another definition than this release's. True until the first check.
        wake: set when the log has grown, or a reader waits: it makes the view's projector or observer look.
        reach: the position.
    """

    def __init__(self, view: View, read_head: Callable[[], Awaitable[int]], *, is_observed: bool) -> None:
        self.view = view
        self.read_head = read_head
        self.is_observed = is_observed
        self.is_outdated = True
        self.wake = asyncio.Event()
        self.reach = AwaitedPosition(self.wake.set)
        self._age_seconds = 0.0
        self._observed_at = monotonic()

    @property
    def seconds_since_observed(self) -> float:
        """The time since the view was observed."""
        return monotonic() - self._observed_at

    @property
    def age_seconds(self) -> float:
        """For how many seconds an observed view may have missed reports; infinite if that is unknown."""
        return self._age_seconds + self.seconds_since_observed

    def note_age(self, seconds: float, at: float) -> None:
        """Note the age of an observed view at a time (monotonic clock)."""
        self._age_seconds, self._observed_at = seconds, at

    def forget(self) -> None:
        """Believe no position until the next look, because commits may have been lost."""
        self.reach.forget()
        self.wake.set()


# By the names of the views.
ViewPositions: TypeAlias = Mapping[str, ViewPosition]
