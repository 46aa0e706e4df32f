"""Subscriptions over HTTP: declare, change, test, pause, replay and remove them, and act on held orders."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar
from uuid import UUID

from aiohttp import web
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from typing_extensions import TypeAliasType, TypedDict  # pydantic cannot read typing's own before Python 3.12
from yarl import URL

from domain.statuses import Status
from domain.transitions import Verdict
from projections.postgres import Connection
from service.database.connections import ConnectionPool
from service.database.operations import REASON_CHARACTERS_MAX, Actor
from service.event_log import store, times
from service.features.subscriptions import held_orders, subscription
from service.features.subscriptions.dispatcher import Dispatcher
from service.features.subscriptions.held_orders import HeldOrder, NotHeldError
from service.features.subscriptions.problems import SubscriptionProblem
from service.features.subscriptions.sending import Sender, TestResult, send_test
from service.features.subscriptions.subscription import (
    VERDICTS_DEFAULT,
    Declaration,
    Include,
    Subscription,
    SubscriptionError,
    SubscriptionWithSecret,
    UnknownSubscriptionError,
)
from service.features.subscriptions.targets import UnusableUrlError, check_url
from service.http.access import admission, has_scope
from service.http.body import read_body
from service.http.endpoints import Endpoint, PathParameters, Tag
from service.http.pagination import cut_page, list_response
from service.http.parameters import PageQuery, Position, Query, Time, parse_order_no
from service.http.problems import ProblemError, ProblemType, beyond_head
from service.http.responses import json_response, response

SUBSCRIPTION_PATH: Final = "/subscriptions/{subscription_id}"
HELD_PATH: Final = f"{SUBSCRIPTION_PATH}/held/{{order_no}}"


class SubscriptionList(TypedDict):
    """Every subscription, oldest first."""

    subscriptions: list[Subscription]


class HeldOrderPage(TypedDict):
    """A page of held orders, those that have been held for longest first."""

    held: list[HeldOrder]
    next: str | None


RequestedState = TypeAliasType("RequestedState", Literal["active", "paused"])


class _Body(BaseModel):
    """A request body. An unknown member is an error: it must not be ignored silently."""

    model_config = ConfigDict(extra="forbid")


def _unique(words: list[Any]) -> list[Any]:
    return [*dict.fromkeys(words)]


_Verdicts = Annotated[list[Verdict], AfterValidator(_unique)]
_Statuses = Annotated[list[Status], AfterValidator(_unique)]
_Includes = Annotated[list[Include], AfterValidator(_unique)]


class _Start(_Body):
    from_position: Annotated[Position, Strict()] | None = Field(
        default=None, description="send the events above this position"
    )
    from_time: Time | None = Field(default=None, description="send the events recorded at or after this time")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_position is not None and self.from_time is not None:
            raise ValueError("pass only one of from_position and from_time")
        return self


class AddRequest(_Start):
    """A new subscription. Without a start, it begins at the head of the log."""

    url: str = Field(description="the endpoint: https, at a public address")
    verdicts: _Verdicts = Field(
        default=[*VERDICTS_DEFAULT], description="send events with these verdicts; [] for all"
    )
    statuses: _Statuses = Field(
        default=[], description="send events after which the order has one of these statuses; [] for all"
    )
    include: _Includes = Field(default=[], description="body, for the report's whole body")


class ChangeRequest(_Body):
    """Changes of a subscription, at least one. Absent members stay as they are."""

    url: str | None = None
    verdicts: _Verdicts | None = None
    statuses: _Statuses | None = None
    include: _Includes | None = None
    state: RequestedState | None = Field(
        default=None, description="paused to stop the deliveries, active to go on where they stopped"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        members = ", ".join(type(self).model_fields)
        if not self.model_fields_set or any(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError(f"expected at least one of {members}, and none of them null")
        return self


class ReplayRequest(_Start):
    """Where to begin again."""


class SkipRequest(_Body):
    """Why an event is given up."""

    reason: str = Field(min_length=1, max_length=REASON_CHARACTERS_MAX)


AnyBody = TypeVar("AnyBody", bound=_Body)


class SubscriptionsApi:
    """Serves subscriptions.

    Args:
        pool: the connections to read and write with.
        dispatcher: delivers, and learns of changes.
        sender: sends test requests, and knows which addresses are allowed.
    """

    path_parameters: ClassVar[PathParameters] = {
        "subscription_id": {
            "schema": {"type": "string", "format": "uuid"},
            "description": "the id of the subscription",
        }
    }
    tag = Tag("subscriptions", "Order events that are sent to your own endpoints.")

    def __init__(self, pool: ConnectionPool, dispatcher: Dispatcher, sender: Sender) -> None:
        self._pool = pool
        self._dispatcher = dispatcher
        self._sender = sender

    @Endpoint("GET", "/subscriptions", SubscriptionList, scope="admin")
    async def list_subscriptions(self, _request: web.Request, _query: Query) -> web.Response:
        """List all subscriptions, oldest first."""
        async with self._pool.connection() as connection:
            return json_response({"subscriptions": await subscription.list_subscriptions(connection)})

    @Endpoint(
        "POST",
        "/subscriptions",
        SubscriptionWithSecret,
        scope="admin",
        body=AddRequest,
        status=HTTPStatus.CREATED,
        problems=(ProblemType.BEYOND_HEAD, SubscriptionProblem.TOO_MANY_SUBSCRIPTIONS),
    )
    async def add_subscription(self, request: web.Request, _query: Query) -> web.Response:
        """Add a subscription, and get its secret, which you cannot read again."""
        added = await _read_request(AddRequest, request)
        require_body_scope(request, added.include)
        url = await self._check_url(added.url)
        declaration = Declaration(str(url), added.verdicts, added.statuses, added.include)
        position = await self._find_start(added)
        try:
            async with self._pool.connection() as connection:
                created = await subscription.add_subscription(
                    connection, declaration, position, admission(request).actor
                )
        except SubscriptionError as error:
            raise ProblemError(SubscriptionProblem.TOO_MANY_SUBSCRIPTIONS, str(error)) from None
        self._notice_change()
        result = json_response(created)
        result.set_status(HTTPStatus.CREATED)
        result.headers["Location"] = f"/subscriptions/{created['subscription_id']}"
        return result

    @Endpoint(
        "GET",
        SUBSCRIPTION_PATH,
        Subscription,
        scope="admin",
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION,),
    )
    async def get_subscription(self, request: web.Request, _query: Query) -> web.Response:
        """Get one subscription: its state, its lag, and its latest responses."""
        return json_response(await self._find(request))

    @Endpoint(
        "PATCH",
        SUBSCRIPTION_PATH,
        Subscription,
        scope="admin",
        body=ChangeRequest,
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION,),
    )
    async def change_subscription(self, request: web.Request, _query: Query) -> web.Response:
        """Change what a subscription sends or where, pause it, or resume it."""
        changes = await _read_request(ChangeRequest, request)
        require_body_scope(request, changes.include or [])
        url = None if changes.url is None else str(await self._check_url(changes.url))
        actor = admission(request).actor
        with as_problems():
            async with self._pool.connection() as connection, connection.transaction():
                present = await subscription.lock_subscription(connection, read_id(request))
                await self._change(connection, present, changes, url, actor)
        self._notice_change()
        return json_response(await self._find(request))

    async def _change(
        self,
        connection: Connection,
        present: Subscription,
        changes: ChangeRequest,
        url: str | None,
        actor: Actor,
    ) -> None:
        declaration = Declaration(
            present["url"] if url is None else url,
            present["verdicts"] if changes.verdicts is None else changes.verdicts,
            present["statuses"] if changes.statuses is None else changes.statuses,
            present["include"] if changes.include is None else changes.include,
        )
        before = Declaration(present["url"], present["verdicts"], present["statuses"], present["include"])
        changed = [
            name for name, old, new in zip(Declaration._fields, before, declaration, strict=True) if old != new
        ]
        subscription_id = present["subscription_id"]
        if changed:
            await subscription.change_subscription(connection, subscription_id, declaration, changed, actor)
        if changes.state == "paused":
            await subscription.pause_subscription(connection, subscription_id, actor)
        elif changes.state == "active" and present["state"] != "active":
            await subscription.resume_subscription(connection, subscription_id, actor)

    @Endpoint(
        "DELETE",
        SUBSCRIPTION_PATH,
        None,
        scope="admin",
        status=HTTPStatus.NO_CONTENT,
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION,),
    )
    async def remove_subscription(self, request: web.Request, _query: Query) -> web.Response:
        """Remove a subscription with its held orders."""
        with as_problems():
            async with self._pool.connection() as connection:
                await subscription.remove_subscription(connection, read_id(request), admission(request).actor)
        self._notice_change()
        return response(status=HTTPStatus.NO_CONTENT)

    @Endpoint(
        "POST",
        f"{SUBSCRIPTION_PATH}/test",
        TestResult,
        scope="admin",
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION,),
    )
    async def test_subscription(self, request: web.Request, _query: Query) -> web.Response:  # noqa: PT019 - no test
        """Send a signed test request to the endpoint now, and get its result.

        It has the type `subscription.test`, carries no order, and is sent once, even if the subscription is
        paused.
        """
        with as_problems():
            async with self._pool.connection() as connection:
                actor = admission(request).actor
                found, secrets = await subscription.begin_test(connection, read_id(request), actor)
        return json_response(await send_test(self._sender, found, secrets))

    @Endpoint(
        "POST",
        f"{SUBSCRIPTION_PATH}/replay",
        Subscription,
        scope="admin",
        body=ReplayRequest,
        problems=(
            SubscriptionProblem.UNKNOWN_SUBSCRIPTION,
            ProblemType.BEYOND_HEAD,
            SubscriptionProblem.NOT_BACK,
        ),
    )
    async def replay_subscription(self, request: web.Request, _query: Query) -> web.Response:
        """Send the events after a position or from a time on again.

        Each has the same `webhook-id` as before.
        """
        replay = await _read_request(ReplayRequest, request)
        position = await self._find_start(replay)
        if position is None:
            raise ProblemError(ProblemType.BAD_BODY, "from_position or from_time is required")
        try:
            with as_problems():
                async with self._pool.connection() as connection:
                    await subscription.replay_subscription(
                        connection, read_id(request), position, admission(request).actor
                    )
        except SubscriptionError as error:
            raise ProblemError(SubscriptionProblem.NOT_BACK, str(error)) from None
        self._notice_change()
        return json_response(await self._find(request))

    @Endpoint(
        "POST",
        f"{SUBSCRIPTION_PATH}/rotate-secret",
        SubscriptionWithSecret,
        scope="admin",
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION,),
    )
    async def rotate_secret(self, request: web.Request, _query: Query) -> web.Response:
        """Get a new secret, which you cannot read again.

        For 24 hours, each request also has a signature with the previous secret.
        """
        with as_problems():
            async with self._pool.connection() as connection:
                rotated = await subscription.rotate_secret(
                    connection, read_id(request), admission(request).actor
                )
        self._notice_change()
        return json_response(rotated)

    @Endpoint(
        "GET",
        f"{SUBSCRIPTION_PATH}/held",
        HeldOrderPage,
        query=PageQuery,
        scope="admin",
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION,),
    )
    async def list_held_orders(self, request: web.Request, query: PageQuery) -> web.Response:
        """List the orders with an undelivered event, those that have been held for longest first."""
        with as_problems():
            async with self._pool.connection() as connection:
                found = await subscription.find_subscription(connection, read_id(request))
                rows = await held_orders.held_orders_page(
                    connection, found["subscription_id"], query.cursor or 0, query.limit + 1
                )
        page = cut_page(rows, query.limit, lambda row: row["held_id"])
        return list_response(query, "held", page, request.path)

    @Endpoint(
        "POST",
        f"{HELD_PATH}/retry",
        HeldOrder,
        scope="admin",
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION, SubscriptionProblem.NOT_HELD),
    )
    async def retry_held_order(self, request: web.Request, _query: Query) -> web.Response:
        """Attempt the event of a held order at once, and then by the whole schedule again."""
        with as_problems():
            async with self._pool.connection() as connection:
                held = await held_orders.retry_held(
                    connection, read_id(request), parse_order_no(request), admission(request).actor
                )
        self._notice_change()
        return json_response(held)

    @Endpoint(
        "POST",
        f"{HELD_PATH}/skip",
        HeldOrder,
        scope="admin",
        body=SkipRequest,
        problems=(SubscriptionProblem.UNKNOWN_SUBSCRIPTION, SubscriptionProblem.NOT_HELD),
    )
    async def skip_held_order(self, request: web.Request, _query: Query) -> web.Response:
        """Give up the event of a held order, with a reason, and go on with the order's next one."""
        reason = (await _read_request(SkipRequest, request)).reason
        with as_problems():
            async with self._pool.connection() as connection:
                held = await held_orders.skip_held(
                    connection, read_id(request), parse_order_no(request), reason, admission(request).actor
                )
        self._notice_change()
        return json_response(held)

    async def _find(self, request: web.Request) -> Subscription:
        with as_problems():
            async with self._pool.connection() as connection:
                return await subscription.find_subscription(connection, read_id(request))

    async def _check_url(self, text: str) -> URL:
        try:
            return await check_url(text, self._sender.networks, self._sender.resolver)
        except UnusableUrlError as error:
            raise ProblemError(ProblemType.BAD_BODY, f"url: {error}") from None

    async def _find_start(self, start: _Start) -> int | None:
        """Return the position that a request names, None if it names none."""
        async with self._pool.connection() as connection:
            if start.from_time is not None:
                if start.from_time > datetime.now(UTC):
                    raise ProblemError(
                        ProblemType.BAD_BODY, f"from_time: {start.from_time.isoformat()} lies in the future"
                    )
                return await times.position_before(connection, start.from_time)
            head = await store.head_position(connection)
            if start.from_position is not None and start.from_position > head:
                raise beyond_head(start.from_position, head)
            return start.from_position

    def _notice_change(self) -> None:
        self._dispatcher.changed.set()


@contextmanager
def as_problems() -> Iterator[None]:
    """Raise the problems for an unknown subscription, an order that is not held, and an invalid reason."""
    try:
        yield
    except UnknownSubscriptionError as error:
        raise ProblemError(SubscriptionProblem.UNKNOWN_SUBSCRIPTION, str(error)) from None
    except NotHeldError as error:
        raise ProblemError(SubscriptionProblem.NOT_HELD, str(error)) from None
    except ValueError as error:
        raise ProblemError(ProblemType.BAD_BODY, str(error)) from None


def read_id(request: web.Request) -> UUID:
    """Return the id of the subscription that a request's path names.

    Raises:
        UnknownSubscriptionError: it is not the id of a subscription.
    """
    return subscription.parse_subscription_id(request.match_info["subscription_id"])


def require_body_scope(request: web.Request, include: Sequence[Include]) -> None:
    """Require the scope that reads bodies for a subscription whose messages have them.

    Raises:
        ProblemError: 403, the request was admitted without this scope.
    """
    if "body" in include and not has_scope(request, "read:bodies"):
        raise ProblemError(
            ProblemType.FORBIDDEN, "to include bodies, a key of the scope read:bodies is required"
        )


async def _read_request(model: type[AnyBody], request: web.Request) -> AnyBody:
    try:
        return model.model_validate_json(await read_body(request) or b"{}")
    except ValidationError as error:
        raise ProblemError(ProblemType.BAD_BODY, _describe(error.errors()[0], model)) from None


def _describe(error: Any, model: type[_Body]) -> str:
    """Return what is wrong with a body: the member, its value, and what was expected."""
    name = str(error["loc"][0]) if error["loc"] else ""
    match error["type"]:
        case "extra_forbidden":
            return f"{name} is unknown. Known members: {', '.join(model.model_fields)}"
        case "missing":
            return f"{name} is required"
        case "literal_error":
            return f"{name}: {error['input']} is unknown. Expected {error['ctx']['expected']}"
        case "json_invalid":
            return "the body must be a JSON object"
    detail = error["msg"].removeprefix("Value error, ")
    value = f"{error['input']!r}: " if isinstance(error["input"], str | int | float | None) else ""
    return f"{name}: {value}{detail}" if name else detail
