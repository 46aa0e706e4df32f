"""The pages: an overview, orders, one order and its reports, the documentation; and the key for them."""

import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, Literal
from urllib.parse import parse_qs, urlencode

from aiohttp import hdrs, web
from pydantic import Field

from domain.statuses import STATUSES, Status
from domain.transitions import Verdict
from projections import current_status, timeline
from projections.current_status import OrderRow, OrdersFilter
from projections.engine import Projector
from service import event_store
from service.api_keys import KEY_COOKIE, OWN_SITE, Access
from service.database import Connection, Pool, borrowed
from service.http_server import read_body
from service.lists import POSITION_MAX, encode_cursor
from service.page import documentation, drawing
from service.page.history import NotKnownThenError, history
from service.page.overview import COUNTED_MAX, DAYS_SHOWN, LISTED_MAX, STUCK_DAYS, overview
from service.page.rendering import asset_answer, language_of, page, track_path, wants_html, written
from service.page.words import IN_ALL
from service.problems import Handler, Kind, ProblemError, problem_of, set_aside, unavailable
from service.queries import Cursor, Position, Query, Text, order_no_of, path_of, read_query

# How long a page that is made live waits for the views to have what it was told of.
AFTER_POSITION_SECONDS_MAX: Final = 5.0
ORDERS_SHOWN_MAX: Final = 50
# What somebody should look at.
FILTERED_VERDICTS: Final[tuple[Verdict, ...]] = ("refused", "unrecognised")
# A key that is revoked is refused wherever it is kept.
KEY_COOKIE_SECONDS: Final = 90 * 86_400
KEY_CHARACTERS_MAX: Final = 200
FORM_FIELDS_MAX: Final = 8
# Eighteen digits are a bigint, whatever they are.
# Two slashes, or what a browser takes for one, would begin the name of another host.
_OWN_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x7e]*", re.ASCII)
_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)

Show = Callable[[web.Request], Awaitable[web.Response]]
Language = Literal["id", "en"]


class PageQuery(Query):
    """What every page takes. ``after_position``: the views are waited for, as a page made live asks."""

    lang: Language | None = None
    after_position: Position | None = None


class OrdersPageQuery(PageQuery):
    """Orders: found by a number, or a list."""

    q: Text | None = None
    status: Status | None = None
    verdict: Verdict | None = None
    stuck: Literal["1"] | None = None
    cursor: Cursor | None = None


class OrderPageQuery(PageQuery):
    """One order: as it was known at a version; its entries below another."""

    version: Annotated[int, Field(ge=1, le=POSITION_MAX)] | None = None
    before: Annotated[int, Field(ge=1, le=POSITION_MAX)] | None = None


class Pages:
    """Draws pages.

    Args:
        pool: where its connections come from.
        access: who may read.
        projectors: of the views, by name.
        seconds_max: how long one page may take, the wait for a position not included.
        document: the OpenAPI document.
    """

    def __init__(
        self,
        pool: Pool,
        access: Access,
        projectors: Mapping[str, Projector],
        seconds_max: float,
        document: Mapping[str, Any],
    ) -> None:
        self._pool = pool
        self._access = access
        self._projectors = projectors
        self._seconds_max = seconds_max
        self._operations = documentation.operations(document)
        self._schemas = documentation.schemas(document)

    def routes(self) -> list[web.RouteDef]:
        """The pages; what makes them and the documentation are open, as the program itself is."""
        order = "/track/{order_no:[^/]+}"
        return [
            web.get("/", self._reading(self.show_overview)),
            web.get("/track", self._reading(self.list_orders)),
            web.get(order, self._reading(self.show_order)),
            web.get(f"{order}/reports/{{version:[^/]+}}", self._reading(self.show_report)),
            web.get("/docs", _drawn(self.show_documentation)),
            web.get("/static/{name}", self.show_asset),
            web.post("/session", _drawn(self.begin_session)),
        ]

    def _reading(self, show: Show) -> Handler:
        """Ask for a key first; a person is asked for it by a form."""
        guarded = _drawn(self._access.requires("read", show))
        guarded.scope = "read"  # type: ignore[attr-defined]  # told to whoever walks the routes
        return guarded

    async def show_overview(self, request: web.Request) -> web.Response:
        """How many orders stand where, what came of late, and what somebody should look at."""
        await self._wait_for(read_query(PageQuery, request), *self._projectors)
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
        await self._wait_for(query, current_status.NAME)
        before = POSITION_MAX if query.cursor is None else query.cursor
        async with borrowed(self._pool, self._seconds_max) as connection:
            if query.q is not None:
                rows = await _found(connection, query.q)
            else:
                stuck_since = datetime.now(UTC) - timedelta(days=STUCK_DAYS) if query.stuck else None
                wanted = OrdersFilter(status=query.status, verdict=query.verdict, unmoved_since=stuck_since)
                rows = await current_status.orders_page(connection, before, wanted, ORDERS_SHOWN_MAX + 1)
        if query.q is not None and len(rows) == 1:
            return _see_other(track_path(rows[0].order_no))
        orders = rows[:ORDERS_SHOWN_MAX]
        words = IN_ALL[language_of(request)]
        asked = {name: value for name, value in request.query.items() if name in ("status", "verdict", "stuck")}
        onward = None
        if len(rows) > len(orders) and query.q is None:
            cursor = encode_cursor(orders[-1].first_position)
            onward = f"/track?{urlencode({**asked, 'cursor': cursor})}"
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
            onward=onward,
            filters=[
                (name, f"/track?{urlencode(by)}" if by else "/track", by == asked) for name, by in filters
            ],
        )

    async def show_order(self, request: web.Request) -> web.Response:
        """One order, as it is known now or as it was known at a version."""
        order_no = order_no_of(request)
        query = read_query(OrderPageQuery, request)
        await self._wait_for(query, current_status.NAME, timeline.NAME)
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
        read_query(PageQuery, request)
        asked = request.match_info["version"]
        version = int(asked) if _VERSION.fullmatch(asked) else 0
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

    async def show_documentation(self, request: web.Request) -> web.Response:
        """The HTTP contract, drawn from the OpenAPI document."""
        read_query(PageQuery, request)
        return page(
            request,
            "docs.html",
            "/docs",
            area="docs",
            operations=self._operations,
            schemas=self._schemas,
            problems=documentation.PROBLEM_KINDS,
        )

    async def show_asset(self, request: web.Request) -> web.Response:
        """A file that pages are made with."""
        return asset_answer(request, request.match_info["name"])

    async def begin_session(self, request: web.Request) -> web.Response:
        """Keep a key in a cookie that no script can read, or forget it; then go on to what was asked for."""
        if request.headers.get("Sec-Fetch-Site", "none") not in OWN_SITE:
            raise ProblemError(Kind.FORBIDDEN, "another site's page may not ask for this")
        try:
            form = parse_qs((await read_body(request)).decode(), max_num_fields=FORM_FIELDS_MAX)
        except ValueError:
            raise ProblemError(Kind.BAD_BODY, "the body is no form") from None
        if "forget" in form:
            response = _see_other("/")
            response.del_cookie(KEY_COOKIE, path="/", httponly=True, samesite="Strict")
            return response
        key = form.get("key", [""])[0].strip()
        onward = _own_path(form.get("next", ["/"])[0])
        if len(key) > KEY_CHARACTERS_MAX or not await self._access.is_valid(key):
            return _key_form(request, onward, is_wrong=True)
        response = _see_other(onward)
        response.set_cookie(
            KEY_COOKIE,
            key,
            max_age=KEY_COOKIE_SECONDS,
            path="/",
            secure=_came_by_tls(request),
            httponly=True,
            samesite="Strict",
        )
        return response

    async def _wait_for(self, query: PageQuery, *views: str) -> None:
        for name in views:
            projector = self._projectors[name]
            if projector.is_outdated:
                raise unavailable(f"the view {name} is being rebuilt")
            position = query.after_position
            if position and not await projector.reached(position, AFTER_POSITION_SECONDS_MAX):
                raise unavailable(f"the view {name} has not come to position {position} yet")


async def _found(connection: Connection, q: str) -> list[OrderRow]:
    """Return the order of a number and the orders of an airway bill; spaces around it count, then do not."""
    for asked in dict.fromkeys((q, q.strip())):
        by_number = await current_status.orders_by_number(connection, [asked])
        wanted = OrdersFilter(cnote=asked)
        by_cnote = await current_status.orders_page(connection, POSITION_MAX, wanted, ORDERS_SHOWN_MAX)
        if found := {**by_number, **{row.order_no: row for row in by_cnote}}:
            return [*found.values()]
    return []


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
        response = _key_form(request, _own_path(request.raw_path), is_wrong=False)
    else:
        t = IN_ALL[language_of(request)].t
        response = page(
            request,
            "problem.html",
            "/",
            status=problem.status,
            title=t.get(f"problem_{problem.status}", t["problem_other"]),
            detail=problem.detail,
        )
    response.headers.update(problem.headers)
    return response


def _came_by_tls(request: web.Request) -> bool:
    """Tell by what a proxy says, whoever it is: who says it falsely keeps its own key from its own service."""
    return request.headers.get("X-Forwarded-Proto", request.scheme) == "https"


def _key_form(request: web.Request, onward: str, *, is_wrong: bool) -> web.Response:
    return page(request, "key.html", "/", status=401, next=onward, is_wrong=is_wrong)


def _own_path(path: str) -> str:
    """Return a path and query of this service, the root where it could lead elsewhere."""
    return path if _OWN_PATH.fullmatch(path) else "/"


def _see_other(path: str) -> web.Response:
    return web.Response(status=303, headers={"Server": "order-tracking", hdrs.LOCATION: path})
