"""The account of the simulated Komerce agrees with a running service, and disagrees with a forged one."""

import asyncio
import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import threading
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from service.features.simulator.simulator import GIVEN_UP_MAX
from tests.support.commands import Completed, call_command
from tests.support.processes import (
    COMMAND,
    RunningService,
    background_command,
    environment,
    read_whole_log,
    run_command,
    running_service,
)
from tests.support.waiting import PATIENCE_SECONDS, until, until_async

TOKEN, SECRET = "token-of-the-simulator", "secret-of-the-simulator"
NUMBER = re.compile(
    r"^(sent|acknowledged|recorded|lost|doubled|altered|given up|never sent) +([\d,]+)", re.MULTILINE
)
NOBODY = "http://127.0.0.1:9"


def numbers(output: str) -> dict[str, int]:
    """Return the numbers of a printed account."""
    return {name: int(number.replace(",", "")) for name, number in NUMBER.findall(output)}


async def events_of_run(url: str, prefix: str) -> list[dict[str, Any]]:
    """Return the events of one run's orders."""
    return [event for event in await read_whole_log(url) if event["order_no"].startswith(prefix)]


def wait_for_events(service: RunningService, more: int) -> None:
    """Wait until the service has recorded this number of additional events."""

    def head() -> int:
        with urllib.request.urlopen(f"{service.url}/projections", timeout=PATIENCE_SECONDS) as response:  # noqa: S310 - our own
            position: int = json.load(response)["head"]
        return position

    before = head()
    until(lambda: head() >= before + more)


def test_with_duplicates_and_reordering_nothing_is_lost_or_doubled(shared_service: RunningService) -> None:
    """Without a rate limit, the account agrees, and every report of the run is in the log."""
    service = shared_service
    done = run_command(
        service.state_dir,
        *("simulate", "--orders", "100", "--rate", "0", "--seed", "4", "--url", f"{service.url}/webhook"),
        *("--duplicates", "0.1", "--reorder", "0.1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    account = numbers(done.stdout)
    assert (account["lost"], account["doubled"], account["altered"], account["given up"]) == (0, 0, 0, 0)
    (prefix,) = re.findall(r"their numbers begin with (\S+-)$", done.stdout, re.MULTILINE)
    events = asyncio.run(events_of_run(service.url, prefix))
    marks = [json.loads(event["data"]["body"])["mark"] for event in events]
    assert account["recorded"] == account["acknowledged"] == len(marks)
    assert account["sent"] == len(set(marks)) < len(marks)
    assert len({event["order_no"] for event in events}) == 100
    verdicts = {event["data"]["verdict"] for event in events}
    assert {"advanced", "repeated", "late"} <= verdicts


def test_the_account_agrees_with_every_trouble(state_dir: Path) -> None:
    """The account also agrees with a token, a signature and API keys; a missing or wrong key is one
    error line.
    """
    guards = {"WEBHOOK_TOKENS": TOKEN, "WEBHOOK_HMAC_SECRET": SECRET}
    with running_service(state_dir, **guards) as service:
        key = call_command(state_dir, "keys", "create", "simulator", "--scope", "read:bodies").stdout.strip()
        run = ("simulate", "--orders", "50", "--rate", "0", "--method", "POST")
        # The simulator takes the webhook URL and its token from the settings.
        settings = {**guards, "PORT": str(service.port)}

        def refused_without_a_key() -> bool:
            return call_command(state_dir, *run, **settings).stderr.startswith(
                f"{service.url} requires an API key"
            )

        # The service checks for new keys once a second.
        until(refused_without_a_key)
        other_key = call_command(state_dir, *run, "--key", "otk_other", **settings)
        assert (other_key.returncode, other_key.stdout) == (1, "")
        assert (
            other_key.stderr
            == f"{service.url} rejects that API key: pass one of the scope read:bodies with --key\n"
        )
        shares = ("--duplicates", "--reorder", "--delay", "--lose", "--hang-up", "--unknown")
        troubles = [part for share in shares for part in (share, "0.1")]
        done = run_command(state_dir, *run, "--key", key, *troubles, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    account = numbers(done.stdout)
    assert (account["lost"], account["doubled"], account["given up"]) == (0, 0, 0)
    assert account["never sent"] > 0
    assert "unrecognised" in done.stdout


def test_a_killed_service_gets_the_reports_after_its_restart(service: RunningService) -> None:
    """After a kill and a restart of the service, retries reach it, and the account agrees."""
    service.settings["PORT"] = str(service.port)
    arguments = ("simulate", "--orders", "100", "--rate", "400", "--url", f"{service.url}/webhook")
    with background_command(service.state_dir, *arguments) as simulator:
        wait_for_events(service, 50)
        service.kill()
        # The simulator gives up after some seconds, and a start may take longer on a busy machine.
        simulator.send_signal(signal.SIGSTOP)
        service.start()
        simulator.send_signal(signal.SIGCONT)
        output, _ = simulator.communicate(timeout=PATIENCE_SECONDS)
    assert simulator.returncode == 0, output
    assert "the account agrees" in output


@asynccontextmanager
async def meddler(service_url: str) -> AsyncIterator[str]:
    """Run a proxy that, of ten reports, answers one itself, forwards one twice and changes one."""
    count = 0

    async def meddle(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        kind = count % 10
        body = await request.read()
        if kind == 1:
            return web.json_response({"outcome": "advanced"})
        if kind == 2:
            body = body.replace(b'"status": ', b'"status":  ')
        async with aiohttp.ClientSession() as session:
            for _ in range(2 if kind == 3 else 1):
                async with session.put(f"{service_url}/webhook", data=body) as response:
                    receipt = await response.read()
        return web.Response(body=receipt, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/webhook", meddle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_a_disagreeing_account_is_exit_1(shared_service: RunningService) -> None:
    """Reports that a proxy drops, duplicates or changes are counted as lost, doubled or altered."""
    service = shared_service
    async with meddler(service.url) as url:
        done = await asyncio.to_thread(
            run_command,
            service.state_dir,
            *("simulate", "--orders", "50", "--rate", "0", "--url", f"{url}/webhook", "--read", service.url),
        )
    assert done.returncode == 1
    assert "THE ACCOUNT DISAGREES" in done.stdout
    account = numbers(done.stdout)
    tenth = account["sent"] // 10
    assert tenth > 20
    assert tenth <= account["doubled"] <= tenth + 1
    assert tenth <= account["altered"] <= tenth + 1
    # A changed report is also lost.
    assert 2 * tenth <= account["lost"] <= 2 * tenth + 2


async def test_a_run_from_the_registration_to_the_account(shared_service: RunningService) -> None:
    """The pushes start after a registration, and an unreachable URL is deactivated until the next registration.

    Without --listen, a deactivated webhook ends the run with its account and exit code 1. The test takes about
    8 s, because an order is given up after several retries.
    """
    service = shared_service
    settings = {"KOMERCE_API_KEY": "a-key-of-ours"}
    listening = ("simulate", "--listen", "0", "--orders", "40", "--rate", "0", "--read", service.url)

    async def register(*arguments: str, **others: str) -> Completed:
        return await asyncio.to_thread(
            call_command, service.state_dir, "register", *arguments, **{**settings, **others}
        )

    without = ("simulate", "--rate", "0", "--url", f"{NOBODY}/webhook", "--read", service.url)
    with (
        background_command(service.state_dir, *listening, **settings) as simulator,
        background_command(service.state_dir, *without) as single,
    ):
        before = len(await read_whole_log(service.url))
        assert simulator.stdout is not None
        line = await asyncio.to_thread(simulator.stdout.readline)
        (base,) = re.findall(r"accepts registrations at (\S+)/webhook$", line)
        settings["KOMERCE_BASE_URL"] = base
        webhook = f"{service.url}/webhook"
        refused = [
            await register(webhook),
            await register("https://shop.example/webhook?token=x"),
            await register(webhook, "--insecure", KOMERCE_BASE_URL=""),
            await register(webhook, "--insecure", KOMERCE_API_KEY="another"),
        ]
        assert [one.returncode for one in refused] == [2, 2, 2, 1]
        assert refused[0].stderr.startswith("the webhook's URL must begin with https://")
        assert refused[2].stderr.startswith("ORDER_TRACKING_KOMERCE_BASE_URL is not set: ")
        assert "returned 401" in refused[3].stderr

        foreign = await register(f"{NOBODY}/other", "--insecure", WEBHOOK_TOKENS=TOKEN)
        assert (foreign.returncode, "pass --force" in foreign.stderr) == (2, True)
        nowhere = await register(f"{NOBODY}/other", "--insecure", "--force", WEBHOOK_TOKENS=TOKEN)
        assert nowhere.stdout == f"registered: Komerce now pushes to {NOBODY}\n"
        async with aiohttp.ClientSession(headers={"x-api-key": settings["KOMERCE_API_KEY"]}) as session:

            async def is_deactivated() -> bool:
                async with session.get(f"{base}/webhook") as response:
                    return not (await response.json())["data"]["is_active"]

            await until_async(is_deactivated)
        assert len(await read_whole_log(service.url)) == before
        assert (await register(webhook, "--insecure")).returncode == 0
        output, _ = await asyncio.to_thread(simulator.communicate, timeout=PATIENCE_SECONDS)
        ended, _ = await asyncio.to_thread(single.communicate, timeout=PATIENCE_SECONDS)
    account = numbers(output)
    assert account["given up"] >= GIVEN_UP_MAX
    assert account["recorded"] == account["sent"] - account["given up"]
    # A report that was given up is never acknowledged, so the run fails.
    assert (simulator.returncode, account["lost"], account["doubled"]) == (1, 0, 0)
    assert single.returncode == 1
    assert "the webhook was deactivated after 0 of 100 orders" in ended
    account = numbers(ended)
    assert account["given up"] >= GIVEN_UP_MAX
    assert (account["acknowledged"], account["recorded"]) == (0, 0)


def test_ctrl_c_stops_the_run_and_prints_the_account(shared_service: RunningService) -> None:
    """After Ctrl-C, the account agrees although reports were in flight."""
    service = shared_service
    arguments = ("simulate", "--orders", "1000", "--rate", "200", "--url", f"{service.url}/webhook")
    with background_command(service.state_dir, *arguments) as simulator:
        wait_for_events(service, 20)
        simulator.send_signal(signal.SIGINT)
        output, _ = simulator.communicate(timeout=PATIENCE_SECONDS)
    assert simulator.returncode == 0, output
    assert re.search(r"^stopped after \d+ of 1,000 orders$", output, re.MULTILINE)
    assert numbers(output)["recorded"] >= 20


def test_on_a_terminal_the_progress_is_live(shared_service: RunningService) -> None:
    """A progress bar shows the reports and their rate, and is redrawn."""
    service = shared_service
    terminal, end = pty.openpty()
    seen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):
            while part := os.read(terminal, 65_536):
                seen.extend(part)

    reader = threading.Thread(target=read)
    reader.start()
    url = f"{service.url}/webhook"
    try:
        subprocess.run(
            [*COMMAND, "simulate", "--orders", "20", "--rate", "100", "--url", url],
            env={**environment(service.state_dir), "TERM": "xterm"},
            cwd=service.state_dir,
            stdin=subprocess.DEVNULL,
            stdout=end,
            stderr=end,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
    finally:
        os.close(end)
        reader.join(PATIENCE_SECONDS)
        os.close(terminal)
    assert len(set(re.findall(rb"\d+ reports, \d+/s", seen))) > 1
    assert b"the account agrees" in seen


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--url", "ftp://x"), 2, "--url is not a valid URL: expected https://host/path\n"),
        (("--url", f"{NOBODY}/webhook"), 1, f"cannot read the log of {NOBODY}: "),
        (("--duplicates", "2"), 2, "Usage: "),
    ],
)
def test_a_simulation_that_cannot_start_is_one_error(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    """An invalid URL, an unreachable service and a share above 1 each end the command with an error."""
    ended = call_command(tmp_path, "simulate", *arguments)
    assert (ended.returncode, ended.stderr[: len(message)]) == (code, message)


def test_a_port_that_is_taken_is_one_line(shared_service: RunningService) -> None:
    """A taken port is a one-line error that names the port, with exit code 1."""
    port = shared_service.url.rpartition(":")[2]
    ended = call_command(shared_service.state_dir, "simulate", "--listen", port)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith(f"cannot listen on 127.0.0.1 port {port}: ")


def test_the_simulated_shop_accounts_for_every_event(state_dir: Path) -> None:
    """The shop is slow, fails and hangs up, and yet gets every event, in order for each order."""
    with running_service(state_dir, SUBSCRIPTION_NETWORKS="127.0.0.0/8") as service:
        done = run_command(
            service.state_dir,
            *("simulate", "--orders", "20", "--rate", "0", "--seed", "7", "--url", f"{service.url}/webhook"),
            *("--duplicates", "0.2", "--shop", "--shop-slow", "0.02", "--shop-fail", "0.1"),
            *("--shop-hang-up", "0.1"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        counts = dict(
            re.findall(r"^(delivered|repeated|lost|out of order|forged) +([\d,]+)", done.stdout, re.MULTILINE)
        )
        recorded = numbers(done.stdout)["recorded"]
        assert int(counts["delivered"]) == recorded > 0
        assert int(counts["repeated"]) > 0
        assert (counts["lost"], counts["out of order"], counts["forged"]) == ("0", "0", "0")
        with urllib.request.urlopen(f"{service.url}/subscriptions", timeout=PATIENCE_SECONDS) as response:  # noqa: S310 - our own
            assert json.load(response)["subscriptions"] == []


def test_the_simulated_shop_needs_an_allowed_network(shared_service: RunningService) -> None:
    """A service that may not deliver to this machine refuses the shop, and the command says why."""
    service = shared_service
    done = run_command(service.state_dir, "simulate", "--shop", "--url", f"{service.url}/webhook")
    assert done.returncode == 1
    assert "ORDER_TRACKING_SUBSCRIPTION_NETWORKS" in done.stderr
