import asyncio
import signal
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import aiohttp
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from yarl import URL

from service.console import EXIT_FAILURE, EXIT_USAGE, completes, fail, out, show, stop_event
from service.features.simulator.account import ServiceLog, UnreadableLogError, compare
from service.features.simulator.lifecycles import METHODS, Plan, Troubles
from service.features.simulator.shop import Shop, ShopTroubles
from service.features.simulator.simulator import Registration, Simulator
from service.ingest.signatures import make_scheme
from service.registration import UnusableUrlError, check_url, webhook_url
from service.settings import CoreSettings
from service.settings import read as read_settings

ORDERS_MAX: Final = 1_000_000
PORT_MAX: Final = 65_535
# The interval between two lines or redraws of the progress: on a terminal, and in a pipe or a file.
TERMINAL_SECONDS: Final = 0.1
PIPED_SECONDS: Final = 5.0
# Of each trouble of the simulated shop, if you choose no other.
SHOP_SHARE: Final = 0.05
LISTEN_HOST: Final = "127.0.0.1"


def _share(trouble: str) -> Any:
    return typer.Option(min=0, max=1, help=f"Share of the reports that are {trouble}.")


def _share_of_requests(trouble: str) -> Any:
    return typer.Option(
        min=0, max=1, help=f"With --shop, share of the requests that are {trouble}; 0.05 if left out."
    )


async def simulate(  # noqa: C901, PLR0913, PLR0915 - the options of the command, and its one story
    *,
    orders: Annotated[int, typer.Option(min=1, max=ORDERS_MAX, help="Number of orders.")] = 100,
    rate: Annotated[float, typer.Option(min=0, help="Reports per second; 0 for no limit.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same orders.")] = 0,
    method: Annotated[Literal["PUT", "POST", "mixed"], typer.Option(help="HTTP method.")] = "mixed",
    duplicates: Annotated[float, _share("sent twice")] = 0.0,
    reorder: Annotated[float, _share("sent after the next one")] = 0.0,
    delay: Annotated[float, _share("sent much later")] = 0.0,
    lose: Annotated[float, _share("never sent")] = 0.0,
    hang_up: Annotated[float, _share("cut off before the response, then sent again")] = 0.0,
    unknown: Annotated[float, _share("sent with an unknown status word")] = 0.0,
    shop: Annotated[
        bool, typer.Option("--shop", help="Also simulate your shop, which subscribes to the service.")
    ] = False,
    shop_slow: Annotated[float | None, _share_of_requests("answered late")] = None,
    shop_fail: Annotated[float | None, _share_of_requests("answered with 500")] = None,
    shop_hang_up: Annotated[float | None, _share_of_requests("accepted and cut off")] = None,
    url: Annotated[
        str,
        typer.Option(help="Webhook URL; by default the configured one, or with --listen the registered one."),
    ] = "",
    listen: Annotated[
        int | None,
        typer.Option(min=0, max=PORT_MAX, help="Port to accept registrations on; 0 for any free one."),
    ] = None,
    read: Annotated[str, typer.Option(help="URL to read the log from; by default the webhook's host.")] = "",
    key: Annotated[
        str,
        typer.Option(
            help="API key of the scope read:bodies, or admin with --shop, if your service requires keys."
        ),
    ] = "",
) -> int | None:
    settings = read_settings(CoreSettings)
    shop_shares = (shop_slow, shop_fail, shop_hang_up)
    if not shop and shop_shares != (None, None, None):
        fail("--shop-slow, --shop-fail and --shop-hang-up need --shop", EXIT_USAGE)
    methods = METHODS if method == "mixed" else (method,)
    troubles = Troubles(lose, duplicates, delay, reorder, hang_up, unknown)
    plan = Plan(seed, datetime.now(UTC), methods, troubles)
    if listen is None:
        url = url or str(webhook_url(settings))
    try:
        if url:
            check_url(url, "--url", is_insecure=True)
        registration = Registration(settings.komerce_api_key.get_secret_value(), url)
        async with AsyncExitStack() as stack:
            with stop_event(signal.SIGINT, signal.SIGTERM) as stopped:
                if listen is not None:
                    await _listen(stack, registration, listen)
                if not await completes(registration.wait(), stopped.wait()):
                    return EXIT_FAILURE
                origin = str(URL(registration.url).origin())
                session = await stack.enter_async_context(aiohttp.ClientSession())
                log = ServiceLog(session, read.rstrip("/") or origin, key)
                start = await log.head()
                subscriber: Shop | None = None
                if shop:
                    shares = (SHOP_SHARE if share is None else share for share in shop_shares)
                    shop_troubles = ShopTroubles(*shares)
                    subscriber = Shop(session, log.base, key, shop_troubles, seed)
                    await stack.enter_async_context(subscriber.subscribing(start))
                secret = settings.webhook_hmac_secret.get_secret_value()
                scheme = make_scheme(secret, settings.webhook_hmac_header)
                simulator = Simulator(registration, session, rate, seed, scheme)
                show(f"pushing {orders:,} orders to {origin}; their numbers begin with {plan.prefix}")
                interruptions = [stopped.wait()]
                if listen is None:
                    # Without --listen a deactivated webhook cannot be registered again.
                    interruptions.append(registration.deactivated.wait())
                progress = asyncio.create_task(_show_progress(simulator, orders))
                is_complete = await completes(simulator.run(plan.journeys(orders)), *interruptions)
                progress.cancel()
                await asyncio.gather(progress, return_exceptions=True)
                if not is_complete:
                    reason = "stopped" if stopped.is_set() else "the webhook was deactivated"
                    show(f"{reason} after {simulator.orders_done:,} of {orders:,} orders")
                elif subscriber is not None:
                    show("waiting until everything is delivered to the simulated shop")
                    await completes(subscriber.settle(), stopped.wait())
            events = [event async for event in log.events(start)]
    except UnusableUrlError as error:
        fail(error, EXIT_USAGE)
    except UnreadableLogError as error:
        fail(error)
    account = compare(simulator.deliveries, events, plan.prefix)
    shop_account = None if subscriber is None else subscriber.account(events)
    for line in (*account.lines(simulator.reports_withheld), *(shop_account.lines() if shop_account else ())):
        show(line)
    return None if account.agrees and (shop_account is None or shop_account.agrees) else EXIT_FAILURE


async def _listen(stack: AsyncExitStack, registration: Registration, port: int) -> None:
    try:
        base = await stack.enter_async_context(registration.listening(LISTEN_HOST, port))
    except OSError as error:
        problem = f"cannot listen on {LISTEN_HOST} port {port}: {error.strerror or error}"
        fail(f"{problem}; choose another port with --listen")
    show(f"the simulated Komerce accepts registrations at {base}/webhook")


async def _show_progress(simulator: Simulator, orders: int) -> None:
    """Show the progress until cancelled: a live bar on a terminal, a line every few seconds elsewhere."""
    started = time.monotonic()
    columns = ("orders", BarColumn(), MofNCompleteColumn(), "{task.fields[reports]}")
    with Progress(*columns, console=out, disable=not out.is_terminal) as progress:
        bar = progress.add_task("orders", total=orders, reports="")
        while True:
            await asyncio.sleep(TERMINAL_SECONDS if out.is_terminal else PIPED_SECONDS)
            count, seconds = simulator.reports_done, time.monotonic() - started
            reports = f"{count:,} reports, {count / seconds:,.0f}/s, {simulator.failures:,} failed attempts"
            progress.update(bar, completed=simulator.orders_done, reports=reports)
            if not out.is_terminal:
                show(f"{simulator.orders_done:,} of {orders:,} orders: {reports}")
