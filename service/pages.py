"""A page of a list, and the way to the next one: an opaque cursor, a member ``next`` and an RFC 8288 link."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlencode

from aiohttp import web
from pydantic import BaseModel

from service.problems import answer

# Cursors, versions and positions are PostgreSQL's bigint.
POSITION_MAX: Final = 2**63 - 1
# What says where a page begins, and so is another for the next one.
PLACE_PARAMETERS: Final = frozenset({"after_position", "cursor", "after"})


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


def next_page(path: str, query: BaseModel, moved: dict[str, Any]) -> str:
    """Return path and query of the page after this one: the same question, moved on."""
    given = query.model_dump(exclude_unset=True, exclude=set(PLACE_PARAMETERS), by_alias=True)
    parameters = {
        name: value.isoformat().replace("+00:00", "Z") if isinstance(value, datetime) else value
        for name, value in given.items()
        if value is not None
    }
    return f"{path}?{urlencode({**parameters, **moved})}"


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
    onward = {"cursor": cursor} if cursor is not None else {"after": after} if after is not None else None
    following = next_page(path, query, onward) if onward is not None else None
    headers = {"Link": f'<{following}>; rel="next"'} if following is not None else None
    return answer({**members, name: items, "next": following}, headers=headers)
