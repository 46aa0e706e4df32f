"""The quarantine over HTTP: what is in it, and what to do with it."""

import re
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Final

from aiohttp import web
from pydantic import BaseModel, ConfigDict, ValidationError

from service import quarantine, representations
from service.api_keys import Access
from service.database import Pool, borrowed
from service.http_server import read_body
from service.pages import POSITION_MAX, encode_cursor, list_answer
from service.parser import UnreadableError
from service.problems import ProblemError, answer
from service.quarantine import NotOpenError, QuarantineEntry, UnknownEntryError
from service.queries import QuarantineQuery, Query, decoded, read_query
from service.recorder import Recorder, RefusedReportError

_ID: Final = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)


class _Discarding(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    reason: str


class QuarantineApi:
    """Shows and empties the quarantine.

    Args:
        pool: where its connections come from.
        access: who may.
        recorder: for what can be understood by now.
        seconds_max: how long one request may take.
    """

    def __init__(self, pool: Pool, access: Access, recorder: Recorder, seconds_max: float) -> None:
        self._pool = pool
        self._access = access
        self._recorder = recorder
        self._seconds_max = seconds_max

    def routes(self) -> list[web.RouteDef]:
        """Whoever may read sees it; what becomes of an entry is for who may operate."""
        entry = "/quarantine/{quarantine_id}"
        return [
            web.get("/quarantine", self._access.requires("read", self.list_entries)),
            web.get(entry, self._access.requires("read", self.show_entry)),
            web.post(f"{entry}/retry", self._access.requires("admin", self.retry)),
            web.post(f"{entry}/discard", self._access.requires("admin", self.discard)),
        ]

    async def list_entries(self, request: web.Request) -> web.Response:
        """A page of what could not be understood, newest first."""
        query = read_query(QuarantineQuery, request)
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with borrowed(self._pool, self._seconds_max) as connection:
            rows = await quarantine.entries_page(connection, before, query.state, query.limit + 1)
        page = rows[: query.limit]
        onward = encode_cursor(page[-1].quarantine_id) if len(rows) > len(page) else None
        return list_answer(
            "entries",
            [representations.quarantine_entry(row) for row in page],
            request.path,
            query,
            cursor=onward,
        )

    async def show_entry(self, request: web.Request) -> web.Response:
        """One body that could not be understood, byte for byte."""
        read_query(Query, request)
        return answer(representations.quarantine_entry(await self._entry(request)))

    async def retry(self, request: web.Request) -> web.Response:
        """Record an entry as an ordinary report, now that it is understood; again, it gets the same receipt."""
        entry = await self._entry(request)
        try:
            receipt = await self._recorder.record(quarantine.report_of(entry), datetime.now(UTC))
        except UnreadableError as error:
            raise ProblemError(422, "Still not understood", str(error)) from None
        except RefusedReportError:
            raise ProblemError(422, "Still not understood", "it cannot be recorded") from None
        except NotOpenError as error:
            raise ProblemError(409, "Not open", str(error)) from None
        return answer({**asdict(receipt), "quarantine_id": entry.quarantine_id})

    async def discard(self, request: web.Request) -> web.Response:
        """Say of an entry that nothing will come of it, and why."""
        entry = await self._entry(request)
        try:
            why = _Discarding.model_validate_json(await read_body(request)).reason
        except ValidationError:
            raise ProblemError(400, "Bad body", 'the body must be {"reason": "..."}') from None
        try:
            async with borrowed(self._pool, self._seconds_max) as connection:
                await quarantine.discard(connection, entry.quarantine_id, why)
                entry = await quarantine.find_entry(connection, entry.quarantine_id)
        except ValueError as error:
            raise ProblemError(400, "Bad body", str(error)) from None
        except NotOpenError as error:
            raise ProblemError(409, "Not open", str(error)) from None
        return answer(representations.quarantine_entry(entry))

    async def _entry(self, request: web.Request) -> QuarantineEntry:
        wanted = request.match_info["quarantine_id"]
        if not _ID.fullmatch(wanted):
            decoded(request.raw_path.partition("?")[0])
            raise ProblemError(404, "Unknown entry", f"the quarantine has no entry {wanted}")
        try:
            async with borrowed(self._pool, self._seconds_max) as connection:
                return await quarantine.find_entry(connection, int(wanted))
        except UnknownEntryError as error:
            raise ProblemError(404, "Unknown entry", str(error)) from None
