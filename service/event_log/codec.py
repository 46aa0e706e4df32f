"""Events as bytes, in the format of the eventsourcing library: each side can read the other's events.

The common case is encoded and decoded here in a third of the library's time. Everything else, such as an event
of an earlier class version, is left to the library.
"""

from dataclasses import MISSING, fields
from datetime import UTC, datetime
from typing import Annotated, Any, Final, NotRequired, cast

import orjson
from eventsourcing.persistence import DatetimeAsISO, JSONTranscoder, Mapper, StoredEvent
from pydantic import WithJsonSchema
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from domain.order import Order
from domain.statuses import Status
from domain.transitions import Leg, Verdict

_TRANSCODER: Final = JSONTranscoder()
_TRANSCODER.register(DatetimeAsISO())
# The library's own encoder and decoder.
MAPPER: Final[Mapper[str]] = Mapper(_TRANSCODER)

# The topics that this release decodes. The library resolves a topic by importing the module that it names, and
# anyone who may append to the log may write any topic.
TOPICS: Final = frozenset({Order.StatusReported.TOPIC})
# Of an unknown topic in an error, which the views keep for each parked order.
TOPIC_CHARACTERS_SHOWN: Final = 100
_CLASS_VERSION: Final = getattr(Order.StatusReported, "class_version", 1)
_FIELDS: Final = frozenset(field.name for field in fields(Order.StatusReported))
# Members that a later release has added: events lack them if they have their default.
_ADDED: Final = frozenset(field.name for field in fields(Order.StatusReported) if field.default is not MISSING)
_REQUIRED: Final = _FIELDS - _ADDED
_STATE_FIELDS: Final = _REQUIRED - {"originator_id", "originator_version"}
# Times that may be null or absent; ``timestamp`` never is.
TIMES: Final = ("occurred_at", "previous_since", "imported_at", "reported_at")
# Members with another name outside the log: in a timeline, ``repeats`` is a count.
_SHOWN_NAMES: Final = {"repeats": "repeats_version"}
_UTC_OFFSET: Final = "+00:00"

UtcTime = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]


class StatusReported(TypedDict):
    """A report and its verdict, as they were recorded.

    ``timestamp`` is the time of arrival. ``recognised`` is the status that ``reported_status`` stands for.
    ``status``, ``status_version``, ``leg`` and ``cnote`` are the order's values after the report;
    ``previous_status`` and ``previous_since`` are its values before. ``repeats_version`` is the version of
    the timeline entry that the report repeats. ``body`` and ``remote`` are null for a key of the scope
    ``read``. Only some events have the members after ``reason``: ``token_name`` is the name of the sender's
    token, ``rejudges`` the version of the report that this event judges again, ``reported_at`` the time at
    which that report arrived, ``imported_at`` the time at which an operator imported the report, and
    ``traceparent`` the trace of the webhook's request.
    """

    timestamp: UtcTime
    report_id: str
    body: str | None
    reported_status: str
    reported_cnote: str | None
    occurred_at: UtcTime | None
    remote: str | None
    quarantine_id: int | None
    verdict: Verdict
    recognised: Status | None
    previous_status: Status | None
    previous_since: UtcTime | None
    status: Status | None
    status_version: int | None
    leg: Leg | None
    cnote: str | None
    skipped: list[Status]
    repeats_version: int | None
    reason: str | None
    token_name: NotRequired[str]
    rejudges: NotRequired[int]
    reported_at: NotRequired[UtcTime]
    imported_at: NotRequired[UtcTime]
    traceparent: NotRequired[str]


class UndecodableEventError(Exception):
    """The log holds an event that this release cannot read."""


def encode_event(event: Order.StatusReported) -> bytes:
    """Return the bytes that the library would store for an event."""
    state = vars(event).copy()
    del state["originator_id"], state["originator_version"]
    state["timestamp"] = _encode_time(event.timestamp)
    for name in TIMES:
        if state.get(name) is not None:
            state[name] = _encode_time(state[name])
    return orjson.dumps(state)


def _encode_time(time: datetime) -> dict[str, str]:
    return {"_type_": "datetime_iso", "_data_": time.isoformat()}


def decode_event(order_no: str, version: int, topic: str, state: bytes) -> Order.StatusReported:
    """Return a recorded event, in the form of the current class version.

    Raises:
        UndecodableEventError: this release cannot read the bytes, the topic, or the class version.
    """
    if topic not in TOPICS:
        raise UndecodableEventError(
            f"the topic {topic[:TOPIC_CHARACTERS_SHOWN]!r} is not one of an order's events"
        )
    try:
        values = orjson.loads(state)
        if values.keys() - _ADDED == _STATE_FIELDS:
            values["timestamp"] = datetime.fromisoformat(values["timestamp"]["_data_"])
            for name in TIMES:
                if values.get(name) is not None:
                    values[name] = datetime.fromisoformat(values[name]["_data_"])
            values["originator_id"] = order_no
            values["originator_version"] = version
            return Order.StatusReported.from_fields(values)
        return _decode_by_mapper(StoredEvent(order_no, version, topic, state), values)
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UndecodableEventError(f"{type(error).__name__}: {reason}") from error


def _decode_by_mapper(stored: StoredEvent, values: dict[str, Any]) -> Order.StatusReported:
    """Decode an event that may be of an earlier class version.

    The mapper would mistake an event of a later class version for a current one.
    """
    if values.get("class_version", 1) > _CLASS_VERSION:
        raise ValueError("it was written by a later release")
    event = MAPPER.to_domain_event(stored)
    if not isinstance(event, Order.StatusReported) or not vars(event).keys() >= _REQUIRED:
        raise TypeError("its fields are not those of an order's event")
    # A later release may have added members of which this one knows nothing.
    known = {name: value for name, value in vars(event).items() if name in _FIELDS}
    return event if len(known) == len(vars(event)) else Order.StatusReported.from_fields(known)


def read_fields(state: bytes) -> dict[str, Any] | None:
    """Return a recorded event's fields as the API shows them, None if the bytes are not a JSON object.

    Times are text and end in ``Z``.
    """
    try:
        values = orjson.loads(state)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(values, dict):
        return None
    return {_SHOWN_NAMES.get(name) or name: _shown(value) for name, value in values.items()}


def read_status_reported(topic: str, state: bytes, *, with_bodies: bool) -> StatusReported | None:
    """Return a recorded event as the API shows it, None if this release does not know such an event.

    Args:
        topic: the event's topic.
        state: its bytes.
        with_bodies: whether the reader may see the body and the sender's address.
    """
    values = read_fields(state)
    if topic not in TOPICS or values is None:
        return None
    if not values.keys() >= StatusReported.__required_keys__:
        return None
    if not with_bodies:
        values["body"] = values["remote"] = None
    return cast("StatusReported", values)


def _shown(value: Any) -> Any:
    """Return a field's value, a time as its text in UTC."""
    if not isinstance(value, dict) or value.keys() != {"_type_", "_data_"}:
        return value
    text = value["_data_"]
    if value["_type_"] != "datetime_iso" or not isinstance(text, str):
        return text
    try:
        time = text if text.endswith(_UTC_OFFSET) else datetime.fromisoformat(text).astimezone(UTC).isoformat()
    except (ValueError, OverflowError):
        return text
    return time.removesuffix(_UTC_OFFSET) + "Z"
