"""What a read request asks for: its path and its query parameters, checked before anything is looked up."""

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar
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
)

from domain.statuses import Status
from domain.transitions import Verdict
from service.pages import POSITION_MAX, decode_cursor
from service.problems import ProblemError, bad_parameter
from service.quarantine import QuarantineState

PAGE_ROWS_DEFAULT: Final = 100
PAGE_ROWS_MAX: Final = 1_000
TEXT_CHARACTERS_MAX: Final = 128

_ORDER_PATH: Final = re.compile(r"(?:https?://[^/?#]*)?/orders/(?P<order_no>[^/?#]+)", re.IGNORECASE)
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
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


def decoded(escaped: str) -> str:
    """Return a path or a part of it, percent-decoded once, strictly.

    Raises:
        ProblemError: 400, an escape is broken, or what it spells is no text or has control characters.
    """
    if _BAD_ESCAPE.search(escaped):
        raise ProblemError(400, "Bad path", "a percent sign in the path is not followed by two hex digits")
    try:
        text = unquote_to_bytes(escaped).decode()
    except UnicodeDecodeError:
        raise ProblemError(400, "Bad path", "the path is not UTF-8") from None
    if _CONTROL.search(text):
        raise ProblemError(400, "Bad path", "the path has control characters")
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


Position = Annotated[int, Field(ge=0, le=POSITION_MAX)]
Limit = Annotated[int, Field(ge=1, le=PAGE_ROWS_MAX)]
Time = Annotated[datetime, BeforeValidator(_time)]
Cursor = Annotated[int, BeforeValidator(decode_cursor)]
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=TEXT_CHARACTERS_MAX), AfterValidator(_no_control)
]


class Query(BaseModel):
    """The parameters of every read. One that is not known is an error: ignored, it would be believed."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)

    after_position: Position | None = None


class PageQuery(Query):
    """A page of a list."""

    cursor: Cursor | None = None
    limit: Limit = PAGE_ROWS_DEFAULT


class OrderQuery(Query):
    """One order, now or as it was known then."""

    version: Annotated[int, Field(ge=1, le=POSITION_MAX)] | None = None
    as_of: Time | None = None


class OrdersQuery(PageQuery):
    """A list of orders."""

    status: Status | None = None
    cnote: Text | None = None


class EventsQuery(Query):
    """A page of events after a version or a position."""

    after: Position = 0
    limit: Limit = PAGE_ROWS_DEFAULT


class QuarantineQuery(PageQuery):
    """A page of the quarantine."""

    state: QuarantineState | None = None


class TransitionsQuery(PageQuery):
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
