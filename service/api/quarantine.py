"""The quarantine over HTTP: list, show, retry and discard unparseable bodies."""

from base64 import b64encode
from operator import itemgetter
from typing import Final

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.windows import POSITION_MAX
from service.database.connections import ConnectionPool
from service.database.operations import REASON_CHARACTERS_MAX, Actor
from service.http.access import admission, has_scope
from service.http.body import read_body
from service.http.endpoints import Endpoint, Tag
from service.http.pagination import cut_page, list_response
from service.http.parameters import PageQuery, Query, decode_path, parse_number
from service.http.problems import ProblemError, ProblemType
from service.http.responses import json_response
from service.ingest import quarantine
from service.ingest.parser import UnreadableError
from service.ingest.quarantine import NotOpenError, QuarantinedBody, QuarantineState, UnknownEntryError
from service.ingest.recorder import Receipt, Recorder, UnrecordableReportError

ENTRY_PATH: Final = "/quarantine/{quarantine_id}"


class QuarantinedBodyPage(TypedDict):
    """A page of the quarantine."""

    entries: list[QuarantinedBody]
    next: str | None


class QuarantinedBytes(QuarantinedBody):
    """A quarantined body with its bytes.

    They are null after an erasure, and for a key of the scope ``read``, which does not get ``remote`` either.
    """

    body_base64: str | None


class QuarantineQuery(PageQuery):
    """The filter of the quarantine."""

    state: QuarantineState | None = Field(default=None, description="entries in this state")


class DiscardRequest(BaseModel):
    """Why a quarantined body is discarded."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: str = Field(min_length=1, max_length=REASON_CHARACTERS_MAX)


class QuarantineApi:
    """Serves the quarantine.

    Args:
        pool: the connections to read with.
        recorder: records retried bodies.
    """

    tag = Tag("quarantine", "Unparseable bodies, which you can retry or discard.")

    def __init__(self, pool: ConnectionPool, recorder: Recorder) -> None:
        self._pool = pool
        self._recorder = recorder

    @Endpoint("GET", "/quarantine", QuarantinedBodyPage, query=QuarantineQuery)
    async def list_quarantined_bodies(self, request: web.Request, query: QuarantineQuery) -> web.Response:
        """List quarantined bodies, newest first."""
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with self._pool.connection() as connection:
            rows = await quarantine.entries_page(connection, before, query.state, query.limit + 1)
        if not has_scope(request, "read:bodies"):
            rows = [{**row, "remote": None} for row in rows]
        page = cut_page(rows, query.limit, itemgetter("quarantine_id"))
        return list_response(query, "entries", page, request.path)

    @Endpoint("GET", ENTRY_PATH, QuarantinedBytes, problems=(ProblemType.UNKNOWN_ENTRY,))
    async def get_quarantined_body(self, request: web.Request, _query: Query) -> web.Response:
        """Get one quarantined body, byte for byte."""
        entry, body = await find_entry(request, self._pool)
        if not has_scope(request, "read:bodies"):
            return _entry_response({**entry, "remote": None}, None)
        return _entry_response(entry, body)

    @Endpoint(
        "POST",
        f"{ENTRY_PATH}/retry",
        Receipt,
        scope="admin",
        problems=(ProblemType.UNKNOWN_ENTRY, ProblemType.NOT_OPEN, ProblemType.NOT_UNDERSTOOD),
    )
    async def retry_quarantined_body(self, request: web.Request, _query: Query) -> web.Response:
        """Retry a quarantined body: record it as a report.

        A second retry gets the same receipt and records nothing.
        """
        entry, body = await find_entry(request, self._pool)
        return json_response(await retry_entry(self._recorder, entry, body, admission(request).actor))

    @Endpoint(
        "POST",
        f"{ENTRY_PATH}/discard",
        QuarantinedBytes,
        scope="admin",
        body=DiscardRequest,
        problems=(ProblemType.UNKNOWN_ENTRY, ProblemType.NOT_OPEN),
    )
    async def discard_quarantined_body(self, request: web.Request, _query: Query) -> web.Response:
        """Discard a quarantined body with a reason. It stays in the quarantine."""
        entry, _ = await find_entry(request, self._pool)
        try:
            reason = DiscardRequest.model_validate_json(await read_body(request)).reason
        except ValidationError:
            raise ProblemError(ProblemType.BAD_BODY, 'the body must be {"reason": "..."}') from None
        return _entry_response(*await discard_entry(self._pool, entry, reason, admission(request).actor))


async def retry_entry(recorder: Recorder, entry: QuarantinedBody, body: bytes | None, actor: Actor) -> Receipt:
    """Record a quarantined body as a report, and return the receipt; see ``quarantine.retry``.

    Raises:
        ProblemError: 422, it is still unparseable; 409, it was discarded; 404, there is no such entry.
    """
    try:
        return await quarantine.retry(recorder, entry, body, actor)
    except UnreadableError as error:
        raise ProblemError(ProblemType.NOT_UNDERSTOOD, str(error)) from None
    except UnrecordableReportError:
        raise ProblemError(ProblemType.NOT_UNDERSTOOD, "the report cannot be recorded") from None
    except NotOpenError as error:
        raise ProblemError(ProblemType.NOT_OPEN, str(error)) from None
    except UnknownEntryError as error:
        raise ProblemError(ProblemType.UNKNOWN_ENTRY, str(error)) from None


async def discard_entry(
    pool: ConnectionPool, entry: QuarantinedBody, reason: str, actor: Actor
) -> tuple[QuarantinedBody, bytes | None]:
    """Discard an open entry, and return it with its body; see ``quarantine.discard``.

    Raises:
        ProblemError: 400, the reason is invalid; 409, the entry is not open.
    """
    try:
        async with pool.connection() as connection:
            await quarantine.discard(connection, entry["quarantine_id"], reason, actor)
            return await quarantine.find_entry(connection, entry["quarantine_id"])
    except ValueError as error:
        raise ProblemError(ProblemType.BAD_BODY, str(error)) from None
    except NotOpenError as error:
        raise ProblemError(ProblemType.NOT_OPEN, str(error)) from None


async def find_entry(request: web.Request, pool: ConnectionPool) -> tuple[QuarantinedBody, bytes | None]:
    """Return the entry that a request's path names, and its body.

    Raises:
        ProblemError: 404, the quarantine has no such entry; 400, the path is malformed.
    """
    segment = request.match_info["quarantine_id"]
    quarantine_id = parse_number(segment)
    if not quarantine_id:
        decode_path(request.raw_path.partition("?")[0])
        raise ProblemError(ProblemType.UNKNOWN_ENTRY, f"the quarantine has no entry {segment}")
    try:
        async with pool.connection() as connection:
            return await quarantine.find_entry(connection, quarantine_id)
    except UnknownEntryError as error:
        raise ProblemError(ProblemType.UNKNOWN_ENTRY, str(error)) from None


def _entry_response(entry: QuarantinedBody, body: bytes | None) -> web.Response:
    body_base64 = b64encode(body).decode() if body is not None else None
    entry_with_bytes: QuarantinedBytes = {**entry, "body_base64": body_base64}
    return json_response(entry_with_bytes)
