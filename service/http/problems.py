"""Answers: JSON, and RFC 9457 problems where a request cannot be answered as asked."""

from collections.abc import Awaitable, Callable
from enum import Enum
from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
from aiohttp import web

from service.batcher import BatchFailedError, OverloadedError
from service.database.connections import StorageUnavailableError, is_connection_lost
from service.http.request_ids import route_of

JSON_HEADERS: Final = {"Content-Type": "application/json", "Server": "order-tracking"}
PROBLEM_HEADERS: Final = {"Content-Type": "application/problem+json", "Server": "order-tracking"}
# A line of its own for whoever reads it in a terminal.
OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE
# A client that comes back at once would find the same.
RETRY_AFTER_SECONDS: Final = 2
# A replay is started by a person.
HEALED_AFTER_SECONDS: Final = 300


class Kind(Enum):
    """Every kind of problem that has a name of its own: status, title, and what there is to say of it."""

    BAD_PARAMETER = (
        400,
        "Bad parameter",
        "A query parameter is unknown, given twice or cannot be used; `parameter` names it.",
    )
    BAD_PATH = 400, "Bad path", "The path is not percent-encoded UTF-8, or has control characters."
    BAD_BODY = 400, "Bad body", "The body cannot be read, or is not what is asked for."
    BAD_FRAMING = (
        400,
        "Bad framing",
        "The message is framed in a way that two readers might read in two ways.",
    )
    UNAUTHORIZED = (
        401,
        "Unauthorized",
        "A key is needed, and none came, or one that is unknown, revoked or expired.",
    )
    BAD_SIGNATURE = 401, "Bad signature", "The signature of the body is missing or wrong."
    FORBIDDEN = 403, "Forbidden", "The key's scope is too small, or a page of another site asked."
    UNKNOWN_ORDER = 404, "Unknown order", "Nothing was ever reported of this order."
    NOT_KNOWN_THEN = 404, "Not known then", "The order was not known at that version or time."
    UNKNOWN_ENTRY = 404, "Unknown entry", "The quarantine has no entry of this id."
    TOO_SLOW = 408, "Too slow", "The body took too long."
    NOT_OPEN = 409, "Not open", "The entry has been dealt with already."
    TOO_LARGE = 413, "Too large", "The body is larger than bodies may be."
    UNKNOWN_CODING = 415, "Unknown content coding", "There are gzip and identity."
    NOT_UNDERSTOOD = 422, "Still not understood", "The entry still cannot be understood; it stays as it is."
    UNAVAILABLE = 503, "Temporarily unavailable", "Try again after `Retry-After` seconds."
    SET_ASIDE = 503, "Set aside", "A view could not handle an event of this order; a replay heals it."
    HTTP_VERSION = 505, "HTTP version not supported", "There are HTTP/1.0 and HTTP/1.1."

    def __init__(self, status: int, title: str, meaning: str) -> None:
        self.status = status
        self.title = title
        self.meaning = meaning

    @property
    def slug(self) -> str:
        """Where the documentation has it."""
        return self.title.lower().replace(" ", "-")

    @property
    def type(self) -> str:
        """Where it is explained; nowhere, where its status says all (RFC 9457, 4.2.1)."""
        return "about:blank" if self.title == HTTPStatus(self.status).phrase else f"/docs#{self.slug}"


log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class ProblemError(Exception):
    """A request that gets a problem for an answer.

    Args:
        kind: one of our own, or a status that says all.
        detail: what was wrong this time.
        headers: sent along.
        members: further members of the problem.
    """

    def __init__(
        self,
        kind: Kind | HTTPStatus,
        detail: str | None = None,
        *,
        headers: dict[str, str] | None = None,
        **members: Any,
    ) -> None:
        if isinstance(kind, Kind):
            self.status, self.title, self.type = kind.status, kind.title, kind.type
        else:
            self.status, self.title, self.type = kind.value, kind.phrase, "about:blank"
        super().__init__(detail or self.title)
        self.detail = detail
        self.headers = headers or {}
        self.members = members


def bad_parameter(name: str, detail: str) -> ProblemError:
    """Return the problem of a query parameter that cannot be used."""
    return ProblemError(Kind.BAD_PARAMETER, f"{name}: {detail}", parameter=name)


def unavailable(detail: str, **members: Any) -> ProblemError:
    """Return the problem of something that may be there again in a moment."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ProblemError(Kind.UNAVAILABLE, detail, headers=headers, **members)


def set_aside(detail: str, **members: Any) -> ProblemError:
    """Return the problem of an order that a view cannot show until a replay has healed it."""
    headers = {"Retry-After": str(HEALED_AFTER_SECONDS)}
    return ProblemError(Kind.SET_ASIDE, detail, headers=headers, **members)


def answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """Return a JSON answer. Times are written by RFC 3339, in UTC."""
    return web.Response(
        body=orjson.dumps(value, option=OPTIONS),
        status=status,
        headers={**JSON_HEADERS, **headers} if headers else JSON_HEADERS,
    )


def problem_answer(problem: ProblemError) -> web.Response:
    """Return a problem as an answer."""
    body = {
        "type": problem.type,
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
        return ProblemError(HTTPStatus(error.status), _detail(error), headers=headers)
    log.error("request failed", method=request.method, route=route_of(request), exc_info=error)
    return ProblemError(HTTPStatus.INTERNAL_SERVER_ERROR)


def _is_storage_away(error: Exception) -> bool:
    if isinstance(error, BatchFailedError):
        return error.__cause__ is not None and is_connection_lost(error.__cause__)
    return isinstance(error, StorageUnavailableError | TimeoutError)


def _detail(error: web.HTTPException) -> str | None:
    if isinstance(error, web.HTTPMethodNotAllowed):
        return f"there are {', '.join(sorted(error.allowed_methods))}"
    return None
