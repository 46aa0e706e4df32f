"""The latest responses of an endpoint, which the subscription shows: plain data, without I/O."""

from collections import deque
from collections.abc import Collection
from datetime import datetime
from time import monotonic
from typing import Final

from service.features.subscriptions.sending import Attempt
from service.features.subscriptions.subscription import Response
from service.features.subscriptions.window import Message
from service.http.times import to_rfc3339

RESPONSES_MAX: Final = 20
# The pause between two saves of them.
SAVE_PAUSE_SECONDS: Final = 1.0


class LatestResponses:
    """The latest responses, the newest one first.

    Attributes:
        is_changed: whether there are responses that are not saved.
    """

    def __init__(self) -> None:
        self.is_changed = False
        self._attempts: deque[tuple[datetime, str, int, int, Attempt]] = deque(maxlen=RESPONSES_MAX)
        self._save_at = 0.0

    def add(self, at: datetime, message: Message, number: int, attempt: Attempt) -> None:
        """Add the response to the ``number``-th attempt at a message."""
        self._attempts.appendleft((at, message.order_no, message.version, number, attempt))
        self.is_changed = True

    def erase(self, orders: Collection[str] | None) -> None:
        """Drop what the endpoint said about some orders, or about all if None: it may quote an erased text."""
        for index, (at, order_no, version, number, attempt) in enumerate(self._attempts):
            if orders is None or order_no in orders:
                self._attempts[index] = at, order_no, version, number, attempt._replace(error=None)

    def take(self, *, is_last: bool) -> list[Response] | None:
        """Return the responses to save, or None if they are saved or were so a moment ago.

        Args:
            is_last: whether to save them now, because no other save follows soon.
        """
        if not self.is_changed or not (is_last or monotonic() >= self._save_at):
            return None
        self.is_changed = False
        self._save_at = monotonic() + SAVE_PAUSE_SECONDS
        return [_to_response(*one) for one in self._attempts]

    def put_back(self) -> None:
        """Mark the responses as unsaved again, because their save failed."""
        self.is_changed, self._save_at = True, 0.0


def _to_response(at: datetime, order_no: str, version: int, number: int, attempt: Attempt) -> Response:
    return {
        "at": to_rfc3339(at),
        "order_no": order_no,
        "version": version,
        "attempt": number,
        "status": attempt.status,
        "ms": round(attempt.seconds * 1_000),
        "error": attempt.error,
    }
