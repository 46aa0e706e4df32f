"""What a read request asks for: its path and its query parameters, checked before anything is looked up."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal, TypeVar
from urllib.parse import quote, unquote_to_bytes

from aiohttp import web
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from domain.statuses import Status
from domain.transitions import Verdict
from service.http.pagination import POSITION_MAX, decode_cursor
from service.http.problems import Kind, ProblemError, bad_parameter
from service.ingest.quarantine import QuarantineState

PAGE_ROWS_DEFAULT: Final = 100
PAGE_ROWS_MAX: Final = 1_000
TEXT_CHARACTERS_MAX: Final = 128
# A hundred years: before now there are still dates.
DURATION_MAX: Final = timedelta(days=36_500)

_ORDER_PATH: Final = re.compile(r"(?:https?://[^/?#]*)?/(?:orders|track)/(?P<order_no>[^/?#]+)", re.IGNORECASE)
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Weeks to seconds; months and years have no fixed length. Nine digits are more than anybody waits.
_DURATION: Final = re.compile(
    r"P(?:(\d{1,5})W)?(?:(\d{1,5})D)?(?:T(?=\d)(?:(\d{1,6})H)?(?:(\d{1,7})M)?(?:(\d{1,9})S)?)?", re.ASCII
)
# Eighteen digits are a bigint, whatever they are.
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def order_no_of(request: web.Request) -> str:
    """Return the order number of the path, percent-decoded once, strictly.

    Raises:
        ProblemError: 400, an escape is broken, or what it spells is no text or has control characters.
    """
    # The framework hands a broken escape on as it stands, so the path is read as it was sent.
    found = _ORDER_PATH.match(request.raw_path)
    escaped = found["order_no"] if found is not None else ""
    if "%" not in escaped and escaped.isascii() and escaped.isprintable():
        return escaped
    return decoded(escaped)


def number_of(text: str) -> int:
    """Return the number that a part of a path is, 0 where it is none that there could be."""
    return int(text) if _NUMBER.fullmatch(text) else 0


def decoded(escaped: str) -> str:
    """Return a path or a part of it, percent-decoded once, strictly.

    Raises:
        ProblemError: 400, an escape is broken, or what it spells is no text or has control characters.
    """
    if _BAD_ESCAPE.search(escaped):
        raise ProblemError(Kind.BAD_PATH, "a percent sign in the path is not followed by two hex digits")
    try:
        text = unquote_to_bytes(escaped).decode()
    except UnicodeDecodeError:
        raise ProblemError(Kind.BAD_PATH, "the path is not UTF-8") from None
    if _CONTROL.search(text):
        raise ProblemError(Kind.BAD_PATH, "the path has control characters")
    return text


def _no_control(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("it must not have control characters")
    return value


def _time(value: Any) -> Any:
    # A plus sign that nobody escaped arrives as a space.
    text = str(value).replace(" ", "+") if "T" in str(value) else str(value)
    try:
        # Python 3.11 reads no further than a NUL.
        time = datetime.fromisoformat(_no_control(text))
    except ValueError:
        raise ValueError("it must be a time by RFC 3339, such as 2026-01-31T08:30:00Z") from None
    if time.tzinfo is None:
        raise ValueError("it must have an offset, such as Z or +07:00")
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("it is out of range") from None


def _duration(value: Any) -> Any:
    found = _DURATION.fullmatch(str(value))
    if found is None or not any(found.groups()):
        raise ValueError("it must be a duration by ISO 8601, such as P3D or PT36H")
    weeks, days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    duration = timedelta(weeks=weeks, days=days, hours=hours, minutes=minutes, seconds=seconds)
    if duration > DURATION_MAX:
        raise ValueError(f"it must be {DURATION_MAX.days} days at most")
    return duration


def _text_schema(**more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", **more})


Position = Annotated[int, Field(ge=0, le=POSITION_MAX)]
Limit = Annotated[int, Field(ge=1, le=PAGE_ROWS_MAX)]
Time = Annotated[datetime, BeforeValidator(_time), _text_schema(format="date-time")]
Duration = Annotated[timedelta, BeforeValidator(_duration), _text_schema(format="duration")]
Cursor = Annotated[int, BeforeValidator(decode_cursor), _text_schema()]
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=TEXT_CHARACTERS_MAX), AfterValidator(_no_control)
]


class Query(BaseModel):
    """The parameters of a request. One that is not known is an error: ignored, it would be believed."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


class ViewQuery(Query):
    """Asks a view."""

    after_position: Position | None = Field(
        default=None, description="wait until the view has this position of the log"
    )


class PageQuery(Query):
    """A page of a list."""

    cursor: Cursor | None = Field(default=None, description="from the `next` of the page before")
    limit: Limit = PAGE_ROWS_DEFAULT


class TableQuery(ViewQuery, PageQuery):
    """A page of a view's list, as JSON or as a table."""

    format: Literal["json", "csv"] | None = Field(default=None, description="stronger than the Accept header")


class OrderQuery(ViewQuery):
    """One order, now or as it was known then."""

    version: Annotated[int, Field(ge=1, le=POSITION_MAX)] | None = None
    as_of: Time | None = None


class OrdersQuery(TableQuery):
    """A list of orders."""

    status: Status | None = None
    cnote: Text | None = Field(default=None, description="an airway bill that was ever reported of the order")
    verdict: Verdict | None = Field(default=None, description="orders with a report of this verdict")
    updated_after: Time | None = Field(default=None, description="last reported at or after this time")
    updated_before: Time | None = Field(default=None, description="last reported before this time")
    unmoved_for: Duration | None = Field(
        default=None, description="not settled, and without any report for so long"
    )


class EventsQuery(Query):
    """A page of events after a version or a position."""

    after: Position = 0
    limit: Limit = PAGE_ROWS_DEFAULT


class StreamQuery(Query):
    """Events from a position on."""

    after: Position | None = Field(
        default=None, description="from this position on; if left out, and without Last-Event-ID, from now on"
    )


class LogStreamQuery(StreamQuery):
    """The same of the whole log, whose events may be left out."""

    brief: bool = Field(
        default=False, description="no events, only the position that the log has come to, each time it grows"
    )


class StatisticsQuery(ViewQuery):
    """The statistics, by day for as many days."""

    days: Annotated[int, Field(ge=1, le=366)] = 30


class QuarantineQuery(PageQuery):
    """A page of the quarantine."""

    state: QuarantineState | None = None


class TransitionsQuery(TableQuery):
    """A page of the audit."""

    verdict: Verdict | None = None
    order_no: Text | None = None
    from_: Status | None = Field(default=None, alias="from")
    to: Status | None = None
    since: Time | None = None
    until: Time | None = None


AnyQuery = TypeVar("AnyQuery", bound=Query)


def read_query(model: type[AnyQuery], request: web.Request) -> AnyQuery:
    """Read the query parameters of a request.

    Raises:
        ProblemError: 400, naming the parameter at fault.
    """
    given: dict[str, str] = {}
    for name, value in request.query.items():
        if name in given:
            raise bad_parameter(name, "it is given twice")
        given[name] = value
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        detail = "there is no such parameter" if first["type"] == "extra_forbidden" else first["msg"]
        raise bad_parameter(name, detail.removeprefix("Value error, ")) from None


def path_of(order_no: str, *rest: str) -> str:
    """Return the path of an order, percent-encoded."""
    return "/".join(("/orders", quote(order_no, safe=""), *rest))
