"""Responses: JSON, problems, and other media, all with the same headers."""

from collections.abc import Mapping
from typing import Any, Final

import orjson
from aiohttp import hdrs, web
from multidict import CIMultiDict

from service.http.problems import ProblemError

# The id of the log that the positions of a response belong to.
LOG_HEADER: Final = "X-Order-Tracking-Log"
# No cache may keep order data. No browser may guess a media type, or let another site use or frame a response.
COMMON_HEADERS: Final[dict[str, str]] = {
    hdrs.SERVER: "order-tracking",
    hdrs.CACHE_CONTROL: "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}
# nginx must not buffer a stream.
STREAM_HEADERS: Final[dict[str, str]] = {**COMMON_HEADERS, "X-Accel-Buffering": "no"}
JSON_HEADERS: Final[dict[str, str]] = {**COMMON_HEADERS, hdrs.CONTENT_TYPE: "application/json"}
PROBLEM_HEADERS: Final[dict[str, str]] = {**COMMON_HEADERS, hdrs.CONTENT_TYPE: "application/problem+json"}
# Prepared once, since copying them costs a third of building them.
_JSON_HEADERS: Final = CIMultiDict(JSON_HEADERS)
_PROBLEM_HEADERS: Final = CIMultiDict(PROBLEM_HEADERS)
# With an entity tag, a reader may keep the response for itself, and asks each time whether it has changed.
REVALIDATED: Final = "private, no-cache"
# The final newline keeps a terminal's prompt on its own line.
JSON_OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE


def json_response(value: Any, *, headers: Mapping[str, str] | None = None) -> web.Response:
    """Return a JSON response. Times are in RFC 3339 format, in UTC."""
    response = web.Response(body=orjson.dumps(value, option=JSON_OPTIONS), headers=_JSON_HEADERS)
    if headers:
        response.headers.update(headers)
    return response


def problem_response(problem: ProblemError) -> web.Response:
    """Return the response for a problem."""
    body = {
        "type": problem.type,
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        **problem.members,
    }
    response = web.Response(
        body=orjson.dumps(body, option=JSON_OPTIONS), status=problem.status, headers=_PROBLEM_HEADERS
    )
    if problem.headers:
        response.headers.update(problem.headers)
    return response


def response(
    body: bytes = b"",
    content_type: str | None = None,
    *,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> web.Response:
    """Return a response of a media type other than JSON."""
    own: dict[str, str] = {hdrs.CONTENT_TYPE: content_type} if content_type is not None else {}
    return web.Response(body=body, status=status, headers={**COMMON_HEADERS, **own, **(headers or {})})


def has_etag(request: web.BaseRequest, etag: str) -> bool:
    """Return whether If-None-Match has this entity tag. Weak tags match too (RFC 9110, 13.1.2)."""
    expected = request.headers.get(hdrs.IF_NONE_MATCH)
    if expected is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in expected.split(",")}
    return etag in tags or "*" in tags
