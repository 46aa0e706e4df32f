from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated, Any, Final, TypeVar, get_args

import typer

from domain.statuses import STATUSES
from domain.transitions import VERDICTS
from projections.postgres import Connection
from service.console import EXIT_USAGE, database, err, fail, show, show_table
from service.database.connections import connected
from service.database.log_identity import LogIdentity
from service.database.operations import system_user
from service.event_log import store, times
from service.features.subscriptions import held_orders, subscription
from service.features.subscriptions.held_orders import NotHeldError
from service.features.subscriptions.message import describe
from service.features.subscriptions.sending import Sender, send_test
from service.features.subscriptions.settings import SubscriptionsSettings
from service.features.subscriptions.subscription import (
    VERDICTS_DEFAULT,
    Declaration,
    Include,
    SubscriptionError,
    UnknownSubscriptionError,
    parse_subscription_id,
)
from service.features.subscriptions.targets import UnusableUrlError, check_url
from service.http.times import to_rfc3339
from service.settings import read

PAGE_ROWS: Final = 1_000
RESPONSE_COLUMNS: Final = ("at", "order_no", "version", "attempt", "status", "ms", "error")
HELD_COLUMNS: Final = ("order_no", "version", "held_since", "attempts", "next_attempt_at", "last_error")

Id = Annotated[str, typer.Argument(help="The subscription's id, as 'subscriptions list' shows it.")]
OrderNo = Annotated[str, typer.Argument(help="The order number.")]
FromPosition = Annotated[
    int | None, typer.Option(min=0, help="Send the events above this position of the log.")
]
FromTime = Annotated[
    str | None,
    typer.Option(help="Send the events recorded at or after this time, such as 2026-01-31T08:30:00+07:00."),
]

AnyWord = TypeVar("AnyWord", bound=str)

subscriptions = typer.Typer(no_args_is_help=True, add_completion=False)


@asynccontextmanager
async def _connection() -> AsyncIterator[Connection]:
    """Yield a connection, and turn the errors of subscriptions into one line each."""
    try:
        async with database(read(SubscriptionsSettings)) as dsn, connected(dsn) as connection:
            yield connection
    except (UnknownSubscriptionError, NotHeldError, SubscriptionError) as error:
        fail(error)


@subscriptions.command("add")
async def add(  # noqa: PLR0913 - the options of the command
    url: Annotated[str, typer.Argument(help="The endpoint: https, at a public address.")],
    *,
    verdict: Annotated[
        list[str] | None, typer.Option(help="Send events with this verdict; repeat it for several.")
    ] = None,
    every_verdict: Annotated[
        bool, typer.Option("--all-verdicts", help="Send events with every verdict, not only 'advanced'.")
    ] = False,
    status: Annotated[
        list[str] | None,
        typer.Option(help="Send events after which the order has this status; repeat it for several."),
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="What else a message has: body, for the report's whole body.")
    ] = None,
    from_position: FromPosition = None,
    from_time: FromTime = None,
) -> None:
    """Add a subscription, and print its id and its secret, which you cannot print again."""
    if verdict and every_verdict:
        fail("pass only one of --verdict and --all-verdicts", EXIT_USAGE)
    verdicts = _choose(verdict or [*VERDICTS_DEFAULT], VERDICTS, "--verdict")
    statuses = _choose(status or [], STATUSES, "--status")
    included = _choose(include or [], get_args(Include), "--include")
    try:
        checked = await check_url(url, read(SubscriptionsSettings).subscription_networks)
    except UnusableUrlError as error:
        fail(error, EXIT_USAGE)
    declaration = Declaration(str(checked), [] if every_verdict else verdicts, statuses, included)
    async with _connection() as connection:
        start = await _find_start(connection, from_position, from_time)
        added = await subscription.add_subscription(connection, declaration, start, system_user())
    show(f"id      {added['subscription_id']}")
    show(f"secret  {added['secret']}")
    err.print("give the secret to the receiver, which verifies each message with it; it cannot be shown again")


@subscriptions.command("list")
async def list_all() -> None:
    """List all subscriptions, oldest first."""
    async with _connection() as connection:
        rows = [
            (
                *(one["subscription_id"], one["url"], _state(one), describe(one["verdicts"])),
                *(describe(one["statuses"]), one["position"], one["lag_events"], one["held_orders"]),
            )
            for one in await subscription.list_subscriptions(connection)
        ]
    show_table(("id", "url", "state", "verdicts", "statuses", "position", "lag", "held"), rows)


@subscriptions.command("show")
async def show_one(subscription_id: Id) -> None:
    """Show a subscription, its latest responses, and the orders that it holds."""
    async with _connection() as connection:
        number = parse_subscription_id(subscription_id)
        found = await subscription.find_subscription(connection, number)
        held = await held_orders.held_orders_page(connection, number, 0, PAGE_ROWS)
    for name, value in found.items():
        if name == "responses" or value is None:
            continue
        text = describe(value) if isinstance(value, list) and name != "include" else value
        text = to_rfc3339(value, "seconds") if isinstance(value, datetime) else text
        show(f"{name:<22} {', '.join(text) if isinstance(text, list) else text}")
    _show_records(RESPONSE_COLUMNS, found["responses"], "responses")
    _show_records(HELD_COLUMNS, held, "held orders")


@subscriptions.command("test")
async def test(subscription_id: Id) -> None:
    """Send a signed test request to the endpoint; exit with 1 if it did not accept it."""
    async with _connection() as connection:
        number = parse_subscription_id(subscription_id)
        found, secrets = await subscription.begin_test(connection, number, system_user())
        log = LogIdentity()
        await log.read(connection)
    sender = Sender(read(SubscriptionsSettings).subscription_networks, log)
    result = await send_test(sender, found, secrets)
    await sender.close()
    if not result["delivered"]:
        fail(f"not delivered: {result['error']}")
    show(f"delivered: {result['status']} in {result['ms']} ms")


@subscriptions.command("pause")
async def pause(subscription_id: Id) -> None:
    """Stop the deliveries. What happens in the meantime is delivered after 'resume'."""
    async with _connection() as connection, connection.transaction():
        found = await subscription.find_subscription(connection, parse_subscription_id(subscription_id))
        await subscription.pause_subscription(connection, found["subscription_id"], system_user())
    show("paused")


@subscriptions.command("resume")
async def resume(subscription_id: Id) -> None:
    """Go on with the deliveries where they stopped."""
    async with _connection() as connection, connection.transaction():
        found = await subscription.find_subscription(connection, parse_subscription_id(subscription_id))
        if found["state"] != "active":
            await subscription.resume_subscription(connection, found["subscription_id"], system_user())
    show("active")


@subscriptions.command("replay")
async def replay(
    subscription_id: Id, *, from_position: FromPosition = None, from_time: FromTime = None
) -> None:
    """Send past events again, each with the same id as before."""
    if from_position is None and from_time is None:
        fail("pass --from-position or --from-time", EXIT_USAGE)
    async with _connection() as connection:
        start = await _find_start(connection, from_position, from_time)
        number = parse_subscription_id(subscription_id)
        await subscription.replay_subscription(connection, number, start or 0, system_user())
    show(f"the events above position {start} are sent again")


@subscriptions.command("rotate-secret")
async def rotate_secret(subscription_id: Id) -> None:
    """Print a new secret; for 24 hours, messages also have a signature with the previous one."""
    async with _connection() as connection:
        rotated = await subscription.rotate_secret(
            connection, parse_subscription_id(subscription_id), system_user()
        )
    show(rotated["secret"])
    err.print(f"the previous secret signs until {rotated['previous_secret_until']:%Y-%m-%d %H:%M} UTC")


@subscriptions.command("remove")
async def remove(subscription_id: Id) -> None:
    """Remove a subscription permanently."""
    async with _connection() as connection:
        await subscription.remove_subscription(
            connection, parse_subscription_id(subscription_id), system_user()
        )
    show("removed")


@subscriptions.command("retry")
async def retry(
    subscription_id: Id,
    order_no: Annotated[str | None, typer.Argument(help="The order number.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="Retry every held order.")] = False,
) -> None:
    """Attempt the event of a held order at once, and then by the whole schedule again."""
    if (order_no is None) != every:
        fail("pass either an order number or --all", EXIT_USAGE)
    last = 0
    async with _connection() as connection:
        number = parse_subscription_id(subscription_id)
        if order_no is not None:
            held = await held_orders.retry_held(connection, number, order_no, system_user())
            show(f"version {held['version']} of {order_no} is due now")
            return
        await subscription.find_subscription(connection, number)
        while page := await held_orders.held_orders_page(connection, number, last, PAGE_ROWS):
            last = page[-1]["held_id"]
            for one in page:
                # It may have been delivered in the meantime.
                with suppress(NotHeldError):
                    await held_orders.retry_held(connection, number, one["order_no"], system_user())
                    show(f"version {one['version']} of {one['order_no']} is due now")


@subscriptions.command("skip")
async def skip(
    subscription_id: Id,
    order_no: OrderNo,
    reason: Annotated[str, typer.Argument(help="Why you give the event up; the reason is recorded.")],
) -> None:
    """Give up the event of a held order, and go on with the order's next one."""
    async with _connection() as connection:
        try:
            held = await held_orders.skip_held(
                connection, parse_subscription_id(subscription_id), order_no, reason, system_user()
            )
        except ValueError as error:
            fail(error, EXIT_USAGE)
    show(f"version {held['version']} of {order_no} is skipped")


def _choose(words: Sequence[str], known: Sequence[AnyWord], option: str) -> list[AnyWord]:
    """Return words that an option may have, each once."""
    for word in words:
        if word not in known:
            fail(f"{option} {word} is unknown. Expected one of {', '.join(known)}", EXIT_USAGE)
    return [word for word in known if word in words]


async def _find_start(connection: Connection, position: int | None, time: str | None) -> int | None:
    """Return the position that the options name, None if they name none."""
    if position is not None and time is not None:
        fail("pass only one of --from-position and --from-time", EXIT_USAGE)
    if time is not None:
        return await times.position_before(connection, _parse_time(time))
    head = await store.head_position(connection)
    if position is not None and position > head:
        fail(f"the log ends at position {head}, before {position}: pass at most {head}")
    return position


def _parse_time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{text} is not a time. Expected one such as 2026-01-31T08:30:00+07:00", EXIT_USAGE)
    if time.tzinfo is None:
        fail(f"{text} has no offset. Expected one, such as Z or +07:00", EXIT_USAGE)
    if time > datetime.now(UTC):
        fail(f"{text} lies in the future. Expected a time in the past", EXIT_USAGE)
    return time


def _state(one: subscription.Subscription) -> str:
    if one["down_since"] is not None:
        return f"{one['state']}, endpoint down since {to_rfc3339(one['down_since'], 'seconds')}"
    return one["state"] if one["reason"] is None else f"{one['state']}: {one['reason']}"


def _show_records(columns: Sequence[str], records: Sequence[Mapping[str, Any]], title: str) -> None:
    show_table(columns, [tuple(record[name] for name in columns) for record in records], title)
