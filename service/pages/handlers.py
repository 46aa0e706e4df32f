"""The pages: an overview, orders, one order and its reports, the documentation; and the key for them."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from operator import attrgetter
from typing import Annotated, Final, Literal, get_args
from urllib.parse import urlencode

from aiohttp import web
from pydantic import Field

from domain.statuses import STATUSES, Status
from domain.transitions import Verdict
from projections import current_status, timeline
from projections.current_status import OrderRow, OrdersFilter
from projections.engine import Projector
from service.api.freshness import wait_for
from service.api.quarantine import entry_of
from service.database.connections import Connection, Pool, borrowed
from service.event_log import store as event_store
from service.http.access import Access
from service.http.pagination import POSITION_MAX, cut, following
from service.http.parameters import Cursor, Position, Query, Text, number_of, order_no_of, path_of, read_query
from service.http.problems import Handler, Kind, ProblemError, problem_of, set_aside
from service.http.request_ids import request_id_of
from service.ingest import quarantine
from service.ingest.quarantine import QuarantineState
from service.pages import drawing
from service.pages.i18n import IN_ALL, Language
from service.pages.order import NotKnownThenError, history
from service.pages.overview import COUNTED_MAX, DAYS_SHOWN, LISTED_MAX, STUCK_DAYS, overview
from service.pages.render import (
    asset_answer,
    hex_dump,
    language_of,
    page,
    readable,
    track_path,
    wants_html,
    written,
)
from service.pages.session import Sessions, key_form, own_path, see_other

ROWS_SHOWN_MAX: Final = 50
# What somebody should look at.
FILTERED_VERDICTS: Final[tuple[Verdict, ...]] = ("refused", "unrecognised")
# An entry's body is shown up to here; all of it is in the API's answer and on the command line.
BODY_SHOWN_BYTES_MAX: Final = 65_536

Show = Callable[[web.Request], Awaitable[web.Response]]


class ShownQuery(Query):
    """What every page takes. ``after_position``: the views are waited for, as a page made live asks."""

    lang: Language | None = None
    after_position: Position | None = None


class OrdersPageQuery(ShownQuery):
    """Orders: found by a number, or a list."""

    q: Text | None = None
    status: Status | None = None
    verdict: Verdict | None = None
    stuck: Literal["1"] | None = None
    cursor: Cursor | None = None


class OrderPageQuery(ShownQuery):
    """One order: as it was known at a version; its entries below another."""

    version: Annotated[int, Field(ge=1, le=POSITION_MAX)] | None = None
    before: Annotated[int, Field(ge=1, le=POSITION_MAX)] | None = None


class QuarantinePageQuery(ShownQuery):
    """What could not be understood, of one state or all."""

    state: QuarantineState | None = None
    cursor: Cursor | None = None


class Pages:
    """Draws pages.

    Args:
        pool: where its connections come from.
        access: who may read.
        projectors: of the views, by name.
        seconds_max: how long one page may take, the wait for a position not included.
    """

    def __init__(
        self,
        pool: Pool,
        access: Access,
        projectors: Mapping[str, Projector],
        seconds_max: float,
    ) -> None:
        self._pool = pool
        self._access = access
        self._sessions = Sessions(access)
        self._projectors = projectors
        self._seconds_max = seconds_max

    def routes(self) -> list[web.RouteDef]:
        """The pages; what makes them and the documentation are open, as the program itself is."""
        order = "/track/{order_no:[^/]+}"
        return [
            web.get("/", self._reading(self.show_overview)),
            web.get("/track", self._reading(self.list_orders)),
            web.get(order, self._reading(self.show_order)),
            web.get(f"{order}/reports/{{version:[^/]+}}", self._reading(self.show_report)),
            web.get("/quarantined", self._reading(self.list_quarantined)),
            web.get("/quarantined/{quarantine_id:[^/]+}", self._reading(self.show_quarantined)),
            web.get("/static/{name}", self.show_asset),
            web.post("/session", _drawn(self._sessions.begin)),
        ]

    def _reading(self, show: Show) -> Handler:
        """Ask for a key first; a person is asked for it by a form."""
        guarded = _drawn(self._access.requires("read", show))
        guarded.scope = "read"  # type: ignore[attr-defined]  # told to whoever walks the routes
        return guarded

    async def show_overview(self, request: web.Request) -> web.Response:
        """How many orders stand where, what came of late, and what somebody should look at."""
        query = read_query(ShownQuery, request)
        await wait_for(self._projectors, query.after_position, *self._projectors)
        async with borrowed(self._pool, self._seconds_max) as connection:
            known = await overview(connection, self._projectors, datetime.now(UTC))
        return page(
            request,
            "overview.html",
            "/",
            area="overview",
            stream=f"/events/stream?brief=true&after={known.head}",
            o=known,
            counted_max=COUNTED_MAX,
            listed_max=LISTED_MAX,
            stuck_days=STUCK_DAYS,
            days_shown=DAYS_SHOWN,
            **drawing.plots_of(known, IN_ALL[language_of(request)]),
        )

    async def list_orders(self, request: web.Request) -> web.Response:
        """Orders by number or airway bill, straight to the one where there is only one; else a list."""
        query = read_query(OrdersPageQuery, request)
        await wait_for(self._projectors, query.after_position, current_status.NAME)
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with borrowed(self._pool, self._seconds_max) as connection:
            if query.q is not None:
                rows = await _found(connection, query.q)
            else:
                stuck_since = datetime.now(UTC) - timedelta(days=STUCK_DAYS) if query.stuck else None
                wanted = OrdersFilter(status=query.status, verdict=query.verdict, unmoved_since=stuck_since)
                rows = await current_status.orders_page(connection, before, wanted, ROWS_SHOWN_MAX + 1)
        if query.q is not None and len(rows) == 1:
            return see_other(track_path(rows[0].order_no))
        orders, last = cut(rows, ROWS_SHOWN_MAX, attrgetter("first_position"))
        words = IN_ALL[language_of(request)]
        asked = {name: value for name, value in request.query.items() if name in ("status", "verdict", "stuck")}
        filters: list[tuple[str, dict[str, str]]] = [
            (words.t["all_orders"], {}),
            (words.t["stuck_orders"], {"stuck": "1"}),
            *((words.t[verdict], {"verdict": str(verdict)}) for verdict in FILTERED_VERDICTS),
            *((words.status(status), {"status": str(status)}) for status in STATUSES),
        ]
        return page(
            request,
            "orders.html",
            "/track",
            status=200 if orders or query.q is None else 404,
            area="orders",
            q=query.q or "",
            orders=orders,
            onward=following("/track", query, cursor=None if query.q is not None else last),
            filters=_links("/track", filters, asked),
        )

    async def show_order(self, request: web.Request) -> web.Response:
        """One order, as it is known now or as it was known at a version."""
        order_no = order_no_of(request)
        query = read_query(OrderPageQuery, request)
        await wait_for(self._projectors, query.after_position, current_status.NAME, timeline.NAME)
        async with borrowed(self._pool, self._seconds_max) as connection:
            try:
                known = await history(connection, order_no, query.version, query.before)
            except NotKnownThenError as error:
                raise ProblemError(Kind.NOT_KNOWN_THEN, str(error)) from None
            if known is None and await current_status.is_set_aside(connection, order_no):
                raise set_aside(f"{order_no} is set aside from its first event on")
        if known is None:
            raise ProblemError(Kind.UNKNOWN_ORDER, f"nothing was reported of {order_no}")
        return page(
            request,
            "order.html",
            track_path(order_no),
            area="orders",
            stream=f"{path_of(order_no, 'stream')}?after={known.row.position}",
            order_no=order_no,
            written=written(order_no),
            h=known,
            before=query.before,
        )

    async def show_report(self, request: web.Request) -> web.Response:
        """One report of an order: its text as it was received, and what was recorded of it."""
        order_no = order_no_of(request)
        read_query(ShownQuery, request)
        version = number_of(request.match_info["version"])
        async with borrowed(self._pool, self._seconds_max) as connection:
            found = await event_store.read_stream(connection, order_no, max(0, version - 1), 1)
        if not found or found[0].version != version:
            raise ProblemError(Kind.NOT_KNOWN_THEN, f"{order_no} has no such version")
        (recorded,) = found
        fields = event_store.plain_fields(recorded.state) or {}
        body = fields.pop("body", "")
        first = {"position": recorded.position, "recorded_at": recorded.recorded_at.isoformat()}
        return page(
            request,
            "report.html",
            f"{track_path(order_no)}/reports/{version}",
            area="orders",
            order_no=order_no,
            version=version,
            body=body,
            verdict=fields.get("verdict"),
            fields=[*first.items(), *fields.items()],
        )

    async def list_quarantined(self, request: web.Request) -> web.Response:
        """What could not be understood, newest first."""
        query = read_query(QuarantinePageQuery, request)
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with borrowed(self._pool, self._seconds_max) as connection:
            rows = await quarantine.entries_page(connection, before, query.state, ROWS_SHOWN_MAX + 1)
        entries, last = cut(rows, ROWS_SHOWN_MAX, attrgetter("quarantine_id"))
        t = IN_ALL[language_of(request)].t
        states = get_args(QuarantineState)
        filters = [(t["all_entries"], {}), *((t[f"entry_{state}"], {"state": state}) for state in states)]
        return page(
            request,
            "quarantined.html",
            "/quarantined",
            area="overview",
            entries=entries,
            onward=following("/quarantined", query, cursor=last),
            filters=_links("/quarantined", filters, {"state": query.state} if query.state else {}),
        )

    async def show_quarantined(self, request: web.Request) -> web.Response:
        """One body that could not be understood, and what can be done with it."""
        read_query(ShownQuery, request)
        entry = await entry_of(request, self._pool, self._seconds_max)
        shown = (entry.body or b"")[:BODY_SHOWN_BYTES_MAX]
        return page(
            request,
            "entry.html",
            f"/quarantined/{entry.quarantine_id}",
            area="overview",
            entry=entry,
            text=readable(shown),
            dump=hex_dump(shown),
            body_bytes=len(entry.body or b""),
            shown_bytes=len(shown),
        )

    async def show_asset(self, request: web.Request) -> web.Response:
        """A file that pages are made with."""
        return asset_answer(request, request.match_info["name"])


async def _found(connection: Connection, q: str) -> list[OrderRow]:
    """Return the order of a number and the orders of an airway bill; spaces around it count, then do not."""
    for asked in dict.fromkeys((q, q.strip())):
        by_number = await current_status.orders_by_number(connection, [asked])
        wanted = OrdersFilter(cnote=asked)
        by_cnote = await current_status.orders_page(connection, POSITION_MAX, wanted, ROWS_SHOWN_MAX)
        if found := {**by_number, **{row.order_no: row for row in by_cnote}}:
            return [*found.values()]
    return []


def _links(
    path: str, filters: Sequence[tuple[str, Mapping[str, str]]], asked: Mapping[str, str]
) -> list[tuple[str, str, bool]]:
    """Return the links of a list's filters: what they are called, where they lead, and whether that is here."""
    return [(name, f"{path}?{urlencode(by)}" if by else path, by == asked) for name, by in filters]


def _drawn(handler: Handler) -> Handler:
    """Answer a person's browser with a page whatever happens; a program gets the problem as it is."""

    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            if not wants_html(request):
                raise
            return _problem_page(request, problem_of(error, request))

    return handle


def _problem_page(request: web.Request, problem: ProblemError) -> web.Response:
    if problem.status == web.HTTPUnauthorized.status_code:
        response = key_form(request, own_path(request.raw_path), is_wrong=False)
    else:
        t = IN_ALL[language_of(request)].t
        response = page(
            request,
            "problem.html",
            "/",
            status=problem.status,
            title=t.get(f"problem_{problem.status}", t["problem_other"]),
            detail=problem.detail,
            request_id=request_id_of(request),
        )
    response.headers.update(problem.headers)
    return response
