"""Contradictions over HTTP: the refused reports, and what operators did about them."""

from operator import itemgetter

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections import timeline
from projections.windows import POSITION_MAX
from service.api.freshness import wait_for
from service.database.connections import ConnectionPool
from service.database.operations import REASON_CHARACTERS_MAX, Actor
from service.event_log import contradictions
from service.event_log.contradictions import AlreadyHandledError, Contradiction, UnknownContradictionError
from service.http.access import admission
from service.http.body import read_body
from service.http.endpoints import Endpoint, Tag
from service.http.pagination import cut_page, list_response
from service.http.parameters import PageQuery, Query, ViewQuery, parse_number, parse_order_no
from service.http.problems import ProblemError, ProblemType
from service.http.responses import json_response
from service.projecting.position import ViewPositions


class ContradictionPage(TypedDict):
    """A page of contradictions."""

    contradictions: list[Contradiction]
    next: str | None


class ContradictionsQuery(ViewQuery, PageQuery):
    """The filter of contradictions."""

    handled: bool | None = Field(
        default=None, description="false for those that await an operator, true for the others"
    )


class HandleRequest(BaseModel):
    """What an operator did about a contradiction."""

    model_config = ConfigDict(extra="forbid", strict=True)

    note: str = Field(min_length=1, max_length=REASON_CHARACTERS_MAX)


class ContradictionsApi:
    """Serves contradictions.

    Args:
        pool: the connections to read with.
        positions: how far each view has come.
    """

    tag = Tag("contradictions", "Refused reports, and how operators handled them.")

    def __init__(self, pool: ConnectionPool, positions: ViewPositions) -> None:
        self._pool = pool
        self._positions = positions

    @Endpoint("GET", "/contradictions", ContradictionPage, query=ContradictionsQuery)
    async def list_contradictions(self, request: web.Request, query: ContradictionsQuery) -> web.Response:
        """List the refused reports, newest first, and how each was handled."""
        await wait_for(self._positions, query.after_position, timeline.VIEW.name)
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with self._pool.connection() as connection:
            window = await contradictions.contradictions_page(
                connection, before, query.limit + 1, handled=query.handled
            )
        page = cut_page(window.rows, query.limit, itemgetter("position"), window.reached)
        return list_response(query, "contradictions", page, request.path)

    @Endpoint(
        "POST",
        "/orders/{order_no}/contradictions/{version}/handle",
        Contradiction,
        scope="admin",
        body=HandleRequest,
        problems=(ProblemType.UNKNOWN_CONTRADICTION, ProblemType.ALREADY_HANDLED),
    )
    async def handle_contradiction(self, request: web.Request, _query: Query) -> web.Response:
        """Mark a refused report as handled, with a note; the event and its verdict stay."""
        try:
            note = HandleRequest.model_validate_json(await read_body(request)).note
        except ValidationError:
            raise ProblemError(ProblemType.BAD_BODY, 'the body must be {"note": "..."}') from None
        return json_response(await handle(self._pool, self._positions, request, note, admission(request).actor))


async def handle(
    pool: ConnectionPool, positions: ViewPositions, request: web.Request, note: str, actor: Actor
) -> Contradiction:
    """Handle the contradiction that a request's path names.

    Raises:
        ProblemError: 404, there is none; 409, it was handled before; 400, the note is invalid; 503, the view
            timeline is being rebuilt.
    """
    order_no = parse_order_no(request)
    segment = request.match_info["version"]
    version = parse_number(segment)
    if not version:
        detail = f"{order_no} has no refused report with the version {segment}"
        raise ProblemError(ProblemType.UNKNOWN_CONTRADICTION, detail)
    await wait_for(positions, None, timeline.VIEW.name)
    try:
        async with pool.connection() as connection:
            return await contradictions.handle_contradiction(connection, order_no, version, note, actor)
    except ValueError as error:
        raise ProblemError(ProblemType.BAD_BODY, str(error)) from None
    except UnknownContradictionError as error:
        raise ProblemError(ProblemType.UNKNOWN_CONTRADICTION, str(error)) from None
    except AlreadyHandledError as error:
        raise ProblemError(ProblemType.ALREADY_HANDLED, str(error)) from None
