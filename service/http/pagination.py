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

# Base64 of one number or two of up to nineteen digits, without padding.
CURSOR_PATTERN: Final = "^[A-Za-z0-9_-]{2,52}$"

AnyRow = TypeVar("AnyRow")
_NO_CURSOR: Final = "it must be a cursor from an earlier response"


def encode_cursor(key: int | tuple[int, int]) -> str:
    """Return the opaque form of the key at which a page ended: a number or a pair of numbers."""
    text = f"{key[0]}.{key[1]}" if isinstance(key, tuple) else str(key)
    return urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(value: Any) -> int:
    """Return the key at which a page ended.

    Raises:
        ValueError: the cursor is not spelled exactly as a response gave it.
    """
    match decode_any_cursor(value):
        case int(key):
            return key
        case _:
            raise ValueError(_NO_CURSOR)


def decode_any_cursor(value: Any) -> int | tuple[int, int]:
    """Return the number or the pair of numbers at which a page ended.

    Raises:
        ValueError: the cursor is not spelled exactly as a response gave it.
    """
    try:
        first, *rest = (int(part) for part in urlsafe_b64decode(f"{value}==").decode("ascii").split("."))
    except ValueError:
        raise ValueError(_NO_CURSOR) from None
    key = (first, rest[0]) if rest else first
    # Decoders accept several spellings of one value.
    if not all(0 <= number <= POSITION_MAX for number in (first, *rest)) or encode_cursor(key) != value:
        raise ValueError(_NO_CURSOR)
    return key


class Page(NamedTuple):
    """The items of one page, and the parameter that selects the next page, empty if this is the last."""

    items: Sequence[Any]
    next_place: dict[str, Any]

    def next_path(self, path: str, query: BaseModel) -> str | None:
        """Return the next page's path and query string, None if this is the last. Other parameters are kept."""
        if not self.next_place:
            return None
        place = {"after_position", "cursor", "after", "after_version", "last", "log"}
        same = query.model_dump(
            mode="json", exclude=place, exclude_unset=True, exclude_none=True, by_alias=True
        )
        return f"{path}?{urlencode({**same, **self.next_place})}"


def cut_page(
    rows: Sequence[AnyRow],
    limit: int,
    key: Callable[[AnyRow], int | tuple[int, int]],
    reached: int | tuple[int, int] | None = None,
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
    headers = {**_link(page.next_path(path, query)), **csv_headers(name)}
    return response(to_csv(record_type, page.items), headers=headers)


def csv_headers(name: str) -> dict[str, str]:
    """Return the headers of a list as CSV, which a browser saves under this name."""
    return {
        hdrs.CONTENT_TYPE: "text/csv; charset=utf-8",
        hdrs.CONTENT_DISPOSITION: f'attachment; filename="{name}.csv"',
    }


def _link(next_path: str | None) -> dict[str, str]:
    return {"Link": f'<{next_path}>; rel="next"'} if next_path is not None else {}
