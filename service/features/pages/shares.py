"""Share links over HTTP: a link to one order's page that its buyer can open without a key."""

from datetime import datetime, timedelta
from enum import Enum
from http import HTTPStatus
from typing import ClassVar

from aiohttp import web
from pydantic import Field
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from service.database.connections import ConnectionPool
from service.event_log import store
from service.features.pages.share_links import (
    EXPIRY_DEFAULT,
    SETTING,
    ShareLinks,
    UnknownShareError,
    make_share,
    revoke_share,
)
from service.http.access import admission
from service.http.endpoints import Endpoint, PathParameters, Tag
from service.http.parameters import Duration, Query, parse_order_no
from service.http.problems import Explained, ProblemError, ProblemType, bad_parameter, only_reads
from service.http.responses import json_response, response


class ShareProblem(Explained, Enum):
    """The problem types of share links."""

    UNKNOWN_SHARE = (
        404,
        "Unknown share link",
        "Expected a link that the service signed, or an id in the record.",
    )
    SHARING_OFF = (
        409,
        "Sharing is off",
        "The service has no secret to sign links with: see `ORDER_TRACKING_SHARE_SECRET`.",
    )


class Share(TypedDict):
    """A link to one order's page: its path on this service, its id, and when it expires."""

    url: str
    share_id: str
    expires_at: datetime


class ShareQuery(Query):
    """How long a link works."""

    expires_in: Duration = Field(
        default=EXPIRY_DEFAULT, description="how long the link works, such as P30D; 180 days if left out"
    )


class SharesApi:
    """Makes and revokes share links.

    Args:
        pool: the connections to read and to record with.
        links: signs the links; None if sharing is off.
        is_reader: whether this process only reads, and so cannot record a link.
    """

    path_parameters: ClassVar[PathParameters] = {
        "share": {
            "schema": {"type": "string", "minLength": 1},
            "description": "the `share_id` of a link, or the last segment of its path",
        }
    }
    tag = Tag("shares", "Links to the pages of orders for their buyers.")

    def __init__(self, pool: ConnectionPool, links: ShareLinks | None, *, is_reader: bool) -> None:
        self._pool = pool
        self._links = links
        self._is_reader = is_reader

    @Endpoint(
        "GET",
        "/orders/{order_no}/share",
        Share,
        query=ShareQuery,
        problems=(ProblemType.UNKNOWN_ORDER, ShareProblem.SHARING_OFF),
    )
    async def get_share_link(self, request: web.Request, query: ShareQuery) -> web.Response:
        """Get a link to an order's page for its buyer, who needs no key.

        The link is recorded as an action of the key.
        """
        order_no = parse_order_no(request)
        if query.expires_in == timedelta():
            raise bad_parameter("expires_in", "it must be longer than zero, such as P30D")
        if self._links is None:
            detail = (
                f"set {SETTING} to a secret ('order-tracking token' generates one), and restart the service"
            )
            raise ProblemError(ShareProblem.SHARING_OFF, detail)
        if self._is_reader:
            raise only_reads()
        async with self._pool.connection() as connection:
            # From the log, so that an order that is parked in a view can be shared too.
            if not await store.read_stream(connection, order_no, 0, 1):
                raise ProblemError(ProblemType.UNKNOWN_ORDER, f"{order_no} has no report", order_no=order_no)
            actor = admission(request).actor
            link = await make_share(connection, self._links, order_no, query.expires_in, actor)
        return json_response({"url": link.path, "share_id": link.share_id, "expires_at": link.expires_at})

    @Endpoint(
        "DELETE",
        "/shares/{share}",
        None,
        scope="admin",
        status=HTTPStatus.NO_CONTENT,
        problems=(ShareProblem.UNKNOWN_SHARE,),
    )
    async def revoke_share_link(self, request: web.Request, _query: Query) -> web.Response:
        """Revoke a share link permanently, by its id or by the last segment of its path."""
        async with self._pool.connection() as connection:
            try:
                share = request.match_info["share"]
                await revoke_share(connection, self._links, share, admission(request).actor)
            except UnknownShareError as error:
                raise ProblemError(ShareProblem.UNKNOWN_SHARE, str(error)) from None
        return response(status=HTTPStatus.NO_CONTENT)
