"""Several services on one database and one port, and restarts that leave no request unanswered."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import psutil  # type: ignore[import-untyped]  # it brings no types
import pytest

from tests.support.commands import call_command
from tests.support.folders import ROOT
from tests.support.processes import (
    COMMAND,
    RunningService,
    ended_service,
    environment,
    read_whole_log,
    run_command,
    running_service,
)
from tests.support.steady_clients import bound_socket, steady_clients
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async

NEW_COMMIT: Final = 40 * "f"
TOKEN: Final = "token-of-16-characters"  # noqa: S105 - of the test alone
METRICS: Final = re.compile(r"its own metrics are at (?P<url>\S+)/metrics")


@contextmanager
def several(
    folder: Path,
    dsn: str,
    inherited: socket.socket,
    number: int = 2,
    command: tuple[str, ...] = COMMAND,
    **settings: str,
) -> Iterator[Sequence[RunningService]]:
    """Run some services on one database, which inherit one socket."""
    with ExitStack() as stack:
        services = []
        for _ in range(number):
            service = RunningService(folder, DATABASE_URL=dsn, METRICS_PORT="0", **settings)
            service.command, service.inherited = command, inherited
            services.append(stack.enter_context(ended_service(service)))
        yield services
        for service in services:
            assert service.terminate() == 0, service.output
            assert "Traceback" not in service.output


def own_url(service: RunningService) -> str:
    """Return the address of one service alone."""
    found = METRICS.search(service.output)
    assert found is not None, service.output
    return found["url"]


def fetch(url: str, key: str = "") -> tuple[int, str]:
    """Return the status and the body of a response."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 - our own
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:  # noqa: S310
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def recorded(service: RunningService, key: str = "") -> float:
    """Return the number of reports that one service counts."""
    _, text = fetch(f"{own_url(service)}/metrics", key)
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("webhook_reports_total{")
    )


async def assert_recorded_once(service: RunningService, receipts: list[dict[str, Any]]) -> None:
    """Check that each acknowledged report is in the log once, where its receipt says."""
    log = Counter(
        (event["position"], event["order_no"], event["version"], event["data"]["report_id"])
        for event in await read_whole_log(service.url)
    )
    for one in receipts:
        assert log[one["position"], one["order_no"], one["version"], one["report_id"]] == 1
    assert len({report_id for *_, report_id in log}) == log.total()


async def test_a_killed_service_loses_no_acknowledged_report(tmp_path: Path, owner_dsn: str) -> None:
    """After kill -9 of a service under load, the other serves on alone until it is started again, and the log
    has every acknowledged report once. Clients lose connections alone.
    """
    with bound_socket() as bound, several(tmp_path, owner_dsn, bound) as services:
        async with steady_clients(f"{services[0].url}/webhook") as load:
            for service in services:
                service.kill()
                await load.proceeds()
                await asyncio.to_thread(service.start)
                await load.proceeds()
        assert not load.refusals
        await assert_recorded_once(services[0], load.receipts)


async def test_a_restart_refuses_no_request(state_dir: Path) -> None:
    """A service with its own PostgreSQL is stopped and started again under load. Its port stays open, so all
    responses are 200, and no connection breaks.
    """
    with bound_socket() as bound:
        service = RunningService(state_dir)
        service.inherited = bound
        with ended_service(service):
            async with steady_clients(f"{service.url}/webhook") as load:
                for end in (signal.SIGTERM, signal.SIGINT):
                    assert await asyncio.to_thread(service.terminate, end) == 0, service.output
                    await asyncio.to_thread(service.start)
                    await load.proceeds()
            assert (load.refusals, load.errors) == ({}, {})
            await assert_recorded_once(service, load.receipts)


@pytest.mark.long
async def test_a_new_release_takes_over_without_a_refusal(tmp_path: Path, owner_dsn: str) -> None:
    """Two services are restarted one after the other under load, after new code was installed. All responses
    are 200, no connection breaks, and both run the new code, which defines a view in another way.
    """
    code = tmp_path / "code"
    for name in ("domain", "projections", "service"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "schema.sql", code)
    command = ("env", f"PYTHONPATH={code}", *COMMAND)
    with bound_socket() as bound, several(tmp_path, owner_dsn, bound, command=command) as services:
        assert {commit_of(service) for service in services} != {NEW_COMMIT}
        async with steady_clients(f"{services[0].url}/webhook") as load:
            (code / "service" / "commit.txt").write_text(NEW_COMMIT, encoding="utf-8")
            fold = code / "projections" / "timeline.py"
            text = fold.read_text(encoding="utf-8")
            fold.write_text(re.sub(r"fold_version=\d+", "fold_version=999", text), encoding="utf-8")
            for service in services:
                assert await asyncio.to_thread(service.terminate) == 0, service.output
                await asyncio.to_thread(service.start)
            await until_async(condition(partial(has_views, services[0])))
        assert (load.refusals, load.errors) == ({}, {})
        assert {commit_of(service) for service in services} == {NEW_COMMIT}
        await assert_recorded_once(services[0], load.receipts)
        verified = await asyncio.to_thread(
            subprocess.run,
            [*command, "replay", "--verify"],
            cwd=tmp_path,
            env=environment(tmp_path, DATABASE_URL=owner_dsn),
            capture_output=True,
            check=False,
        )
        assert verified.returncode == 0, verified.stderr


def commit_of(service: RunningService) -> str:
    """Return the commit that a service runs."""
    _, body = fetch(f"{own_url(service)}/livez")
    return str(json.loads(body)["commit"])


def has_views(service: RunningService) -> bool:
    """Return whether all views are up to date in the service that responds."""
    _, body = fetch(f"{service.url}/projections")
    return all(not view["is_outdated"] for view in json.loads(body)["projections"])


def send_reports(url: str, number: int) -> None:
    """Send reports to a webhook, each on its own connection."""
    for _ in range(number):
        body = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'
        request = urllib.request.Request(url, body, method="PUT")  # noqa: S310 - our own
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:  # noqa: S310
            assert response.status == 200


@pytest.mark.long
def test_the_connections_of_a_suspended_service_are_accepted_by_another(tmp_path: Path, owner_dsn: str) -> None:
    """New connections do not wait for a service that is suspended, even if it does not respond for long."""
    with bound_socket() as bound, several(tmp_path, owner_dsn, bound) as services:
        suspended, other = services
        send_reports(f"{other.url}/webhook", 20)
        assert recorded(suspended) + recorded(other) == 20
        before = recorded(other)
        process = psutil.Process(suspended.process.pid)
        process.suspend()
        try:
            send_reports(f"{other.url}/webhook", 20)
            assert recorded(other) == before + 20
        finally:
            process.resume()
        assert recorded(suspended) + recorded(other) == 40


def test_each_service_has_an_address_of_its_own_for_its_metrics(tmp_path: Path, owner_dsn: str) -> None:
    """It has this service's metrics, life and readiness, with the same API keys, and nothing else."""
    key = call_command(tmp_path, "keys", "create", "metrics", DATABASE_URL=owner_dsn).stdout.strip()
    settings = {"DATABASE_URL": owner_dsn, "METRICS_PORT": "0", "WEBHOOK_TOKENS": TOKEN}
    with running_service(tmp_path, **settings) as service:
        send_reports(f"{service.url}/webhook/{TOKEN}", 1)
        own = own_url(service)
        assert own != service.url
        for url in (own, service.url):
            assert fetch(f"{url}/livez")[0] == 200
            assert fetch(f"{url}/readyz") == (200, '{"status":"ready"}\n')
            assert fetch(f"{url}/metrics")[0] == 401
            assert fetch(f"{url}/metrics", key)[0] == 200
        assert recorded(service, key) == 1
        for path in ("/orders", f"/webhook/{TOKEN}", "/projections", "/"):
            assert fetch(f"{own}{path}", key)[0] == 404


def test_a_metrics_port_that_is_taken_ends_the_start(tmp_path: Path, owner_dsn: str) -> None:
    """The error names the address."""
    with bound_socket() as bound:
        port = bound.getsockname()[1]
        ended = run_command(tmp_path, "serve", DATABASE_URL=owner_dsn, METRICS_PORT=str(port))
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in ended.stderr


def test_an_inherited_port_that_strangers_reach_is_no_open_port(tmp_path: Path, owner_dsn: str) -> None:
    """Whether the service is open to this machine's programs depends on the inherited address, not on HOST."""
    with socket.create_server(("0.0.0.0", 0)) as bound:  # noqa: S104 - what the test is about
        service = RunningService(tmp_path, DATABASE_URL=owner_dsn)
        service.inherited = bound
        with ended_service(service):
            assert "THE WEBHOOK IS OPEN TO EVERY HOST THAT REACHES THIS ADDRESS" in service.output
            assert fetch(f"{service.url}/orders")[0] == 401


def test_a_setting_of_an_earlier_release_stops_no_service(tmp_path: Path, owner_dsn: str) -> None:
    """One line names the setting or the option, and what replaces it. One service starts."""
    for option, settings in (((), {"PROCESSES": "4"}), (("--processes", "4"), {})):
        with running_service(tmp_path, *option, DATABASE_URL=owner_dsn, **settings) as service:
            send_reports(f"{service.url}/webhook", 1)
            lines = [line for line in service.output.splitlines() if "has no effect any more" in line]
            assert len(lines) == 1
            assert ("ORDER_TRACKING_PROCESSES" if settings else "--processes") in lines[0]
            assert "start several services on one database" in lines[0]
            assert not psutil.Process(service.process.pid).children()


def test_a_port_in_use_ends_the_start(tmp_path: Path, owner_dsn: str) -> None:
    """Without SO_REUSEPORT in the settings, two services cannot share a port by mistake."""
    with running_service(tmp_path, DATABASE_URL=owner_dsn) as service:
        second = run_command(tmp_path, "serve", DATABASE_URL=owner_dsn, PORT=str(service.port))
        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1 port {service.port}" in second.stderr
