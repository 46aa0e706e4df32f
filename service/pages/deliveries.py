"""The page of subscriptions: their lag, their latest responses, and the orders that they hold."""

from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple
from uuid import UUID

from aiohttp import web

from projections.postgres_errors import Connection
from service.database.connections import ConnectionPool
from service.http.access import admission
from service.http.parameters import parse_order_no, read_query
from service.pages.orders import CommonQuery
from service.pages.render import render_page
from service.pages.session import read_form, redirect
from service.subscriptions import held_orders, subscription
from service.subscriptions.api import as_problems, read_id
from service.subscriptions.dispatcher import Dispatcher
from service.subscriptions.held_orders import HeldOrder
from service.subscriptions.sending import Sender, send_test
from service.subscriptions.subscription import Subscription

PATH: Final = "/deliveries"
# Further held orders are counted; the API and the command line list them all.
HELD_SHOWN_MAX: Final = 20
RESPONSES_SHOWN_MAX: Final = 10
REASON_FORM_BYTES_MAX: Final = 16 * 1024
# A percentage that is not 100 is never shown as 100.
PERCENT: Final = 100


class ShownSubscription(NamedTuple):
    """A subscription with the first of its held orders, and the share of its attempts that were delivered."""

    subscription: Subscription
    held: list[HeldOrder]
    success_percent: int | None


class DeliveryPages:
    """The page of subscriptions.

    Args:
        pool: the connections to read and write with.
        dispatcher: learns of changes.
        sender: sends test requests.
    """

    def __init__(self, pool: ConnectionPool, dispatcher: Dispatcher, sender: Sender) -> None:
        self._pool = pool
        self._dispatcher = dispatcher
        self._sender = sender

    def routes(self) -> list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]]:
        """Return the method, the path and the handler of each route. All of them require the scope admin."""
        one, held = f"{PATH}/{{subscription_id}}", f"{PATH}/{{subscription_id}}/held/{{order_no:[^/]+}}"
        return [
            ("GET", PATH, self.show),
            ("POST", f"{one}/test", self.test),
            ("POST", f"{one}/pause", self.pause),
            ("POST", f"{one}/resume", self.resume),
            ("POST", f"{held}/retry", self.retry),
            ("POST", f"{held}/skip", self.skip),
        ]

    async def show(self, request: web.Request) -> web.Response:
        """Show all subscriptions."""
        read_query(CommonQuery, request)
        return await self._render(request, None, None)

    async def test(self, request: web.Request) -> web.Response:
        """Send a test request, and show its result."""
        with as_problems():
            async with self._pool.connection() as connection:
                actor = admission(request).actor
                found, secrets = await subscription.begin_test(connection, read_id(request), actor)
        result = await send_test(self._sender, found, secrets)
        return await self._render(request, found["subscription_id"], result)

    async def pause(self, request: web.Request) -> web.Response:
        """Stop the deliveries of a subscription."""

        async def pause(connection: Connection, subscription_id: UUID) -> None:
            actor = admission(request).actor
            await subscription.pause_subscription(connection, subscription_id, actor)

        return await self._act(request, pause)

    async def resume(self, request: web.Request) -> web.Response:
        """Go on with the deliveries of a subscription."""

        async def resume(connection: Connection, subscription_id: UUID) -> None:
            await subscription.resume_subscription(connection, subscription_id, admission(request).actor)

        return await self._act(request, resume)

    async def retry(self, request: web.Request) -> web.Response:
        """Attempt the event of a held order at once."""
        with as_problems():
            async with self._pool.connection() as connection:
                await held_orders.retry_held(
                    connection, read_id(request), parse_order_no(request), admission(request).actor
                )
        return self._return(read_id(request))

    async def skip(self, request: web.Request) -> web.Response:
        """Give up the event of a held order with the submitted reason."""
        reason = (await read_form(request, REASON_FORM_BYTES_MAX)).get("reason", "")
        with as_problems():
            async with self._pool.connection() as connection:
                await held_orders.skip_held(
                    connection, read_id(request), parse_order_no(request), reason, admission(request).actor
                )
        return self._return(read_id(request))

    async def _act(
        self, request: web.Request, act: Callable[[Connection, UUID], Awaitable[None]]
    ) -> web.Response:
        with as_problems():
            async with self._pool.connection() as connection, connection.transaction():
                found = await subscription.lock_subscription(connection, read_id(request))
                await act(connection, found["subscription_id"])
        return self._return(found["subscription_id"])

    def _return(self, subscription_id: UUID) -> web.Response:
        self._dispatcher.changed.set()
        return redirect(f"{PATH}#s{subscription_id}")

    async def _render(self, request: web.Request, tested: UUID | None, result: object) -> web.Response:
        async with self._pool.connection() as connection:
            shown = [
                ShownSubscription(
                    one,
                    await held_orders.held_orders_page(connection, one["subscription_id"], 0, HELD_SHOWN_MAX),
                    _success_percent(one["delivered"], one["failed"]),
                )
                for one in await subscription.list_subscriptions(connection)
            ]
        return render_page(
            request,
            "deliveries.html",
            PATH,
            shown=shown,
            tested=tested,
            result=result,
            responses_max=RESPONSES_SHOWN_MAX,
        )


def _success_percent(delivered: int, failed: int) -> int | None:
    attempts = delivered + failed
    return delivered * PERCENT // attempts if attempts else None
