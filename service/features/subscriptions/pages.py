"""The page of subscriptions: their lag, their latest responses, and the orders that they hold."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import quote
from uuid import UUID

from aiohttp import web

from projections.postgres import Connection
from service.database.connections import ConnectionPool
from service.feature import MenuEntry, Page, Pages, Shown
from service.features.subscriptions import held_orders, subscription
from service.features.subscriptions.api import as_problems, read_id
from service.features.subscriptions.dispatcher import Dispatcher
from service.features.subscriptions.held_orders import HeldOrder
from service.features.subscriptions.sending import Sender, send_test
from service.features.subscriptions.subscription import Subscription
from service.http.access import admission
from service.http.parameters import parse_order_no

PATH: Final = "/deliveries"
# Further held orders are counted; the API and the command line list them all.
HELD_SHOWN_MAX: Final = 20
RESPONSES_SHOWN_MAX: Final = 10
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

    def pages(self) -> Pages:
        """Return the page and the targets of its forms. All of them require the scope admin."""
        one, held = f"{PATH}/{{subscription_id}}", f"{PATH}/{{subscription_id}}/held/{{order_no:[^/]+}}"
        forms: dict[str, Callable[[web.Request, Mapping[str, str]], Awaitable[Shown | str]]] = {
            f"{one}/test": self.test,
            f"{one}/pause": self.pause,
            f"{one}/resume": self.resume,
            f"{held}/retry": self.retry,
            f"{held}/skip": self.skip,
        }
        return Pages(
            folder=Path(__file__).parent,
            pages=[
                Page("GET", PATH, "admin", self.show),
                *(Page("POST", path, "admin", handle) for path, handle in forms.items()),
            ],
            menu=[MenuEntry(PATH, "deliveries", "admin")],
        )

    async def show(self, _request: web.Request, _form: Mapping[str, str]) -> Shown:
        """Show all subscriptions."""
        return await self._show(None, None)

    async def test(self, request: web.Request, _form: Mapping[str, str]) -> Shown:
        """Send a test request, and show its result."""
        with as_problems():
            async with self._pool.connection() as connection:
                actor = admission(request).actor
                found, secrets = await subscription.begin_test(connection, read_id(request), actor)
        result = await send_test(self._sender, found, secrets)
        return await self._show(found["subscription_id"], result)

    async def pause(self, request: web.Request, _form: Mapping[str, str]) -> str:
        """Stop the deliveries of a subscription."""

        async def pause(connection: Connection, subscription_id: UUID) -> None:
            actor = admission(request).actor
            await subscription.pause_subscription(connection, subscription_id, actor)

        return await self._act(request, pause)

    async def resume(self, request: web.Request, _form: Mapping[str, str]) -> str:
        """Go on with the deliveries of a subscription."""

        async def resume(connection: Connection, subscription_id: UUID) -> None:
            await subscription.resume_subscription(connection, subscription_id, admission(request).actor)

        return await self._act(request, resume)

    async def retry(self, request: web.Request, _form: Mapping[str, str]) -> str:
        """Attempt the event of a held order at once."""
        with as_problems():
            async with self._pool.connection() as connection:
                await held_orders.retry_held(
                    connection, read_id(request), parse_order_no(request), admission(request).actor
                )
        return self._return(read_id(request))

    async def skip(self, request: web.Request, form: Mapping[str, str]) -> str:
        """Give up the event of a held order with the submitted reason."""
        reason = form.get("reason", "")
        with as_problems():
            async with self._pool.connection() as connection:
                await held_orders.skip_held(
                    connection, read_id(request), parse_order_no(request), reason, admission(request).actor
                )
        return self._return(read_id(request))

    async def _act(self, request: web.Request, act: Callable[[Connection, UUID], Awaitable[None]]) -> str:
        with as_problems():
            async with self._pool.connection() as connection, connection.transaction():
                found = await subscription.lock_subscription(connection, read_id(request))
                await act(connection, found["subscription_id"])
        return self._return(found["subscription_id"])

    def _return(self, subscription_id: UUID) -> str:
        self._dispatcher.changed.set()
        return f"{PATH}#s{subscription_id}"

    async def _show(self, tested: UUID | None, result: object) -> Shown:
        async with self._pool.connection() as connection:
            shown = [
                ShownSubscription(
                    one,
                    await held_orders.held_orders_page(connection, one["subscription_id"], 0, HELD_SHOWN_MAX),
                    _success_percent(one["delivered"], one["failed"]),
                )
                for one in await subscription.list_subscriptions(connection)
            ]
        variables = {
            "shown": shown,
            "tested": tested,
            "result": result,
            "responses_max": RESPONSES_SHOWN_MAX,
            "held_path": held_path,
        }
        return Shown("deliveries.html", variables, PATH)


def held_path(subscription_id: UUID, order_no: str, action: str) -> str:
    """Return the path of a form that acts on an order held by a subscription, percent-encoded."""
    return f"{PATH}/{subscription_id}/held/{quote(order_no, safe='')}/{action}"


def _success_percent(delivered: int, failed: int) -> int | None:
    attempts = delivered + failed
    return delivered * PERCENT // attempts if attempts else None
