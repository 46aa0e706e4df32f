"""Share links over HTTP: a link to one order's page that its buyer can open without a key."""

from datetime import datetime, timedelta

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from service.database.connections import ConnectionPool
from service.event_log import store
from service.http.endpoints import Endpoint, Tag
from service.http.parameters import Duration, Query, parse_order_no
from service.http.problems import ProblemError, ProblemType, bad_parameter
from service.http.responses import json_response
from service.http.share_links import SETTING, ShareLinks


class Share(TypedDict):
    """A link to one order's page: its path on this service, and when it expires."""

    url: str
    expires_at: datetime | None


class ShareQuery(Query):
    """How long a link works."""

    expires_in: Duration | None = Field(
        default=None, description="how long the link works, such as P30D; always if left out"
    )


class SharesApi:
    """Makes share links.

    Args:
        pool: the connections to read with.
        links: makes the links; None if sharing is off.
    """

    tag = Tag("shares", "Links to the pages of orders for their buyers.")

    def __init__(self, pool: ConnectionPool, links: ShareLinks | None) -> None:
        self._pool = pool
        self._links = links

    @Endpoint(
        "GET",
        "/orders/{order_no}/share",
        Share,
        query=ShareQuery,
        problems=(ProblemType.UNKNOWN_ORDER, ProblemType.SHARING_OFF),
    )
    async def get_share_link(self, request: web.Request, query: ShareQuery) -> web.Response:
        """Get a link to an order's page for its buyer, who needs no key."""
        order_no = parse_order_no(request)
        if query.expires_in == timedelta():
            raise bad_parameter("expires_in", "it must be longer than zero, such as P30D")
        if self._links is None:
            detail = (
                f"set {SETTING} to a secret ('order-tracking token' generates one), and restart the service"
            )
            raise ProblemError(ProblemType.SHARING_OFF, detail)
        async with self._pool.connection() as connection:
            # From the log, so that an order that is parked in a view can be shared too.
            if not await store.read_stream(connection, order_no, 0, 1):
                raise ProblemError(ProblemType.UNKNOWN_ORDER, f"{order_no} has no report", order_no=order_no)
        link = self._links.make(order_no, query.expires_in)
        return json_response({"url": link.path, "expires_at": link.expires_at})
