"""Answers: JSON, and RFC 9457 problems where a request cannot be answered as asked."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
from aiohttp import web

from service.batcher import BatchFailedError, OverloadedError
from service.database import StorageUnavailableError, is_connection_lost

JSON_HEADERS: Final = {"Content-Type": "application/json", "Server": "order-tracking"}
PROBLEM_HEADERS: Final = {"Content-Type": "application/problem+json", "Server": "order-tracking"}
# A line of its own for whoever reads it in a terminal.
OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
# A client that comes back at once would find the same.
RETRY_AFTER_SECONDS: Final = 2
# A replay is started by a person.
HEALED_AFTER_SECONDS: Final = 300

# Every kind of problem that has a name of its own: its status, and what there is to say of it.
PROBLEMS: Final[dict[str, tuple[int, str]]] = {
    "Bad parameter": (
        400,
        "A query parameter is unknown, given twice or cannot be used; `parameter` names it.",
    ),
    "Bad path": (400, "The path is not percent-encoded UTF-8, or has control characters."),
    "Bad body": (400, "The body cannot be read, or is not what is asked for."),
    "Bad framing": (400, "The message is framed in a way that two readers might read in two ways."),
    "Unauthorized": (401, "A key is needed, and none came, or one that is unknown, revoked or expired."),
    "Bad signature": (401, "The signature of the body is missing or wrong."),
    "Forbidden": (403, "The key's scope is too small, or a page of another site asked."),
    "Unknown order": (404, "Nothing was ever reported of this order."),
    "Not known then": (404, "The order was not known at that version or time."),
    "Unknown entry": (404, "The quarantine has no entry of this id."),
    "Too slow": (408, "The body took too long."),
    "Not open": (409, "The entry has been dealt with already."),
    "Too large": (413, "The body is larger than bodies may be."),
    "Unknown content coding": (415, "There are gzip and identity."),
    "Still not understood": (422, "The entry still cannot be understood; it stays as it is."),
    "Temporarily unavailable": (503, "Try again after `Retry-After` seconds."),
    "Set aside": (503, "A view could not handle an event of this order; a replay heals it."),
    "HTTP version not supported": (505, "There are HTTP/1.0 and HTTP/1.1."),
}

log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ProblemError(Exception):
    """A request that gets a problem for an answer.

    Args:
        status: of the answer.
        title: the kind of problem, the same for all of its kind.
        detail: what was wrong this time.
        headers: sent along.
        members: further members of the problem.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str | None = None,
        *,
        headers: dict[str, str] | None = None,
        **members: Any,
    ) -> None:
        super().__init__(detail or title)
        self.status = status
        self.title = title
        self.detail = detail
        self.headers = headers or {}
        self.members = members


def bad_parameter(name: str, detail: str) -> ProblemError:
    """Return the problem of a query parameter that cannot be used."""
    return ProblemError(400, "Bad parameter", f"{name}: {detail}", parameter=name)


def unavailable(detail: str, **members: Any) -> ProblemError:
    """Return the problem of something that may be there again in a moment."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ProblemError(503, "Temporarily unavailable", detail, headers=headers, **members)


def set_aside(detail: str, **members: Any) -> ProblemError:
    """Return the problem of an order that a view cannot show until a replay has healed it."""
    headers = {"Retry-After": str(HEALED_AFTER_SECONDS)}
    return ProblemError(503, "Set aside", detail, headers=headers, **members)


def answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a JSON answer. Times are written by RFC 3339, in UTC."""
    return web.Response(
        body=orjson.dumps(value, option=OPTIONS),
        status=status,
        headers={**JSON_HEADERS, **headers} if headers else JSON_HEADERS,
    )


def problem_type(status: int, title: str) -> str:
    """Return where a kind of problem is explained; nowhere, where its status says all (RFC 9457, 4.2.1)."""
    if title not in PROBLEMS or title == HTTPStatus(status).phrase:
        return "about:blank"
    return f"/docs#{title.lower().replace(' ', '-')}"


def problem_answer(problem: ProblemError) -> web.Response:
    """Return a problem as an answer."""
    body = {
        "type": problem_type(problem.status, problem.title),
        "title": problem.title,
        "status": problem.status,
        "detail": problem.detail,
        **problem.members,
    }
    return web.Response(
        body=orjson.dumps(body, option=OPTIONS),
        status=problem.status,
        headers={**PROBLEM_HEADERS, **problem.headers},
    )


def problem_of(error: Exception, request: web.BaseRequest) -> ProblemError:
    """Return the problem that an error is to whoever asked; the one place where errors become statuses."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, OverloadedError):
        return unavailable(str(error))
    if _is_storage_away(error):
        # What the driver says may name hosts and users: it is for the log, not for the answer.
        return unavailable("the database did not answer in time")
    if isinstance(error, web.HTTPException):
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
        return ProblemError(error.status, error.reason, _detail(error), headers=headers)
    log.error("request failed", method=request.method, route=_route(request), exc_info=error)
    return ProblemError(500, "Internal error")


def _is_storage_away(error: Exception) -> bool:
    if isinstance(error, BatchFailedError):
        return error.__cause__ is not None and is_connection_lost(error.__cause__)
    return isinstance(error, StorageUnavailableError | TimeoutError)


def _detail(error: web.HTTPException) -> str | None:
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"there are {', '.join(sorted(error.allowed_methods))}"
    return None


def _route(request: web.BaseRequest) -> str:
    """The pattern of the path, never the path itself: it may hold a token."""
    resource = request.match_info.route.resource if isinstance(request, web.Request) else None
    return resource.canonical if resource is not None else "unknown"
