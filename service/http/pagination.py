"""Pages of lists: an opaque cursor, the member ``next``, and an RFC 8288 link to the next page."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlencode

from aiohttp import hdrs, web
from pydantic import BaseModel

from projections.windows import POSITION_MAX
from service.http.csv_export import to_csv
from service.http.responses import json_response, response

AnyRow = TypeVar("AnyRow")


def encode_cursor(key: int) -> str:
    """Return the opaque form of the key at which a page ended."""
    return urlsafe_b64encode(str(key).encode()).decode().rstrip("=")


def decode_cursor(value: Any) -> int:
    """Return the key at which a page ended.

    Raises:
        ValueError: the cursor is not spelled exactly as a response gave it.
    """
    try:
        key = int(urlsafe_b64decode(f"{value}==").decode("ascii"))
    except ValueError:
        key = -1
    # Decoders accept several spellings of one value.
    if not 0 <= key <= POSITION_MAX or encode_cursor(key) != value:
        raise ValueError("it must be a cursor from an earlier response")
    return key


class Page(NamedTuple):
    """The items of one page, and the parameter that selects the next page, empty if this is the last."""

    items: Sequence[Any]
    next_place: dict[str, Any]

    def next_path(self, path: str, query: BaseModel) -> str | None:
        """Return the next page's path and query string, None if this is the last. Other parameters are kept."""
        if not self.next_place:
            return None
        place = {"after_position", "cursor", "after", "last"}
        same = query.model_dump(
            mode="json", exclude=place, exclude_unset=True, exclude_none=True, by_alias=True
        )
        return f"{path}?{urlencode({**same, **self.next_place})}"


def cut_page(
    rows: Sequence[AnyRow], limit: int, key: Callable[[AnyRow], int], reached: int | None = None
) -> Page:
    """Return a page of rows that were read with one more than the page's limit.

    Args:
        rows: the rows.
        limit: the page's limit.
        key: returns the key by which the rows are ordered.
        reached: the key up to which the list was read, if that was not its end.
    """
    items = rows[:limit]
    last = key(items[-1]) if len(rows) > limit else reached
    return Page(items, {} if last is None else {"cursor": encode_cursor(last)})


def list_response(  # noqa: PLR0913, PLR0917 - the parts of every list
    request: web.Request,
    query: BaseModel,
    name: str,
    page: Page,
    path: str,
    record_type: type | None = None,
    **members: Any,
) -> web.Response:
    """Return a page of a list; ``next`` and the Link header lead to the next page.

    Args:
        request: the request.
        query: the request's query.
        name: the list's member in the response.
        page: the page.
        path: the list's path, percent-encoded.
        record_type: the type of the items if a request may prefer the list as CSV, else None.
        members: further members of the response, which CSV omits.
    """
    next_path = page.next_path(path, query)
    headers = {"Link": f'<{next_path}>; rel="next"'} if next_path is not None else {}
    if record_type is None or not _prefers_csv(request, query):
        return json_response({**members, name: page.items, "next": next_path}, headers=headers)
    headers["Vary"] = hdrs.ACCEPT
    headers[hdrs.CONTENT_DISPOSITION] = f'attachment; filename="{name}.csv"'
    return response(to_csv(record_type, page.items), "text/csv; charset=utf-8", headers=headers)


def _prefers_csv(request: web.Request, query: BaseModel) -> bool:
    """Return whether a list is requested as CSV: by its parameter, or else by the Accept header."""
    list_format: str | None = getattr(query, "format", None)
    if list_format is not None:
        return list_format == "csv"
    accept = request.headers.get(hdrs.ACCEPT, "")
    return "text/csv" in accept and "application/json" not in accept
