"""Paths and query parameters, checked before anything is read. Each query model is beside its endpoint."""

import re
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import quote, unquote_to_bytes

from aiohttp import web
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    WithJsonSchema,
)

from domain.statuses import STATUSES, Status
from domain.transitions import VERDICTS, Verdict
from projections.windows import POSITION_MAX
from service.http.pagination import CURSOR_PATTERN, decode_any_cursor, decode_cursor
from service.http.problems import ProblemError, ProblemType, bad_parameter
from service.http.request_ids import route_pattern

# The parameter that chooses the media type of a list that has several; ``service.http.endpoints`` reads it.
FORMAT: Final = "format"
PAGE_ROWS_DEFAULT: Final = 100
PAGE_ROWS_MAX: Final = 1_000
TEXT_CHARACTERS_MAX: Final = 128
# A hundred years: that long before now is still a valid time.
DURATION_MAX: Final = timedelta(days=36_500)

ORDER_NO: Final = "{order_no}"
_BAD_ESCAPE: Final = re.compile(r"%(?![0-9A-Fa-f]{2})")
# Weeks to seconds, since months and years have no fixed length. The digits cover DURATION_MAX in every unit.
_DURATION: Final = re.compile(
    r"P(?:(\d{1,5})W)?(?:(\d{1,5})D)?(?:T(?=\d)(?:(\d{1,6})H)?(?:(\d{1,7})M)?(?:(\d{1,9})S)?)?", re.ASCII
)
# Any eighteen digits fit a bigint.
_NUMBER: Final = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def parse_order_no(request: web.Request) -> str:
    """Return the order number in the path, percent-decoded once, strictly.

    Raises:
        ProblemError: 400, an escape is broken, or the text is not UTF-8 or has control characters.
    """
    # aiohttp leaves a broken escape unchanged, so the path is read as it was sent.
    match = _order_path(route_pattern(request)).match(request.raw_path)
    return decode_path(match[1] if match is not None else "")


@cache
def _order_path(pattern: str) -> re.Pattern[str]:
    """Return the expression for the order number in the raw paths of a route."""
    parts = (
        "([^/?#]+)" if part == ORDER_NO else "[^/?#]+" if part.startswith("{") else re.escape(part)
        for part in re.split(r"(\{\w+\})", pattern)
    )
    return re.compile(rf"(?:https?://[^/?#]*)?{''.join(parts)}", re.IGNORECASE)


def parse_number(segment: str) -> int:
    """Parse a positive integer path segment; return 0 if it is not one."""
    return int(segment) if _NUMBER.fullmatch(segment) else 0


def decode_path(escaped: str) -> str:
    """Return a path or a segment, percent-decoded once, strictly.

    Raises:
        ProblemError: 400, an escape is broken, or the text is not UTF-8 or has control characters.
    """
    # Most paths have nothing to decode. All printable ASCII characters are valid.
    if "%" not in escaped and escaped.isascii() and escaped.isprintable():
        return escaped
    if _BAD_ESCAPE.search(escaped):
        raise ProblemError(ProblemType.BAD_PATH, "every percent sign in the path must begin an escape like %20")
    try:
        text = unquote_to_bytes(escaped).decode()
    except UnicodeDecodeError:
        raise ProblemError(ProblemType.BAD_PATH, "the path must be percent-encoded UTF-8") from None
    if _CONTROL.search(text):
        raise ProblemError(ProblemType.BAD_PATH, "the path must not have control characters")
    return text


def order_path(order_no: str, *segments: str) -> str:
    """Return the path of an order, percent-encoded."""
    return "/".join(("/orders", quote(order_no, safe=""), *segments))


def _refuse_control(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("it must not have control characters")
    return value


def _parse_time(value: Any) -> Any:
    # An unescaped plus sign arrives as a space.
    text = str(value).replace(" ", "+") if "T" in str(value) else str(value)
    try:
        # Python 3.11 stops reading at a NUL character.
        time = datetime.fromisoformat(_refuse_control(text))
    except ValueError:
        raise ValueError("it must be an RFC 3339 time, such as 2026-01-31T08:30:00Z") from None
    if time.tzinfo is None:
        raise ValueError("it must have an offset, such as Z or +07:00")
    try:
        return time.astimezone(UTC)
    except OverflowError:
        raise ValueError("it is out of range") from None


def _parse_duration(value: Any) -> Any:
    match = _DURATION.fullmatch(str(value))
    if match is None or not any(match.groups()):
        raise ValueError("it must be an ISO 8601 duration, such as P3D or PT36H")
    weeks, days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    duration = timedelta(weeks=weeks, days=days, hours=hours, minutes=minutes, seconds=seconds)
    if duration > DURATION_MAX:
        raise ValueError(f"it must be at most {DURATION_MAX.days} days")
    return duration


def _text_schema(**more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", **more})


Position = Annotated[int, Field(ge=0, le=POSITION_MAX)]
Limit = Annotated[int, Field(ge=1, le=PAGE_ROWS_MAX)]
Version = Annotated[int, Field(ge=1, le=POSITION_MAX)]
Time = Annotated[datetime, BeforeValidator(_parse_time), _text_schema(format="date-time")]
Duration = Annotated[
    timedelta,
    BeforeValidator(_parse_duration),
    PlainSerializer(lambda duration: f"PT{duration.total_seconds():.0f}S"),
    _text_schema(format="duration"),
]
Cursor = Annotated[int, BeforeValidator(decode_cursor), _text_schema(pattern=CURSOR_PATTERN)]
# The cursor of a list with several orders: each of them has its own kind of key.
SortedCursor = Annotated[
    int | tuple[int, int], BeforeValidator(decode_any_cursor), _text_schema(pattern=CURSOR_PATTERN)
]


def _one_or_more(words: tuple[str, ...]) -> tuple[BeforeValidator, PlainSerializer, WithJsonSchema]:
    """Return the annotations of a parameter with one or several words, separated by commas."""
    word = f"({'|'.join(words)})"
    return (
        BeforeValidator(lambda value: [*dict.fromkeys(str(value).split(","))]),
        PlainSerializer(",".join),
        _text_schema(pattern=f"^{word}(,{word})*$"),
    )


Statuses = Annotated[tuple[Status, ...], *_one_or_more(STATUSES)]
Verdicts = Annotated[tuple[Verdict, ...], *_one_or_more(VERDICTS)]
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=TEXT_CHARACTERS_MAX), AfterValidator(_refuse_control)
]
LastReport = Annotated[
    Text | None,
    Field(
        description="the `report_id` of the last event that you read, from which you go on; 410 if the log has "
        "another event there by now"
    ),
]

LogId = Annotated[
    Text | None,
    Field(description="the id of the log that your position belongs to; 410 if this is another log"),
]


class Query(BaseModel):
    """The parameters of a request. An unknown parameter is an error: a filter must not be ignored silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=False)


class ViewQuery(Query):
    """A read of a view."""

    after_position: Position | None = Field(
        default=None, description="wait until the view has reached this position of the log"
    )


class PageQuery(Query):
    """A page of a list."""

    cursor: Cursor | None = Field(default=None, description="from the `next` of the previous page")
    limit: Limit = Field(default=PAGE_ROWS_DEFAULT, description="the maximum number of rows of the page")


class TableQuery(ViewQuery, PageQuery):
    """A page of a view's list."""


AnyQuery = TypeVar("AnyQuery", bound=Query)


def read_query(model: type[AnyQuery], request: web.Request, handled: str | None = None) -> AnyQuery:
    """Read the query parameters of a request.

    Args:
        model: the model of the parameters.
        request: the request.
        handled: a further parameter, which the caller has read.

    Raises:
        ProblemError: 400, naming the invalid parameter.
    """
    parameters: dict[str, str] = {}
    for name, value in request.query.items():
        if name in parameters:
            raise bad_parameter(name, "it must not be repeated")
        parameters[name] = value
    if handled is not None:
        parameters.pop(handled, None)
    try:
        return model.model_validate(parameters)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = ", ".join(field.alias or name for name, field in model.model_fields.items()) or "none"
            raise bad_parameter(name, f"unknown parameter; known parameters: {known}") from None
        raise bad_parameter(name, first["msg"].removeprefix("Value error, ")) from None
