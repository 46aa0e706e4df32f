"""How a reader of events goes on after its last one, and learns that the log has lost it."""

from typing import Any

from service.event_log.store import RecordedEvent
from service.http.problems import another_event


def place_after(log_id: str, last: str | None, **place: int) -> dict[str, Any]:
    """Return the parameters of the next page.

    Args:
        log_id: the id of the log.
        last: the ``report_id`` of the last event of this page, None if unknown.
        place: the parameter by which the list is paged, and the event's position or version.
    """
    return {**place, **({} if last is None else {"last": last}), "log": log_id}


def refuse_another_event(last: str, found: RecordedEvent | None, **place: int) -> None:
    """Refuse to go on after an event that the log has lost.

    Args:
        last: the ``report_id`` of the event that the reader read last.
        found: the event that is there now, None if there is none.
        place: the ``position`` or ``version`` of the event that the reader read last.

    Raises:
        ProblemError: 410.
    """
    if found is None or found.report_id != last:
        raise another_event(**place)
