"""Pages of lists: an opaque cursor, the member ``next``, and an RFC 8288 link to the next page."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import urlencode

from aiohttp import hdrs, web
from pydantic import BaseModel

from projections.windows import POSITION_MAX
from service.http.csv_export import to_csv
from service.http.responses import json_response, response

# Base64 of up to nineteen digits, without padding.
CURSOR_PATTERN: Final = "^[A-Za-z0-9_-]{2,26}$"

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
        place = {"after_position", "cursor", "after", "after_version", "last"}
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


def list_response(query: BaseModel, name: str, page: Page, path: str, **members: Any) -> web.Response:
    """Return a page of a list; ``next`` and the Link header lead to the next page.

    Args:
        query: the request's query.
        name: the list's member in the response.
        page: the page.
        path: the list's path, percent-encoded.
        members: further members of the response.
    """
    next_path = page.next_path(path, query)
    return json_response({**members, name: page.items, "next": next_path}, headers=_link(next_path))


def csv_response(query: BaseModel, name: str, page: Page, path: str, record_type: type) -> web.Response:
    """Return a page of a list as CSV; the Link header leads to the next page.

    Args:
        query: the request's query.
        name: the name of the file.
        page: the page.
        path: the list's path, percent-encoded.
        record_type: the type of the items.
    """
    headers = _link(page.next_path(path, query))
    headers[hdrs.CONTENT_DISPOSITION] = f'attachment; filename="{name}.csv"'
    return response(to_csv(record_type, page.items), "text/csv; charset=utf-8", headers=headers)


def _link(next_path: str | None) -> dict[str, str]:
    return {"Link": f'<{next_path}>; rel="next"'} if next_path is not None else {}
