"""``simulate`` and ``register``: Komerce played, and Komerce told where to push to."""

import asyncio
import signal
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import aiohttp
import typer
import uvloop
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from yarl import URL

from service.cli.console import MISUSED, WRONG, end, err, out, plain_errors
from service.cli.send import webhook_url
from service.settings import Settings, read_settings
from service.simulator.account import ServiceLog, UnreadableAccountError, compare
from service.simulator.lifecycles import METHODS, Plan, Troubles
from service.simulator.registration import RegistrationError, UnusableUrlError, check_url, has_token
from service.simulator.registration import register as register_webhook
from service.simulator.simulator import Registration, Simulator

ORDERS_MAX: Final = 1_000_000
TERMINAL_SECONDS: Final = 0.1
# Into a pipe or a file.
PLAIN_SECONDS: Final = 5.0
LISTEN_HOST: Final = "127.0.0.1"


def _share(of: str) -> Any:
    return typer.Option(min=0, max=1, help=f"What share of the reports is {of}.")


@dataclass(frozen=True)
class _Target:
    """Where the simulator pushes, listens and reads; see the options of ``simulate``."""

    url: str
    listen: int | None
    read: str
    key: str


def simulate(  # noqa: PLR0913 - the options of the command
    *,
    orders: Annotated[int, typer.Option(min=1, max=ORDERS_MAX, help="How many orders to tell of.")] = 100,
    rate: Annotated[float, typer.Option(min=0, help="Reports a second; 0: as fast as answers come.")] = 50.0,
    seed: Annotated[int, typer.Option(help="Of every chance: the same seed, the same orders.")] = 0,
    method: Annotated[Literal["PUT", "POST", "mixed"], typer.Option(help="What to push by.")] = "mixed",
    duplicates: Annotated[float, _share("sent twice")] = 0.0,
    reorder: Annotated[float, _share("sent after the next one")] = 0.0,
    delay: Annotated[float, _share("sent much later")] = 0.0,
    lose: Annotated[float, _share("never sent")] = 0.0,
    hang_up: Annotated[float, _share("not waited for, and sent again")] = 0.0,
    unknown: Annotated[float, _share("of an unknown word")] = 0.0,
    url: Annotated[
        str | None,
        typer.Option(
            help="The webhook; the configured one if left out, or with --listen whichever is registered."
        ),
    ] = None,
    listen: Annotated[
        int | None, typer.Option(min=0, max=65_535, help="A port of its own to take registrations on; 0: any.")
    ] = None,
    read: Annotated[str | None, typer.Option(help="Where to read the log; the webhook's host.")] = None,
    key: Annotated[str, typer.Option(help="An API key of the scope read, where keys are on.")] = "",
) -> None:
    with plain_errors():
        settings = read_settings()
        methods = METHODS if method == "mixed" else (method,)
        troubles = Troubles(
            lost=lose, doubled=duplicates, delayed=delay, reordered=reorder, hung_up=hang_up, unknown=unknown
        )
        plan = Plan(seed, datetime.now(UTC), methods, troubles)
        configured = "" if listen is not None else str(webhook_url(settings))
        target = _Target(url or configured, listen, read or "", key)
        try:
            if target.url:
                check_url(target.url, "--url", is_insecure=True)
            code = uvloop.run(_simulate(settings, plan, target, orders, rate))
        except UnusableUrlError as error:
            end(str(error), MISUSED)
        except UnreadableAccountError as error:
            end(str(error))
    raise typer.Exit(code)


def register(
    url: Annotated[str, typer.Argument(help="Where Komerce shall push to, with the token in its path.")],
    *,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let http pass, for a test.")] = False,
) -> None:
    with plain_errors():
        settings = read_settings()
        for name in ("komerce_base_url", "komerce_api_key"):
            if not getattr(settings, name):
                end(f"set ORDER_TRACKING_{name.upper()}: it is needed to register", MISUSED)
        key = settings.komerce_api_key.get_secret_value()
        try:
            asyncio.run(register_webhook(settings.komerce_base_url, key, url, is_insecure=insecure))
        except UnusableUrlError as error:
            end(str(error), MISUSED)
        except RegistrationError as error:
            end(str(error))
        if not has_token(URL(url), [token.get_secret_value() for token in settings.webhook_tokens]):
            err.print("its path ends in no token of ORDER_TRACKING_WEBHOOK_TOKENS: pushes may be answered 404")
    # Its path may hold a token.
    out.print(f"registered: Komerce pushes to {URL(url).origin()} from now on", markup=False)


async def _simulate(settings: Settings, plan: Plan, target: _Target, orders: int, rate: float) -> int:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with AsyncExitStack() as stack:
        registration = Registration(settings.komerce_api_key.get_secret_value(), target.url)
        if target.listen is not None:
            try:
                base = await stack.enter_async_context(registration.listening(LISTEN_HOST, target.listen))
            except OSError as error:
                end(f"cannot listen on {LISTEN_HOST} port {target.listen}: {error.strerror or error}")
            out.print(f"Komerce, simulated, takes registrations at {base}/webhook", markup=False)
        if not await _first(registration.wait(), stopped.wait()):
            return WRONG
        session = await stack.enter_async_context(aiohttp.ClientSession())
        api = ServiceLog(session, target.read.rstrip("/") or str(URL(registration.url).origin()), target.key)
        after = await api.head()
        simulator = Simulator(
            registration,
            session,
            rate=rate,
            seed=plan.seed,
            secret=settings.webhook_hmac_secret.get_secret_value().encode(),
            signature_header=settings.webhook_hmac_header,
        )
        out.print(
            f"pushing to {URL(registration.url).origin()}: {orders:,} orders, {plan.prefix}...", markup=False
        )
        ends: list[Coroutine[Any, Any, object]] = [stopped.wait()]
        if target.listen is None:
            # Nobody could register it again.
            ends.append(registration.deactivated.wait())
        showing = asyncio.create_task(_show(simulator, orders))
        try:
            is_told = await _first(simulator.run(plan.journeys(orders)), *ends)
        finally:
            showing.cancel()
            await asyncio.gather(showing, return_exceptions=True)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(number)
        account = compare(simulator.sent, [event async for event in api.events(after)], plan.prefix)
    if not is_told:
        why = "stopped" if stopped.is_set() else "the webhook was deactivated"
        out.print(f"{why} after {simulator.orders_told:,} of {orders:,} orders", markup=False)
    for line in account.lines():
        out.print(line, markup=False)
    if simulator.withheld:
        out.print(f"never sent    {simulator.withheld:>9,}", markup=False)
    out.print("the account agrees" if account.agrees else "THE ACCOUNT DISAGREES", markup=False)
    return 0 if account.agrees else WRONG


async def _first(work: Coroutine[Any, Any, object], *ends: Coroutine[Any, Any, object]) -> bool:
    """Work until one of the ends has come; tell whether the work was done before."""
    working = asyncio.ensure_future(work)
    tasks = [working, *(asyncio.ensure_future(one) for one in ends)]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    is_done = working.done()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    if is_done:
        working.result()
    return is_done


async def _show(simulator: Simulator, orders: int) -> None:
    """Show how far it is, until cancelled: live on a terminal, else a line now and then."""
    began = time.monotonic()
    columns = ("orders", BarColumn(), MofNCompleteColumn(), "{task.fields[told]}")
    with Progress(*columns, console=out, disable=not out.is_terminal) as progress:
        bar = progress.add_task("orders", total=orders, told="")
        while True:
            await asyncio.sleep(TERMINAL_SECONDS if out.is_terminal else PLAIN_SECONDS)
            rate = simulator.pushes_done / (time.monotonic() - began)
            told = f"{simulator.pushes_done:,} reports, {rate:,.0f}/s, {simulator.refusals:,} failed attempts"
            progress.update(bar, completed=simulator.orders_told, told=told)
            if not out.is_terminal:
                out.print(f"{simulator.orders_told:,} of {orders:,} orders: {told}", markup=False)
