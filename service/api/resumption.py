"""How a reader of events goes on after its last one, and learns that the log has lost it."""

from typing import Any

from service.event_log.store import RecordedEvent
from service.http.problems import another_event


def place_after(event: RecordedEvent, number: int) -> dict[str, Any]:
    """Return the parameters of the next page.

    Args:
        event: the last event of this page.
        number: its position or version, by which the list is ordered.
    """
    return {"after": number, **({} if event.report_id is None else {"last": event.report_id})}


def refuse_another_event(after: int, last: str, found: RecordedEvent | None) -> None:
    """Refuse to go on after an event that the log has lost.

    Args:
        after: the position or version of the event that the reader read last.
        last: the ``report_id`` of that event.
        found: the event that is there now, None if there is none.

    Raises:
        ProblemError: 410.
    """
    if found is None or found.report_id != last:
        raise another_event(after)
