"""The page for a buyer: one order, read by a share link, without a key, a script or a link to other pages."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from functools import partial
from typing import Any, Final, NamedTuple

from aiohttp import hdrs, web

from projections import current_status, timeline
from projections.postgres import Connection
from projections.timeline import Advance
from service.api.freshness import wait_for
from service.database.connections import ConnectionPool
from service.features.pages.i18n import LANGUAGES, Language, Locale, negotiate_language
from service.features.pages.order import Stage, build_stages
from service.features.pages.render import Renderer
from service.features.pages.share_links import SHARE_PATH, ShareLinks, identify, is_revoked
from service.http.access import refuse_other_machines
from service.http.addresses import LOOPBACK, Network, client_address, subscriber
from service.http.auth_refusals import AuthRefusals, RefusedError
from service.http.budgets import Budget
from service.http.problems import ProblemError, to_problem
from service.http.responses import COMMON_HEADERS
from service.projecting.position import ViewPositions

# How many pages are read at a time: strangers leave most of the pool's connections to others.
READS_AT_A_TIME: Final = 2
# An order that moves back and forth has many status changes. The page shows the newest ones.
ADVANCES_SHOWN_MAX: Final = 50
# The stages come from these. An order has about seven.
ADVANCES_READ_MAX: Final = 500

# The page has a style sheet and an icon, and nothing else. Its address is a secret: no other site gets it as a
# referrer, and no search engine keeps it.
SHARE_HEADERS: Final = {
    **COMMON_HEADERS,
    hdrs.CONTENT_TYPE: "text/html; charset=utf-8",
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'none'; base-uri 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Robots-Tag": "noindex, nofollow",
    hdrs.VARY: "Accept-Language",
}


class SharedOrder(NamedTuple):
    """The data of the page.

    Attributes:
        cnote: the airway bill; None if there is none yet.
        status: the present status; None if there is none yet.
        status_since: since when the order has this status.
        is_delayed: whether a view has parked the order, so that its newest changes may be missing.
        stages: the stages of the journey.
        advances: the newest status changes, newest first.
        has_earlier: whether there are earlier ones.
    """

    cnote: str | None
    status: str | None
    status_since: datetime | None
    is_delayed: bool
    stages: Sequence[Stage]
    advances: Sequence[Advance]
    has_earlier: bool


class SharePages:
    """Serves the page of a shared order.

    Args:
        pool: the connections to read with.
        positions: how far each view has come.
        renderer: renders the page.
        links: checks the links; None if sharing is off, and then no link works.
        budget: what each address, and all together, may have in progress.
        proxies: the networks of trusted proxies.
        refusals: counts the requests that are not admitted.
        is_open: whether the service is in the open mode, in which it serves this machine alone.
    """

    def __init__(  # noqa: PLR0913 - each is named by its caller
        self,
        pool: ConnectionPool,
        positions: ViewPositions,
        renderer: Renderer,
        links: ShareLinks | None,
        *,
        budget: Budget,
        proxies: Sequence[Network],
        refusals: AuthRefusals,
        is_open: bool,
    ) -> None:
        self._pool = pool
        self._positions = positions
        self._renderer = renderer
        self._links = links
        # Strangers may request the page of a link that does not work often.
        self._not_found: dict[Language, bytes] = {}
        self._budget = budget
        self._proxies = proxies
        self._exempt = (*LOOPBACK, *proxies)
        self._refusals = refusals
        self._is_open = is_open
        self._turns = asyncio.Semaphore(READS_AT_A_TIME)

    def routes(self) -> list[web.RouteDef]:
        """Return the route, which needs no key."""
        return [web.get(SHARE_PATH + "/{token:[^/]+}", self.show)]

    async def show(self, request: web.Request) -> web.Response:
        """Show the order of a link. Every link that does not work gets the same page."""
        try:
            self._refuse_other_machines(request)
            token = request.match_info["token"]
            order_no = self._links.read(token) if self._links is not None else None
            order = await self._read(request, order_no, identify(token)) if order_no is not None else None
        except Exception as error:  # noqa: BLE001 - the buyer gets a page for every error
            return self._render_problem(request, to_problem(error, request))
        if order is None:
            return self._respond(request, self._render_not_found, status=404)
        return self._respond(request, partial(self._render, "share.html", order_no=order_no, order=order))

    def _refuse_other_machines(self, request: web.Request) -> None:
        if not self._is_open:
            return
        try:
            refuse_other_machines(request)
        except RefusedError as error:
            self._refusals.count(error.cause, request)
            raise

    async def _read(self, request: web.Request, order_no: str, share_id: str) -> SharedOrder | None:
        holder = subscriber(client_address(request, self._proxies), self._exempt)
        with self._budget.hold(holder):
            await wait_for(self._positions, None, current_status.VIEW.name, timeline.VIEW.name)
            async with self._turn(), self._pool.connection() as connection:
                if await is_revoked(connection, share_id):
                    return None
                return await read_shared(connection, order_no)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Wait for a turn to read.

        Raises:
            OverBudgetError: 429, the wait took too long.
        """
        try:
            async with asyncio.timeout(self._pool.seconds_max):
                await self._turns.acquire()
        except TimeoutError:
            raise self._budget.refusal("other pages of shared orders are being read") from None
        try:
            yield
        finally:
            self._turns.release()

    def _choose_locale(self, request: web.Request) -> Locale:
        """Return the locale by the ``lang`` parameter, or else by the browser. The page has no cookie."""
        locales = self._renderer.locales
        if (language := request.query.get("lang")) in locales:
            return locales[language]
        return locales[negotiate_language(request.headers.get(hdrs.ACCEPT_LANGUAGE, ""))]

    def _render_problem(self, request: web.Request, problem: ProblemError) -> web.Response:
        # Only the operator of a service in the open mode can meet a 403, and needs its detail.
        is_refused = problem.status == web.HTTPForbidden.status_code
        kind = {403: "403", 429: "503", 503: "503"}.get(problem.status, "other")
        detail = problem.detail if is_refused else None
        render = partial(self._render, "share_problem.html", kind=kind, detail=detail)
        response = self._respond(request, render, status=problem.status)
        response.headers.update(problem.headers)
        return response

    def _respond(
        self, request: web.Request, render: Callable[[Locale], bytes], *, status: int = 200
    ) -> web.Response:
        locale = self._choose_locale(request)
        headers = {**SHARE_HEADERS, hdrs.CONTENT_LANGUAGE: locale.language}
        return web.Response(body=render(locale), status=status, headers=headers)

    def _render(self, template: str, locale: Locale, **variables: Any) -> bytes:
        return self._renderer.render(template, locale=locale, languages=LANGUAGES, **variables)

    def _render_not_found(self, locale: Locale) -> bytes:
        page = self._not_found.get(locale.language)
        if page is None:
            page = self._render("share_problem.html", locale, kind="404", detail=None)
            self._not_found[locale.language] = page
        return page


async def read_shared(connection: Connection, order_no: str) -> SharedOrder | None:
    """Read the data of the page; None if the order has no report.

    Args:
        connection: a connection outside any transaction.
        order_no: the order number.
    """
    # One snapshot of the database, so that the head of the page and the timeline agree.
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        ((order, parked_position),) = await current_status.find_orders(connection, [order_no])
        if order is None and parked_position is None:
            return None
        advances = await timeline.latest_advances(connection, order_no, ADVANCES_READ_MAX)
        head = await timeline.read_head(connection, order_no)
    status = order["status"] if order is not None else None
    # Latest first, so that the first time at which a status was reached remains.
    reached_at: dict[str, datetime] = {advance.status: advance.received_at for advance in advances}
    stages = [
        # The buyer need not know that the courier left a stage out.
        stage._replace(state="reached") if stage.state == "skipped" else stage
        for stage in build_stages(status, reached_at)
    ]
    return SharedOrder(
        cnote=order["cnote"] if order is not None else None,
        status=status,
        status_since=order["status_since"] if order is not None else None,
        is_delayed=parked_position is not None or head.parked is not None,
        stages=stages,
        advances=advances[:ADVANCES_SHOWN_MAX],
        has_earlier=len(advances) > ADVANCES_SHOWN_MAX,
    )
