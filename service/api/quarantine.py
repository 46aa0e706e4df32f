"""The quarantine over HTTP: what is in it, and what to do with it."""

from dataclasses import asdict
from datetime import UTC, datetime
from operator import attrgetter
from typing import Final

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from service.api import representations
from service.database.connections import Pool, borrowed
from service.http.endpoints import Endpoint
from service.http.pagination import POSITION_MAX, cut, list_answer
from service.http.parameters import QuarantineQuery, Query, decoded, number_of
from service.http.problems import Kind, ProblemError, answer
from service.http.server import read_body
from service.ingest import quarantine
from service.ingest.parser import UnreadableError
from service.ingest.quarantine import NotOpenError, QuarantineEntry, UnknownEntryError
from service.ingest.recorder import Recorder, RefusedReportError

ENTRY_PATH: Final = "/quarantine/{quarantine_id}"


class Discarding(BaseModel):
    """Why nothing will come of an entry."""

    model_config = ConfigDict(extra="forbid", strict=True)

    reason: str = Field(min_length=1, max_length=quarantine.WHY_CHARACTERS_MAX)


class QuarantineApi:
    """Shows and empties the quarantine.

    Args:
        pool: where its connections come from.
        recorder: for what can be understood by now.
        seconds_max: how long one request may take.
    """

    def __init__(self, pool: Pool, recorder: Recorder, seconds_max: float) -> None:
        self._pool = pool
        self._recorder = recorder
        self._seconds_max = seconds_max

    @Endpoint("GET", "/quarantine", representations.QuarantineEntries, query=QuarantineQuery)
    async def list_entries(self, request: web.Request, query: QuarantineQuery) -> web.Response:
        """A page of what could not be understood, newest first."""
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with borrowed(self._pool, self._seconds_max) as connection:
            rows = await quarantine.entries_page(connection, before, query.state, query.limit + 1)
        page, onward = cut(rows, query.limit, attrgetter("quarantine_id"))
        return list_answer(
            "entries",
            [representations.quarantine_entry(row) for row in page],
            request.path,
            query,
            cursor=onward,
        )

    @Endpoint("GET", ENTRY_PATH, representations.QuarantineEntry, problems=(Kind.UNKNOWN_ENTRY,))
    async def show_entry(self, request: web.Request, _query: Query) -> web.Response:
        """One body that could not be understood, byte for byte."""
        return answer(
            representations.quarantine_entry(
                await entry_of(request, self._pool, self._seconds_max), with_body=True
            )
        )

    @Endpoint(
        "POST",
        f"{ENTRY_PATH}/retry",
        representations.Receipt,
        scope="admin",
        problems=(Kind.UNKNOWN_ENTRY, Kind.NOT_OPEN, Kind.NOT_UNDERSTOOD),
    )
    async def retry(self, request: web.Request, _query: Query) -> web.Response:
        """Record an entry as an ordinary report, now that it is understood; again, it gets the same receipt."""
        entry = await entry_of(request, self._pool, self._seconds_max)
        try:
            receipt = await self._recorder.record(quarantine.report_of(entry), datetime.now(UTC))
        except UnreadableError as error:
            raise ProblemError(Kind.NOT_UNDERSTOOD, str(error)) from None
        except RefusedReportError:
            raise ProblemError(Kind.NOT_UNDERSTOOD, "it cannot be recorded") from None
        except NotOpenError as error:
            raise ProblemError(Kind.NOT_OPEN, str(error)) from None
        except UnknownEntryError as error:
            raise ProblemError(Kind.UNKNOWN_ENTRY, str(error)) from None
        return answer({**asdict(receipt), "quarantine_id": entry.quarantine_id})

    @Endpoint(
        "POST",
        f"{ENTRY_PATH}/discard",
        representations.QuarantineEntry,
        scope="admin",
        body=Discarding,
        problems=(Kind.UNKNOWN_ENTRY, Kind.NOT_OPEN),
    )
    async def discard(self, request: web.Request, _query: Query) -> web.Response:
        """Say of an entry that nothing will come of it, and why."""
        entry = await entry_of(request, self._pool, self._seconds_max)
        try:
            why = Discarding.model_validate_json(await read_body(request)).reason
        except ValidationError:
            raise ProblemError(Kind.BAD_BODY, 'the body must be {"reason": "..."}') from None
        try:
            async with borrowed(self._pool, self._seconds_max) as connection:
                await quarantine.discard(connection, entry.quarantine_id, why)
                entry = await quarantine.find_entry(connection, entry.quarantine_id)
        except ValueError as error:
            raise ProblemError(Kind.BAD_BODY, str(error)) from None
        except NotOpenError as error:
            raise ProblemError(Kind.NOT_OPEN, str(error)) from None
        return answer(representations.quarantine_entry(entry, with_body=True))


async def entry_of(request: web.Request, pool: Pool, seconds_max: float) -> QuarantineEntry:
    """Return the entry that a request's path names, with its body.

    Raises:
        ProblemError: 404, there is none; 400, the path is broken.
    """
    wanted = request.match_info["quarantine_id"]
    quarantine_id = number_of(wanted)
    if not quarantine_id:
        decoded(request.raw_path.partition("?")[0])
        raise ProblemError(Kind.UNKNOWN_ENTRY, f"the quarantine has no entry {wanted}")
    try:
        async with borrowed(pool, seconds_max) as connection:
            return await quarantine.find_entry(connection, quarantine_id)
    except UnknownEntryError as error:
        raise ProblemError(Kind.UNKNOWN_ENTRY, str(error)) from None
