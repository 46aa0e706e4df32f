"""A page of a list, and the way to the next one: an opaque cursor, a member ``next`` and an RFC 8288 link."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar
from urllib.parse import urlencode

from aiohttp import hdrs, web
from pydantic import BaseModel

from service.http.csv_export import columns_of, to_csv
from service.http.problems import answer

# Cursors, versions and positions are PostgreSQL's bigint.
POSITION_MAX: Final = 2**63 - 1
# What says where a page begins, and so is another for the next one.
PLACE_PARAMETERS: Final = frozenset({"after_position", "cursor", "after"})
AnyRow = TypeVar("AnyRow")

CSV_HEADERS: Final = {"Content-Type": "text/csv; charset=utf-8", "Server": "order-tracking", "Vary": "Accept"}


def encode_cursor(key: int) -> str:
    """Return the opaque form of where a page ended."""
    return urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def decode_cursor(value: Any) -> int:
    """Return where a page ended.

    Raises:
        ValueError: it is not the very spelling that an answer gave; decoders are lenient, this is not.
    """
    try:
        key = int(urlsafe_b64decode(f"{value}==").decode("ascii"))
    except ValueError:
        key = -1
    if not 0 <= key <= POSITION_MAX or encode_cursor(key) != value:
        raise ValueError("it must be one that an earlier answer gave")
    return key


def _next_page(path: str, query: BaseModel, moved: dict[str, Any]) -> str:
    """Return path and query of the page after this one: the same question, moved on."""
    given = query.model_dump(exclude_unset=True, exclude=set(PLACE_PARAMETERS), by_alias=True)
    parameters = {name: _as_parameter(value) for name, value in given.items() if value is not None}
    return f"{path}?{urlencode({**parameters, **moved})}"


def _as_parameter(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, timedelta):
        return f"PT{int(value.total_seconds())}S"
    return value


def cut(
    rows: Sequence[AnyRow], limit: int, key: Callable[[AnyRow], int]
) -> tuple[Sequence[AnyRow], str | None]:
    """Return a page of rows that were read with one more than it may have, and the cursor of the next page.

    Args:
        rows: as they were read.
        limit: of the page.
        key: what the rows are ordered by.
    """
    page = rows[:limit]
    return page, encode_cursor(key(page[-1])) if len(rows) > len(page) else None


def list_answer(  # noqa: PLR0913 - the parts of every list
    name: str,
    items: Sequence[Any],
    path: str,
    query: BaseModel,
    *,
    cursor: str | None = None,
    after: int | None = None,
    **members: Any,
) -> web.Response:
    """Return a page of a list, with the way to the next one in the body and as a link."""
    onward = following(path, query, cursor=cursor, after=after)
    return answer({**members, name: items, "next": onward}, headers=_link(onward))


def table_answer(  # noqa: PLR0913 - the parts of every list
    request: web.Request,
    query: BaseModel,
    kind: type,
    name: str,
    items: Sequence[Any],
    *,
    cursor: str | None,
    path: str = "",
    **members: Any,
) -> web.Response:
    """Return a page of a list, or the same as CSV, whose way to the next one stands in the link alone.

    Args:
        request: that asks for either.
        query: that was asked.
        kind: the type of the items.
        name: of the list.
        items: of the page.
        cursor: of the next page.
        path: of the list, where the request's is not to be trusted with its own spelling.
        members: what else the answer has.
    """
    path = path or request.path
    if not _wants_csv(request, query):
        return list_answer(name, items, path, query, cursor=cursor, **members)
    headers = {**CSV_HEADERS, **_link(following(path, query, cursor=cursor))}
    return web.Response(body=to_csv(columns_of(kind), items), headers=headers)


def _wants_csv(request: web.Request, query: BaseModel) -> bool:
    """Tell whether a list is asked for as CSV: by its parameter, or else by the Accept header."""
    asked: str | None = getattr(query, "format", None)
    if asked is not None:
        return asked == "csv"
    accepted = request.headers.get(hdrs.ACCEPT, "")
    return "text/csv" in accepted and "application/json" not in accepted


def following(
    path: str, query: BaseModel, *, cursor: str | None = None, after: int | None = None
) -> str | None:
    """Return path and query of the page after this one, None where it is the last."""
    if cursor is not None:
        return _next_page(path, query, {"cursor": cursor})
    return _next_page(path, query, {"after": after}) if after is not None else None


def _link(onward: str | None) -> dict[str, str]:
    return {"Link": f'<{onward}>; rel="next"'} if onward is not None else {}
