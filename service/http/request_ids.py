"""What a request is called in logs and metrics: its id, and its route's pattern."""

import re
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Final
from uuid import uuid4

from aiohttp import web

REQUEST_ID_HEADER: Final = "X-Request-Id"
# Of everything that has no route: one name for all, however many paths somebody tries.
UNKNOWN_ROUTE: Final = "unknown"

# What a caller or its proxy may have as an id; anything else could be taken for a part of a log.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~+/=:-]{1,128}", re.ASCII)
# Where the id of a request lies once it is known.
_KEY: Final = web.RequestKey("request_id", str)
# The request that is being handled; of a connection's task, which handles one after the other.
_handled: Final[ContextVar[web.BaseRequest | None]] = ContextVar("handled", default=None)


def begin(request: web.BaseRequest) -> None:
    """Let what is logged from here on in this task have the request's id."""
    _handled.set(request)


def given_id(request: web.BaseRequest) -> str | None:
    """Return the id that the caller gave a request, None where it gave none, or none that can be one."""
    given = request.headers.get(REQUEST_ID_HEADER)
    return given if given is not None and _REQUEST_ID.fullmatch(given) else None


def request_id_of(request: web.BaseRequest) -> str:
    """Return the id of a request: the caller's, or one that is made when it is first asked for.

    Few are: a webhook that is recorded has the id of its report.
    """
    known = request.get(_KEY)
    if known is None:
        known = request[_KEY] = given_id(request) or str(uuid4())
    return known


def add_request_id(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the id to a log line that is written while a request is handled; a processor of structlog."""
    if (request := _handled.get()) is not None:
        line["request_id"] = request_id_of(request)
    return line


def route_of(request: web.BaseRequest) -> str:
    """Return the pattern of a request's path, never the path itself: that may hold a token."""
    resource = request.match_info.route.resource if isinstance(request, web.Request) else None
    return resource.canonical if resource is not None else UNKNOWN_ROUTE
