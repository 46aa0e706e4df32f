"""The handlers of the pages: each reads its data, and renders it or a problem."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial, wraps
from operator import itemgetter
from typing import Any, Final, NamedTuple, get_args
from urllib.parse import urlencode

from aiohttp import web

from domain.statuses import STATUSES
from projections import current_status, timeline
from projections.windows import POSITION_MAX
from service.api.contradictions import handle as handle_contradiction
from service.api.freshness import wait_for
from service.api.quarantine import discard_entry, find_entry, retry_entry
from service.database.api_keys import Scope
from service.database.connections import ConnectionPool
from service.database.operations import Action, operations_page
from service.event_log import store
from service.event_log.codec import read_fields
from service.event_log.contradictions import contradictions_page
from service.feature import Page, Shown
from service.feature import Pages as OtherPages
from service.features.pages.charts import draw_charts
from service.features.pages.order import read_history
from service.features.pages.orders import (
    ROWS_SHOWN_MAX,
    CommonQuery,
    OrdersPageQuery,
    canonical_path,
    find_exactly,
    read_list,
)
from service.features.pages.overview import COUNTED_MAX, DAYS_SHOWN, LISTED_MAX, STUCK_DAYS, read_overview
from service.features.pages.render import (
    RENDERER,
    accepts_html,
    choose_locale,
    render_page,
    serve_asset,
    track_path,
)
from service.features.pages.session import (
    change_session,
    local_path,
    read_form,
    redirect,
    referring_path,
    render_key_form,
)
from service.features.pages.share_links import EXPIRY_DEFAULT, SETTING, ShareLinks, make_share
from service.features.pages.shares import ShareProblem
from service.http.access import SAFE_METHODS, Access, Handler, admission, has_scope
from service.http.pagination import cut_page
from service.http.parameters import (
    Cursor,
    Version,
    order_path,
    parse_number,
    parse_order_no,
    read_query,
)
from service.http.problems import ProblemError, ProblemType, to_problem
from service.http.request_ids import request_id
from service.http.times import to_rfc3339
from service.ingest import quarantine
from service.ingest.quarantine import QuarantineState
from service.ingest.recorder import Recorder
from service.ingest.refusals import Refusals
from service.projecting.position import ViewPositions
from service.vocabulary import VocabularyFile

# A reason of emoji has twelve bytes for each character in a form.
REASON_FORM_BYTES_MAX: Final = 16 * 1024
Form = Mapping[str, str]

# A longer body is cut off on its page. The API and the command line return it whole.
BODY_SHOWN_BYTES_MAX: Final = 65_536


class OrderPageQuery(CommonQuery):
    """The version that an order is shown at, and the version below which its entries begin."""

    version: Version | None = None
    before: Version | None = None


class ContradictionsPageQuery(CommonQuery):
    """The filter of contradictions; None for all."""

    handled: bool | None = None
    cursor: Cursor = POSITION_MAX


class QuarantinePageQuery(CommonQuery):
    """The filter of the quarantine; None for all states."""

    state: QuarantineState | None = None
    cursor: Cursor = POSITION_MAX


class OperationsPageQuery(CommonQuery):
    """The filter of operators' actions; None for all."""

    action: Action | None = None
    cursor: Cursor = POSITION_MAX


class Pages:
    """The web pages.

    Args:
        pool: the connection pool for reads.
        access: the guard that requires API keys.
        positions: how far each view has come.
        recorder: records retried bodies.
        refusals: the webhooks that got 503.
        vocabulary: the vocabulary.
        links: makes the links for buyers; None if sharing is off.
        others: the pages of other features.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the parts that the pages show
        self,
        pool: ConnectionPool,
        access: Access,
        positions: ViewPositions,
        recorder: Recorder,
        refusals: Refusals,
        vocabulary: VocabularyFile,
        *,
        links: ShareLinks | None,
        others: Sequence[OtherPages] = (),
    ) -> None:
        self._pool = pool
        self._access = access
        self._positions = positions
        self._recorder = recorder
        self._refusals = refusals
        self._vocabulary = vocabulary
        self._links = links
        self._others = others

    def routes(self) -> list[web.RouteDef]:
        """Return the routes. Only the static files and the session need no key."""
        order, entry = "/track/{order_no:[^/]+}", "/quarantined/{quarantine_id:[^/]+}"
        own = [
            Page("GET", "/", "read", self.show_overview, has_query=True),
            Page("GET", "/track", "read", self.list_orders, has_query=True),
            Page("GET", order, "read", self.show_order, has_query=True),
            Page("POST", f"{order}/share", "read", self.share_order),
            Page("GET", f"{order}/reports/{{version:[^/]+}}", "read", self.show_report, has_query=True),
            Page("GET", "/conflicts", "read", self.list_contradictions, has_query=True),
            Page(
                "POST", f"{order}/contradictions/{{version:[^/]+}}/handle", "admin", self.handle_contradiction
            ),
            Page("GET", "/words", "read", self.show_words, has_query=True),
            Page("GET", "/quarantined", "read", self.list_quarantined, has_query=True),
            Page("GET", entry, "read", self.show_quarantined, has_query=True),
            Page("POST", f"{entry}/retry", "admin", self.retry_quarantined),
            Page("POST", f"{entry}/discard", "admin", self.discard_quarantined),
            Page("GET", "/operations", "admin", self.list_operations, has_query=True),
        ]
        pages = [*own, *(page for other in self._others for page in other.pages)]
        return [
            *(
                web.route(
                    page.method,
                    page.path,
                    _with_problem_pages(self._access.require(page.scope, partial(_show_page, page))),
                )
                for page in pages
            ),
            web.get("/static/{name}", serve_asset),
            web.post("/session", _with_problem_pages(partial(change_session, self._access))),
        ]

    async def show_overview(self, request: web.Request, _form: Form) -> Shown | str:
        """Show the overview."""
        query = read_query(CommonQuery, request)
        await wait_for(self._positions, query.after_position, *self._positions)
        async with self._pool.connection() as connection:
            overview = await read_overview(
                connection,
                self._positions,
                request.app[RENDERER].zone,
                datetime.now(UTC),
                self._vocabulary.recognise,
            )
        return _show(
            "overview.html",
            "/",
            stream=f"/events/stream?brief=true&after={overview.head}",
            overview=overview,
            refusal=self._refusals.recent,
            counted_max=COUNTED_MAX,
            listed_max=LISTED_MAX,
            stuck_days=STUCK_DAYS,
            days_shown=DAYS_SHOWN,
            **draw_charts(overview, choose_locale(request)),
        )

    async def list_orders(self, request: web.Request, _form: Form) -> Shown | str:
        """Show a list of orders, or redirect to the only order that a search finds."""
        if (path := canonical_path(request)) is not None:
            return path
        query = read_query(OrdersPageQuery, request)
        await wait_for(self._positions, query.after_position, current_status.VIEW.name)
        now = datetime.now(UTC)
        async with self._pool.connection() as connection:
            found = None if query.q is None else await find_exactly(connection, query.q)
            if found is None:
                found = await read_list(connection, query, now, request.app[RENDERER].zone)
        if query.q is not None and len(found.orders) == 1 and found.next_page is None:
            return track_path(found.orders[0]["order_no"])
        texts = choose_locale(request).texts
        links = [
            (texts["all_orders"], ""),
            (texts["moving_orders"], "settled=false"),
            (texts["stuck_orders"], "stuck=1"),
            (texts["refused"], "verdict=refused"),
        ]
        return _show(
            "orders.html",
            "/track",
            status=200 if found.orders or query.q is None else 404,
            search=query.q or "",
            query=query,
            listed=found,
            statuses=STATUSES,
            filters=_filter_links(request, "/track", links),
        )

    async def show_order(self, request: web.Request, _form: Form) -> Shown | str:
        """Show one order in its current state or at an earlier version."""
        order_no = parse_order_no(request)
        query = read_query(OrderPageQuery, request)
        await wait_for(self._positions, query.after_position, current_status.VIEW.name, timeline.VIEW.name)
        async with self._pool.connection() as connection:
            history = await read_history(connection, order_no, query.version, query.before)
            cards = [
                await other.read_card(connection, request)
                for other in self._others
                if other.read_card is not None
            ]
        position = history.order["position"]
        path, stream = track_path(order_no), f"{order_path(order_no, 'stream')}?after={position}"
        return _show(
            "order.html",
            path,
            stream=stream,
            order_no=order_no,
            history=history,
            before=query.before,
            card_templates=[card.template for card in cards],
            **{name: value for card in cards for name, value in card.variables.items()},
            may_see=has_scope(request, "read:bodies"),
            may_share=self._links is not None,
        )

    async def share_order(self, request: web.Request, _form: Form) -> str:
        """Make a link for the order's buyer, record it, and show the page behind it."""
        order_no = parse_order_no(request)
        if self._links is None:
            raise ProblemError(ShareProblem.SHARING_OFF, f"set {SETTING}, and restart the service")
        async with self._pool.connection() as connection:
            if not await store.read_stream(connection, order_no, 0, 1):
                raise ProblemError(ProblemType.UNKNOWN_ORDER, f"{order_no} has no report", order_no=order_no)
            link = await make_share(connection, self._links, order_no, EXPIRY_DEFAULT, admission(request).actor)
        return link.path

    async def show_report(self, request: web.Request, _form: Form) -> Shown | str:
        """Show the body of one report and the fields of its event."""
        order_no = parse_order_no(request)
        read_query(CommonQuery, request)
        version = parse_number(request.match_info["version"])
        async with self._pool.connection() as connection:
            events = await store.read_stream(connection, order_no, max(0, version - 1), 1)
        if not events or events[0].version != version:
            raise ProblemError(ProblemType.NO_SUCH_VERSION, f"{order_no} has no such version")
        fields = {"position": events[0].position, "recorded_at": to_rfc3339(events[0].recorded_at)}
        fields |= read_fields(events[0].state) or {}
        body = fields.pop("body", "")
        may_see = has_scope(request, "read:bodies")
        if not may_see:
            fields.pop("remote", None)
        path = f"{track_path(order_no)}/reports/{version}"
        return _show(
            "report.html",
            path,
            order_no=order_no,
            version=version,
            body=body if may_see else None,
            fields=fields,
        )

    async def list_contradictions(self, request: web.Request, _form: Form) -> Shown | str:
        """Show a list of contradictions, newest first."""
        query = read_query(ContradictionsPageQuery, request)
        await wait_for(self._positions, query.after_position, timeline.VIEW.name)
        async with self._pool.connection() as connection:
            window = await contradictions_page(
                connection, query.cursor, ROWS_SHOWN_MAX + 1, handled=query.handled
            )
        shown = cut_page(window.rows, ROWS_SHOWN_MAX, itemgetter("position"), window.reached)
        texts = choose_locale(request).texts
        filters = [
            (texts["contradictions_open"], "handled=false"),
            (texts["contradictions_handled"], "handled=true"),
            (texts["all_contradictions"], ""),
        ]
        return _show(
            "contradictions.html",
            "/conflicts",
            contradictions=shown.items,
            next_page=shown.next_path("/conflicts", query),
            filters=_filter_links(request, "/conflicts", filters),
        )

    async def handle_contradiction(self, request: web.Request, form: Form) -> str:
        """Mark a contradiction as handled with the submitted note, and show its order."""
        note = form.get("note", "")
        done = await handle_contradiction(self._pool, self._positions, request, note, admission(request).actor)
        return f"{track_path(done['order_no'])}#v{done['version']}"

    async def show_words(self, request: web.Request, _form: Form) -> Shown | str:
        """Show the unknown words, how to teach them, and the known ones."""
        query = read_query(CommonQuery, request)
        await wait_for(self._positions, query.after_position, timeline.VIEW.name)
        async with self._pool.connection() as connection:
            unrecognised = await timeline.read_unrecognised(connection, self._vocabulary.recognise)
        return _show(
            "words.html",
            "/words",
            unrecognised=unrecognised,
            vocabulary=self._vocabulary,
            statuses=STATUSES,
        )

    async def list_quarantined(self, request: web.Request, _form: Form) -> Shown | str:
        """Show a list of quarantine entries, newest first."""
        query = read_query(QuarantinePageQuery, request)
        async with self._pool.connection() as connection:
            rows = await quarantine.entries_page(connection, query.cursor, query.state, ROWS_SHOWN_MAX + 1)
        entries = cut_page(rows, ROWS_SHOWN_MAX, itemgetter("quarantine_id"))
        texts = choose_locale(request).texts
        filters = [(texts["all_entries"], "")]
        filters += [(texts[f"entry_{state}"], f"state={state}") for state in get_args(QuarantineState)]
        return _show(
            "quarantined.html",
            "/quarantined",
            entries=entries.items,
            next_page=entries.next_path("/quarantined", query),
            filters=_filter_links(request, "/quarantined", filters),
        )

    async def show_quarantined(self, request: web.Request, _form: Form) -> Shown | str:
        """Show one quarantine entry, its body, and the commands that resolve it."""
        read_query(CommonQuery, request)
        entry, body = await find_entry(request, self._pool)
        path = f"/quarantined/{entry['quarantine_id']}"
        return _show(
            "entry.html",
            path,
            entry=entry,
            body=body,
            may_see=has_scope(request, "read:bodies"),
            bytes_max=BODY_SHOWN_BYTES_MAX,
        )

    async def retry_quarantined(self, request: web.Request, _form: Form) -> str:
        """Record a quarantined body as a report, and show its order."""
        entry, body = await find_entry(request, self._pool)
        receipt = await retry_entry(self._recorder, entry, body, admission(request).actor)
        return f"{track_path(receipt['order_no'] or '')}?after_position={receipt['position']}"

    async def discard_quarantined(self, request: web.Request, form: Form) -> str:
        """Discard a quarantined body with the submitted reason, and show its entry."""
        entry, _ = await find_entry(request, self._pool)
        reason = form.get("reason", "")
        await discard_entry(self._pool, entry, reason, admission(request).actor)
        return f"/quarantined/{entry['quarantine_id']}"

    async def list_operations(self, request: web.Request, _form: Form) -> Shown | str:
        """Show a list of operators' actions, newest first."""
        query = read_query(OperationsPageQuery, request)
        async with self._pool.connection() as connection:
            rows = await operations_page(connection, query.cursor, query.action, ROWS_SHOWN_MAX + 1)
        shown = cut_page(rows, ROWS_SHOWN_MAX, itemgetter("operation_id"))
        texts = choose_locale(request).texts
        filters = [(texts["all_operations"], "")]
        filters += [(texts[f"operation_{action}"], f"action={action}") for action in get_args(Action)]
        return _show(
            "operations.html",
            "/operations",
            operations=shown.items,
            next_page=shown.next_path("/operations", query),
            filters=_filter_links(request, "/operations", filters),
        )


def _show(template: str, path: str, *, status: int = 200, stream: str = "", **variables: Any) -> Shown:
    return Shown(template, variables, path, status, stream)


async def _show_page(page: Page, request: web.Request) -> web.Response:
    """Show a page, or redirect to where its form leads."""
    form: Form = {}
    if request.method not in SAFE_METHODS:
        form = await read_form(request, REASON_FORM_BYTES_MAX)
    elif not page.has_query:
        read_query(CommonQuery, request)
    shown = await page.handle(request, form)
    if not isinstance(shown, Shown):
        return redirect(shown)
    path = shown.path or request.rel_url.raw_path
    return render_page(
        request, shown.template, path, status=shown.status, stream=shown.stream, **shown.variables
    )


def _filter_links(
    request: web.Request, path: str, filters: Sequence[tuple[str, str]]
) -> list[tuple[str, str, bool]]:
    """Return the label and the URL of each filter, and whether it is active.

    A filter is given by its label and its query string, which is empty for all rows.
    """
    names = ("search", "status", "settled", "verdict", "stuck", "from", "to", "state", "action", "handled")
    present = urlencode([(name, value) for name, value in request.query.items() if name in names])
    return [(label, f"{path}?{query}" if query else path, query == present) for label, query in filters]


def _with_problem_pages(handler: Handler) -> Handler:
    """Turn errors into pages for browsers; programs get problem details."""

    # This also copies the scope, which tests read.
    @wraps(handler)
    async def handle(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except Exception as error:
            if not accepts_html(request):
                raise
            # Only the form for the key is a route without a scope.
            return _render_problem(request, to_problem(error, request), getattr(handler, "scope", "read"))

    return handle


class WayBack(NamedTuple):
    """The page that a problem's page leads back to, and the number of its quarantine entry, if it has one."""

    path: str
    entry: int | None = None


def _find_way_back(request: web.Request) -> WayBack | None:
    is_form = request.method not in SAFE_METHODS
    if is_form and (number := parse_number(request.match_info.get("quarantine_id", ""))):
        return WayBack(f"/quarantined/{number}", number)
    path = referring_path(request)
    return WayBack(path) if path is not None else None


def _render_problem(request: web.Request, problem: ProblemError, scope: Scope) -> web.Response:
    back = _find_way_back(request)
    # The address of a form can only be sent to. Its page can be opened.
    is_page = request.method in SAFE_METHODS
    if problem.status == web.HTTPUnauthorized.status_code:
        next_path = local_path(request.raw_path) if is_page else back.path if back else "/"
        response = render_key_form(request, next_path, scope, is_wrong=False)
    else:
        texts = choose_locale(request).texts
        response = render_page(
            request,
            "problem.html",
            request.rel_url.raw_path if is_page else "/",
            back=back,
            status=problem.status,
            title=texts.get(f"problem_{problem.status}", texts["problem_other"]),
            detail=problem.detail,
            request_id=request_id(request),
        )
    response.headers.update(problem.headers)
    return response
