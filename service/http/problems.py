"""Problems (RFC 9457): every type that a response may have, and the mapping from errors to problems."""

from collections.abc import Hashable
from enum import Enum
from http import HTTPStatus
from time import monotonic
from typing import Any, Final

import structlog
from aiohttp import web

from projections.postgres import is_connection_lost
from service.batcher import BatchFailedError, OverloadedError
from service.database.connections import StorageUnavailableError
from service.http.request_ids import route_pattern

# A client that retries at once would meet the same problem.
RETRY_AFTER_SECONDS: Final = 2
# An operator must act, such as start a replay.
RETRY_AFTER_OPERATOR_SECONDS: Final = 300
# Lines of a kind that clients can cause are logged once in this interval, or a client could fill the disk.
LOG_SECONDS: Final = 60.0
# Further kinds of lines share one interval.
LOG_KINDS_MAX: Final = 256

logger = structlog.get_logger()


class LogLimit:
    """Admits one line of each kind in LOG_SECONDS, and counts those that it suppresses."""

    def __init__(self) -> None:
        # For each kind, when its next line may be logged, and how many were suppressed since its last one.
        self._kinds: dict[Hashable, tuple[float, int]] = {}

    def admit(self, kind: Hashable) -> int | None:
        """Return how many lines were suppressed since the last one, or None to suppress this one too."""
        if kind not in self._kinds and len(self._kinds) >= LOG_KINDS_MAX:
            kind = None
        now = monotonic()
        log_at, suppressed = self._kinds.get(kind, (now, 0))
        if now < log_at:
            self._kinds[kind] = log_at, suppressed + 1
            return None
        self._kinds[kind] = now + LOG_SECONDS, 0
        return suppressed


_failures: Final = LogLimit()


class Explained:
    """A problem type: its status, title and explanation. A feature defines its own in an enumeration.

    Args:
        status: the status of the response.
        title: a few words, from which the type's URI is made.
        explanation: one sentence or two.
    """

    def __init__(self, status: int, title: str, explanation: str) -> None:
        self.status = status
        self.title = title
        self.explanation = explanation

    @property
    def slug(self) -> str:
        """The last segment of the type's path."""
        return self.title.lower().replace(" ", "-")

    @property
    def uri(self) -> str:
        """The type's URI, where it is explained; about:blank if its status is enough (RFC 9457, 4.2.1)."""
        return "about:blank" if self.title == HTTPStatus(self.status).phrase else f"/problems/{self.slug}"


class ProblemType(Explained, Enum):
    """The problem types of the core."""

    BAD_PARAMETER = (
        400,
        "Bad parameter",
        "A query parameter is unknown, repeated or invalid; `parameter` names it.",
    )
    BAD_PATH = 400, "Bad path", "The path is not percent-encoded UTF-8, or has control characters."
    BAD_BODY = 400, "Bad body", "The body cannot be read, or is not what the endpoint requires."
    BAD_FRAMING = 400, "Bad framing", "Two readers could disagree about where the message ends."
    UNAUTHORIZED = 401, "Unauthorized", "A valid API key is required."
    BAD_SIGNATURE = 401, "Bad signature", "The signature of the body is missing or wrong."
    FORBIDDEN = (
        403,
        "Forbidden",
        "The key's scope is too small, or the request came from a page of another site.",
    )
    UNKNOWN_ORDER = 404, "Unknown order", "The order has no report."
    NO_SUCH_VERSION = 404, "No such version", "The order had no report at that version or time."
    UNKNOWN_ENTRY = 404, "Unknown entry", "The quarantine has no entry with this id."
    UNKNOWN_CONTRADICTION = 404, "Unknown contradiction", "The order has no refused report with this version."
    BODY_TIMEOUT = 408, "Body timeout", "The body took too long to arrive."
    NOT_OPEN = 409, "Not open", "The quarantined body has been retried or discarded already."
    ALREADY_HANDLED = 409, "Already handled", "The contradiction has been handled before."
    BEYOND_HEAD = (
        410,
        "Beyond the head",
        "The log ends before this position: a failover or a restore lost events. Begin again before the loss.",
    )
    ANOTHER_EVENT = (
        410,
        "Another event",
        "A failover or a restore has lost the last event that you read. Begin again before the loss.",
    )
    ANOTHER_LOG = (
        410,
        "Another log",
        "Your positions belong to another log: the database was restored or replaced. `log` is this log's id.",
    )
    TOO_LARGE = 413, "Too large", "The body is larger than the limit."
    UNKNOWN_CODING = 415, "Unknown content coding", "Supported content codings: gzip, identity."
    NOT_UNDERSTOOD = 422, "Still not understood", "The quarantined body is still unparseable and stays open."
    OVER_BUDGET = (
        429,
        "Over budget",
        "You, or all clients together, hold as many streams, reads or bytes as allowed; `budget` names which.",
    )
    LOOP_DETECTED = (
        508,
        "Loop detected",
        "The webhook request is one of this service's own deliveries. It is not recorded.",
    )
    UNAVAILABLE = 503, "Temporarily unavailable", "Retry after `Retry-After` seconds."
    PARKED = 503, "Order parked", "A view could not apply an event of this order. A replay rebuilds the view."
    HTTP_VERSION = 505, "HTTP version not supported", "Supported versions: HTTP/1.0, HTTP/1.1."


class ProblemError(Exception):
    """A request that is answered with a problem.

    Args:
        problem_type: one of our own types, or a status that is explanation enough.
        detail: the fault of this request, and what to do.
        headers: further headers of the response.
        members: further members of the problem.
    """

    def __init__(
        self,
        problem_type: Explained | HTTPStatus,
        detail: str | None = None,
        *,
        headers: dict[str, str] | None = None,
        **members: Any,
    ) -> None:
        if isinstance(problem_type, Explained):
            self.status, self.title, self.type = problem_type.status, problem_type.title, problem_type.uri
        else:
            self.status, self.title, self.type = problem_type.value, problem_type.phrase, "about:blank"
        super().__init__(detail or self.title)
        self.detail = detail
        self.headers = headers or {}
        self.members = members


def bad_parameter(name: str, detail: str) -> ProblemError:
    """Return the problem for an invalid query parameter."""
    return ProblemError(ProblemType.BAD_PARAMETER, f"{name}: {detail}", parameter=name)


def unavailable(detail: str, **members: Any) -> ProblemError:
    """Return the problem for a resource that may be available again in a moment."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)}
    return ProblemError(ProblemType.UNAVAILABLE, detail, headers=headers, **members)


def only_reads() -> ProblemError:
    """Return the problem for a request that would write, to a process that only reads."""
    detail = "this process only reads (ORDER_TRACKING_READ_ONLY): send the request to one that records"
    return unavailable(detail, cause="read_only")


def beyond_head(position: int, head: int) -> ProblemError:
    """Return the problem for a position that the log has lost, or never had."""
    detail = f"the log ends at position {head}, before {position}: begin again before the loss of events"
    return ProblemError(ProblemType.BEYOND_HEAD, detail, position=position, head=head)


def another_event(**place: Any) -> ProblemError:
    """Return the problem for a page that begins after an event which the log has lost.

    Args:
        place: the event's ``position``, or its ``version`` if one order's events are read.
    """
    ((name, number),) = place.items()
    detail = f"the event at {name} {number} is not the one that you read last: begin again before the loss"
    return ProblemError(ProblemType.ANOTHER_EVENT, detail, **place)


def another_log(log_id: str, expected: str) -> ProblemError:
    """Return the problem for a position of another log.

    Args:
        log_id: the id of this log.
        expected: the id of the reader's log.
    """
    detail = (
        f"this is the log {log_id}, not {expected}: send your last event's report_id as `last`, without `log`, "
        "to learn whether this log has it"
    )
    return ProblemError(ProblemType.ANOTHER_LOG, detail, log=log_id)


def order_parked(detail: str, **members: Any) -> ProblemError:
    """Return the problem for an order that a view cannot show until a replay."""
    headers = {"Retry-After": str(RETRY_AFTER_OPERATOR_SECONDS)}
    return ProblemError(ProblemType.PARKED, detail, headers=headers, **members)


def to_problem(error: Exception, request: web.BaseRequest) -> ProblemError:
    """Return the problem for an error: the one place where errors become statuses."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, OverloadedError):
        return unavailable(str(error))
    if _is_storage_unavailable(error):
        # The driver's message may name hosts and users. It belongs in the log, not in the response.
        return unavailable("the database did not answer in time")
    if isinstance(error, web.HTTPMethodNotAllowed):
        detail = f"supported methods: {', '.join(sorted(error.allowed_methods))}"
        headers = {"Allow": error.headers["Allow"]}
        return ProblemError(HTTPStatus.METHOD_NOT_ALLOWED, detail, headers=headers)
    if isinstance(error, web.HTTPException):
        return ProblemError(HTTPStatus(error.status))
    route = route_pattern(request)
    if (suppressed := _failures.admit((route, type(error)))) is not None:
        logger.error(
            "request failed", method=request.method, route=route, suppressed=suppressed, exc_info=error
        )
    return ProblemError(HTTPStatus.INTERNAL_SERVER_ERROR)


def _is_storage_unavailable(error: Exception) -> bool:
    if isinstance(error, BatchFailedError):
        return error.__cause__ is not None and is_connection_lost(error.__cause__)
    return isinstance(error, StorageUnavailableError | TimeoutError)
