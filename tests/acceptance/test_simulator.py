"""Komerce, simulated, against a service that really runs: every account agrees, and a forged one does not."""

import asyncio
import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from service.api_keys import KNOWN_SECONDS_MAX
from service.simulation.simulator import GIVEN_UP_MAX
from tests.acceptance.running import RunningService, environment, run_command, whole_log
from tests.conftest import make_folder

TOKEN, SECRET = "token-of-the-simulator", "secret-of-the-simulator"
NUMBER = re.compile(
    r"^(sent|acknowledged|recorded|lost|doubled|altered|given up|never sent) +([\d,]+)", re.MULTILINE
)
NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """One service for all of them: every run tells of orders of its own."""
    folder = make_folder()
    service = RunningService(folder).start()
    yield service
    service.end()
    shutil.rmtree(folder, ignore_errors=True)


def numbers(output: str) -> dict[str, int]:
    """The account, as it was printed."""
    return {name: int(number.replace(",", "")) for name, number in NUMBER.findall(output)}


@contextmanager
def simulating(state_dir: Path, *arguments: str, **settings: str) -> "Iterator[subprocess.Popen[str]]":
    """A simulator that runs meanwhile."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "simulate", *arguments],
        env=environment(state_dir, **settings),
        cwd=state_dir,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_events(service: RunningService, more: int) -> None:
    """Until the service has recorded so many."""
    due = time.monotonic() + 20
    before = len(asyncio.run(whole_log(service.url)))
    while len(asyncio.run(whole_log(service.url))) < before + more:
        assert time.monotonic() < due
        time.sleep(0.05)


def test_with_duplicates_and_reordering_nothing_is_lost_or_doubled(service: RunningService) -> None:
    """300 orders, as fast as answers come: the account agrees, and with the log, report by report."""
    done = run_command(
        service.state_dir,
        *("simulate", "--orders", "300", "--rate", "0", "--seed", "4", "--url", f"{service.url}/webhook"),
        *("--duplicates", "0.1", "--reorder", "0.1"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    account = numbers(done.stdout)
    assert (account["lost"], account["doubled"], account["altered"], account["given up"]) == (0, 0, 0, 0)
    (prefix,) = re.findall(r"300 orders, (\S+-)\.\.\.", done.stdout)
    events = [one for one in asyncio.run(whole_log(service.url)) if one["order_no"].startswith(prefix)]
    marks = [json.loads(event["data"]["body"])["mark"] for event in events]
    assert account["recorded"] == account["acknowledged"] == len(marks)
    assert account["sent"] == len(set(marks)) < len(marks)
    assert len({event["order_no"] for event in events}) == 300
    verdicts = {event["data"]["verdict"] for event in events}
    assert {"advanced", "repeated", "late"} <= verdicts


def test_whatever_goes_wrong_on_the_way_the_account_agrees(state_dir: Path) -> None:
    """Behind a token, a signature and keys, with every trouble there is; without a key it asks for one."""
    guards = {"WEBHOOK_TOKENS": TOKEN, "WEBHOOK_HMAC_SECRET": SECRET}
    service = RunningService(state_dir, **guards).start()
    try:
        key = run_command(state_dir, "keys", "create", "simulator").stdout.strip()
        # A new key counts within a second.
        time.sleep(KNOWN_SECONDS_MAX)
        run = ("simulate", "--orders", "100", "--rate", "0", "--method", "POST")
        # The URL of the settings, with their token.
        settings = {**guards, "PORT": service.url.rpartition(":")[2]}
        for_want_of_a_key = run_command(state_dir, *run, **settings)
        assert (for_want_of_a_key.returncode, for_want_of_a_key.stdout) == (1, "")
        assert for_want_of_a_key.stderr == f"{service.url} wants a key: give one of the scope read with --key\n"
        other_key = run_command(state_dir, *run, "--key", "otk_other", **settings)
        assert (
            other_key.stderr == f"{service.url} does not take that key: give one of the scope read with --key\n"
        )
        shares = ("--duplicates", "--reorder", "--delay", "--lose", "--hang-up", "--unknown")
        troubles = [part for share in shares for part in (share, "0.1")]
        done = run_command(state_dir, *run, "--key", key, *troubles, **settings)
        assert done.returncode == 0, done.stdout + done.stderr
        account = numbers(done.stdout)
        assert (account["lost"], account["doubled"], account["given up"]) == (0, 0, 0)
        assert account["never sent"] > 0
        assert "unrecognised" in done.stdout
    finally:
        service.end()


def test_a_service_that_is_killed_meanwhile_is_pushed_to_again(service: RunningService) -> None:
    """Retries find the service that is started again, and the account agrees."""
    service.settings["PORT"] = service.url.rpartition(":")[2]
    arguments = ("--orders", "200", "--rate", "600", "--url", f"{service.url}/webhook")
    with simulating(service.state_dir, *arguments) as simulator:
        wait_for_events(service, 100)
        service.kill()
        service.start()
        output, _ = simulator.communicate(timeout=40)
    account = numbers(output)
    assert simulator.returncode == 0, output
    assert account["sent"] > 1_000
    assert "the account agrees" in output


@asynccontextmanager
async def meddler(service_url: str) -> AsyncIterator[str]:
    """What stands between: of ten reports it answers one itself, sends one on twice, and changes one."""
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
                    answer = await response.read()
        return web.Response(body=answer, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/webhook", meddle)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_an_account_that_does_not_agree_is_exit_1(service: RunningService) -> None:
    """What was acknowledged and is not there, was recorded twice, or otherwise, is counted as that."""
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
    # The changed ones are not there as they were sent.
    assert 2 * tenth <= account["lost"] <= 2 * tenth + 2


async def test_komerce_whole_from_the_registration_to_the_account(service: RunningService) -> None:
    """Nothing is pushed before a URL is registered; one where nobody is is deactivated until the next one.

    Where it cannot be registered again, a deactivated webhook ends the run with its account, and exit 1.
    """
    settings = {"KOMERCE_API_KEY": "a-key-of-ours"}
    arguments = ("--listen", "0", "--orders", "60", "--rate", "0", "--read", service.url)

    def register(*given: str, **others: str) -> "subprocess.CompletedProcess[str]":
        return run_command(service.state_dir, "register", *given, **{**settings, **others})

    without = ("--rate", "0", "--url", f"{NOBODY}/webhook", "--read", service.url)
    with (
        simulating(service.state_dir, *arguments, **settings) as simulator,
        simulating(service.state_dir, *without) as single,
    ):
        before = len(await whole_log(service.url))
        assert simulator.stdout is not None
        line = await asyncio.to_thread(simulator.stdout.readline)
        (base,) = re.findall(r"takes registrations at (\S+)/webhook$", line)
        settings["KOMERCE_BASE_URL"] = base
        webhook = f"{service.url}/webhook"
        refused = [
            register(webhook),
            register("https://shop.example/webhook?token=x"),
            register(webhook, "--insecure", KOMERCE_BASE_URL=""),
            register(webhook, "--insecure", KOMERCE_API_KEY="another"),
        ]
        assert [one.returncode for one in refused] == [2, 2, 2, 1]
        assert refused[0].stderr.startswith("the webhook's URL must begin with https://")
        assert refused[2].stderr == "set ORDER_TRACKING_KOMERCE_BASE_URL: it is needed to register\n"
        assert "answers 401" in refused[3].stderr

        nowhere = register(f"{NOBODY}/webhook", "--insecure", WEBHOOK_TOKENS=TOKEN)
        assert nowhere.stdout == f"registered: Komerce pushes to {NOBODY} from now on\n"
        assert "ends in no token" in nowhere.stderr
        async with aiohttp.ClientSession(headers={"x-api-key": settings["KOMERCE_API_KEY"]}) as session:
            async with asyncio.timeout(30):
                is_active = True
                while is_active:
                    await asyncio.sleep(0.1)
                    async with session.get(f"{base}/webhook") as response:
                        is_active = (await response.json())["data"]["is_active"]
        assert len(await whole_log(service.url)) == before
        assert register(webhook, "--insecure").returncode == 0
        output, _ = await asyncio.to_thread(simulator.communicate, timeout=30)
        ended, _ = await asyncio.to_thread(single.communicate, timeout=30)
    account = numbers(output)
    assert account["given up"] >= GIVEN_UP_MAX
    assert account["recorded"] == account["sent"] - account["given up"]
    # What was given up was never acknowledged: the sender must know of it.
    assert (simulator.returncode, account["lost"], account["doubled"]) == (1, 0, 0)
    assert single.returncode == 1
    assert "the webhook was deactivated after 0 of 100 orders" in ended
    account = numbers(ended)
    assert account["given up"] >= GIVEN_UP_MAX
    assert (account["acknowledged"], account["recorded"]) == (0, 0)


def test_ctrl_c_ends_it_with_the_account_of_what_was_sent(service: RunningService) -> None:
    """Whatever was on its way."""
    arguments = ("--orders", "1000", "--rate", "200", "--url", f"{service.url}/webhook")
    with simulating(service.state_dir, *arguments) as simulator:
        wait_for_events(service, 20)
        simulator.send_signal(signal.SIGINT)
        output, _ = simulator.communicate(timeout=20)
    assert simulator.returncode == 0, output
    assert re.search(r"^stopped after \d+ of 1,000 orders$", output, re.MULTILINE)
    assert numbers(output)["recorded"] >= 20


def test_on_a_terminal_the_progress_is_live(service: RunningService) -> None:
    """A bar with orders, reports and their rate, drawn again and again; a pipe has plain lines."""
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
            [sys.executable, "-m", "service", "simulate", "--orders", "20", "--rate", "100", "--url", url],
            env={**environment(service.state_dir), "TERM": "xterm"},
            cwd=service.state_dir,
            stdin=subprocess.DEVNULL,
            stdout=end,
            stderr=end,
            timeout=30,
            check=True,
        )
    finally:
        os.close(end)
        reader.join(10)
        os.close(terminal)
    assert len(set(re.findall(rb"\d+ reports, \d+/s", seen))) > 3
    assert b"the account agrees" in seen


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("--url", "ftp://x"), 2, "--url is no https:// URL\n"),
        (("--url", f"{NOBODY}/webhook"), 1, f"{NOBODY} cannot be read: "),
        (("--duplicates", "2"), 2, "Usage: "),
    ],
)
def test_what_cannot_be_simulated_is_told(
    state_dir: Path, arguments: tuple[str, ...], code: int, said: str
) -> None:
    """A URL that is none, a service that is not there, a share of more than all."""
    ended = run_command(state_dir, "simulate", *arguments)
    assert (ended.returncode, ended.stderr[: len(said)]) == (code, said)


def test_a_port_that_is_taken_is_told(service: RunningService) -> None:
    """In one line, exit 1."""
    port = service.url.rpartition(":")[2]
    ended = run_command(service.state_dir, "simulate", "--listen", port)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith(f"cannot listen on 127.0.0.1 port {port}: ")
