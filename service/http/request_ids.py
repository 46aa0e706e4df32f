"""Request ids, traces, and the route patterns that stand for paths in logs and metrics."""

import re
from collections.abc import MutableMapping
from contextvars import ContextVar
from typing import Any, Final
from uuid import uuid4

from aiohttp import web

REQUEST_ID_HEADER: Final = "X-Request-Id"
TRACE_HEADER: Final = "traceparent"
# One name for all paths without a route, however many a client tries.
UNKNOWN_ROUTE: Final = "unknown"

# The ids that a caller or its proxy may choose. Other characters could look like part of a log line.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._~+/=:-]{1,128}", re.ASCII)
# Version 00 of W3C Trace Context. Ids of zeros alone are invalid.
_TRACE: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_KEY: Final = web.RequestKey("request_id", str)
# The request that this task is handling. A connection's task handles one request after the other.
_current: Final[ContextVar[web.BaseRequest | None]] = ContextVar("current", default=None)


def begin_request(request: web.BaseRequest) -> None:
    """Give the request's id to every line that this task logs from now on."""
    _current.set(request)


def caller_request_id(request: web.BaseRequest) -> str | None:
    """Return the caller's own id of a request, None if absent or invalid."""
    request_id = request.headers.get(REQUEST_ID_HEADER)
    return request_id if request_id is not None and _REQUEST_ID.fullmatch(request_id) else None


def caller_trace(request: web.BaseRequest) -> str | None:
    """Return the caller's trace of a request (W3C Trace Context), None if absent or invalid."""
    trace = request.headers.get(TRACE_HEADER)
    return trace if trace is not None and _TRACE.fullmatch(trace) else None


def request_id(request: web.BaseRequest) -> str:
    """Return the caller's id of a request, or one that is generated at the first call.

    Few requests need one: a recorded webhook has the id of its report.
    """
    known = request.get(_KEY)
    if known is None:
        known = request[_KEY] = caller_request_id(request) or str(uuid4())
    return known


def add_request_id(_logger: Any, _method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the id to a log line that is written while a request is handled; a processor of structlog."""
    if (request := _current.get()) is not None:
        line["request_id"] = request_id(request)
    return line


def route_pattern(request: web.BaseRequest) -> str:
    """Return the pattern of a request's route, never its path, which may contain a token."""
    # None if no application has routed the request. The public name would fail then.
    match_info = request._match_info if isinstance(request, web.Request) else None  # noqa: SLF001
    resource = match_info.route.resource if match_info is not None else None
    return resource.canonical if resource is not None else UNKNOWN_ROUTE
