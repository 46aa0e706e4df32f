"""Several processes of one service: they serve one port, outlive each other's death, and look like one."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import aiohttp
import psutil  # type: ignore[import-untyped]  # it brings no types
import pytest
from prometheus_client.parser import text_string_to_metric_families

from projections.postgres_errors import Connection
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
    worker_pids,
)
from tests.support.waiting import PATIENCE_SECONDS, condition, until, until_async

NEW_COMMIT: Final = 40 * "f"
REPLACED: Final = "all processes were replaced"
TOKEN: Final = "token-of-16-characters"  # noqa: S105 - of the test alone
CLIENTS: Final = 12
# The pause of a client between two reports.
PAUSE_SECONDS: Final = 0.05
# Responses of a load before and after its fault.
MANY: Final = 200


def workers_of(service: RunningService) -> set[int]:
    """Return the process ids of the processes that serve."""
    return set(worker_pids(service))


def ready_processes(service: RunningService) -> int:
    """Return how many processes are ready, by the response of one of them, which is ready too."""
    with urllib.request.urlopen(f"{service.url}/readyz", timeout=PATIENCE_SECONDS) as response:  # noqa: S310
        health: dict[str, Any] = json.load(response)
    assert health["status"] == "ready"
    return int(health["ready_processes"])


def has_replaced(service: RunningService, times: int) -> bool:
    """Return whether the service has replaced all of its processes that often."""
    return service.output.count(REPLACED) == times


def is_restored(service: RunningService, killed: int, processes: int) -> bool:
    """Return whether another process has taken the place of a killed one."""
    return killed not in workers_of(service) and ready_processes(service) == processes


def scrape(service: RunningService, key: str = "") -> dict[str, float]:
    """Return every sample of the metrics, by its name and its labels."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{service.url}/metrics", headers=headers)  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:  # noqa: S310
        families = [*text_string_to_metric_families(response.read().decode())]
    # Each series is there once, whichever process responds.
    samples = [
        (f"{one.name}{sorted(one.labels.items())}", one.value) for family in families for one in family.samples
    ]
    assert max(Counter(name for name, _ in samples).values()) == 1
    return dict(samples)


def recorded(samples: dict[str, float]) -> float:
    """Return the number of reports that the metrics count."""
    return sum(value for name, value in samples.items() if name.startswith("webhook_reports_total"))


class Load:
    """Clients that send reports at a steady rate, which leaves time to start processes.

    Half of them keep their connection, the others open one for each report. A report without a response is sent
    again. POST is sent once by aiohttp, while it would silently send a PUT again.
    """

    def __init__(self, url: str) -> None:
        self.receipts: list[dict[str, Any]] = []
        self.refusals: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self._url = url
        self._numbers = count(1)

    async def run(self, *, keeps: bool) -> None:
        """Send until cancelled."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=not keeps)) as session:
            while True:
                number = next(self._numbers)
                body = {"order_no": f"KOM{number % 50}", "cnote": "AWB1", "status": "Dikirim", "number": number}
                while not await self._send(session, body):
                    pass
                await asyncio.sleep(PAUSE_SECONDS)

    async def _send(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> bool:
        try:
            async with session.post(f"{self._url}", json=body) as response:
                if response.status == 200:
                    self.receipts.append(await response.json())
                else:
                    self.refusals[f"{response.status} {await response.text()}"] += 1
        except aiohttp.ClientConnectionError as error:
            self.errors[repr(error)] += 1
            await asyncio.sleep(0.01)
            return False
        return True

    async def proceeds(self) -> None:
        """Wait until more reports are recorded."""
        target = len(self.receipts) + MANY
        await until_async(condition(lambda: len(self.receipts) >= target), lambda: (self.errors, self.refusals))


@asynccontextmanager
async def load_on(url: str) -> AsyncIterator[Load]:
    """Send reports during the block, and before and after it."""
    load = Load(url)
    clients = [asyncio.create_task(load.run(keeps=bool(number % 2))) for number in range(CLIENTS)]
    try:
        await load.proceeds()
        yield load
        await load.proceeds()
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


@contextmanager
def several(
    folder: Path, dsn: str, count: int = 2, command: tuple[str, ...] = COMMAND, **settings: str
) -> Iterator[RunningService]:
    """Run a service of several processes, and check that it leaves none."""
    service = RunningService(folder, DATABASE_URL=dsn, PROCESSES=str(count), **settings)
    service.command = command
    with ended_service(service):
        pids = workers_of(service)
        assert len(pids) == count
        yield service
        pids |= workers_of(service)
        assert service.terminate() == 0, service.output
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    assert service.output.count("order-tracking is listening on") == 1
    assert "Traceback" not in service.output


async def assert_recorded_once(service: RunningService, receipts: list[dict[str, Any]]) -> None:
    """Check that each acknowledged report is in the log once, where its receipt says."""
    log = Counter(
        (event["position"], event["order_no"], event["version"], event["data"]["report_id"])
        for event in await read_whole_log(service.url)
    )
    for one in receipts:
        assert log[one["position"], one["order_no"], one["version"], one["report_id"]] == 1
    assert len({report_id for *_, report_id in log}) == log.total()


async def test_a_killed_process_loses_no_acknowledged_report(tmp_path: Path, owner_dsn: str) -> None:
    """After kill -9 of a process under load, the others serve on, another replaces it, and the log has every
    acknowledged report once. Clients lose connections alone, and the metrics never count fewer reports than
    before.
    """
    with several(tmp_path, owner_dsn) as service:
        counted = 0.0
        async with load_on(f"{service.url}/webhook") as load:
            for _ in range(2):
                before = workers_of(service)
                os.kill(min(before), signal.SIGKILL)
                while not (len(workers_of(service) - before) == 1 and ready_processes(service) == 2):
                    samples = await asyncio.to_thread(scrape, service)
                    assert recorded(samples) >= counted
                    counted = recorded(samples)
                await load.proceeds()
        assert not load.refusals
        assert service.output.count("a process ended and is restarted") == 2
        assert scrape(service)["worker_restarts_total[('cause', 'ended')]"] == 2
        await assert_recorded_once(service, load.receipts)


async def test_a_rolling_restart_refuses_no_request(tmp_path: Path, owner_dsn: str) -> None:
    """SIGHUP under load replaces every process: all responses are 200, no connection breaks, and the new
    processes have the new settings. A wrong settings file changes nothing.
    """
    file = tmp_path / "settings"
    file.write_text(f"ORDER_TRACKING_WEBHOOK_TOKENS=old:{TOKEN}\n", encoding="utf-8")
    file.chmod(0o600)
    key = call_command(tmp_path, "keys", "create", "metrics", DATABASE_URL=owner_dsn).stdout.strip()
    with several(tmp_path, owner_dsn, ENV_FILE=str(file)) as service:
        before = workers_of(service)
        url = f"{service.url}/webhook/{TOKEN}"
        async with load_on(url) as load:
            file.write_text("ORDER_TRACKING_WEBHOOK_TOKENS=short\n", encoding="utf-8")
            service.process.send_signal(signal.SIGHUP)
            await until_async(condition(lambda: "the processes stay as they were" in service.output))
            assert workers_of(service) == before
            file.write_text(f"ORDER_TRACKING_WEBHOOK_TOKENS=new:{TOKEN}\n", encoding="utf-8")
            for times in (1, 2):
                service.process.send_signal(signal.SIGHUP)
                await until_async(condition(partial(has_replaced, service, times)))
        assert (load.refusals, load.errors) == ({}, {})
        after = workers_of(service)
        assert len(after) == 2
        assert not before & after
        samples = scrape(service, key)
        assert samples["worker_restarts_total[('cause', 'reload')]"] == 4
        # A client that was cancelled may have a recorded report without a receipt.
        assert len(load.receipts) <= recorded(samples) <= len(load.receipts) + CLIENTS


@pytest.mark.long
async def test_a_new_release_takes_over_without_a_refusal(tmp_path: Path, owner_dsn: str) -> None:
    """SIGHUP under load, after new code was installed: all responses are 200, no connection breaks, and the
    processes run the new code, which rebuilds the view that it defines in another way.
    """
    code = tmp_path / "code"
    for name in ("domain", "projections", "service"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "schema.sql", code)
    command = ("env", f"PYTHONPATH={code}", *COMMAND)
    with several(tmp_path, owner_dsn, command=command) as service:
        assert commit_of(service) != NEW_COMMIT
        async with load_on(f"{service.url}/webhook") as load:
            (code / "service" / "commit.txt").write_text(NEW_COMMIT, encoding="utf-8")
            fold = code / "projections" / "timeline.py"
            text = fold.read_text(encoding="utf-8")
            fold.write_text(re.sub(r"fold_version=\d+", "fold_version=999", text), encoding="utf-8")
            service.process.send_signal(signal.SIGHUP)
            await until_async(condition(lambda: REPLACED in service.output))
            await until_async(condition(partial(has_views, service)))
        assert (load.refusals, load.errors) == ({}, {})
        assert {commit_of(service) for _ in range(10)} == {NEW_COMMIT}
        await assert_recorded_once(service, load.receipts)
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
    """Return the commit of the process that responds."""
    with urllib.request.urlopen(f"{service.url}/livez", timeout=PATIENCE_SECONDS) as response:  # noqa: S310
        return str(json.load(response)["commit"])


def has_views(service: RunningService) -> bool:
    """Return whether all views are up to date in the process that responds."""
    with urllib.request.urlopen(f"{service.url}/projections", timeout=PATIENCE_SECONDS) as response:  # noqa: S310
        views = json.load(response)["projections"]
    return all(not view["is_outdated"] for view in views)


def send_reports(service: RunningService, number: int) -> None:
    """Send reports, each on its own connection, so that every process gets some."""
    for _ in range(number):
        body = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'
        request = urllib.request.Request(f"{service.url}/webhook", body, method="PUT")  # noqa: S310 - our own
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as response:  # noqa: S310
            assert response.status == 200


@pytest.mark.long
def test_the_metrics_are_those_of_all_processes_and_outlive_them(tmp_path: Path, owner_dsn: str) -> None:
    """Every scrape, whichever process responds, counts the reports of all, also after each was killed, and
    after each was replaced. Gauges of the database appear once, and a killed process holds no budget.
    """
    with several(tmp_path, owner_dsn, 3) as service:
        send_reports(service, 60)
        for _ in range(10):
            assert recorded(scrape(service)) == 60
        samples = scrape(service)
        assert samples["webhook_commit_seconds_count[]"] == samples["webhook_batch_reports_sum[]"] == 60
        assert samples["workers[('state', 'configured')]"] == samples["workers[('state', 'ready')]"] == 3
        assert samples["budget_max[('budget', 'streams')]"] == 3 * 2_000
        assert samples["projection_lag_events[('view', 'timeline')]"] >= 0
        for pid in workers_of(service):
            os.kill(pid, signal.SIGKILL)
            until(partial(is_restored, service, pid, 3))
        assert recorded(scrape(service)) == 60
        send_reports(service, 30)
        assert recorded(scrape(service)) == 90
        service.process.send_signal(signal.SIGHUP)
        until(lambda: REPLACED in service.output)
        samples = scrape(service)
        assert recorded(samples) == samples["webhook_commit_seconds_bucket[('le', '+Inf')]"] == 90
        assert samples["worker_restarts_total[('cause', 'ended')]"] == 3
        assert samples["workers[('state', 'unanswered')]"] == 0
        assert (
            samples["process_start_time_seconds[]"] < 1.001 * psutil.Process(service.process.pid).create_time()
        )


@pytest.mark.long
def test_the_connections_of_a_frozen_process_are_accepted_by_another(tmp_path: Path, owner_dsn: str) -> None:
    """A process that does not respond is not ready. New connections and scrapes do not wait for it, and its
    counts stay in the sums.
    """
    with several(tmp_path, owner_dsn) as service:
        send_reports(service, 20)
        assert recorded(scrape(service)) == 20
        frozen = psutil.Process(min(workers_of(service)))
        frozen.suspend()
        try:
            until(lambda: "a process does not respond" in service.output)
            send_reports(service, 20)
            assert ready_processes(service) == 1
            samples = scrape(service)
            assert samples["workers[('state', 'unanswered')]"] == 1
            assert recorded(samples) == 40
        finally:
            frozen.resume()
        until(lambda: "a process responds again" in service.output)
        assert ready_processes(service) == 2
        assert recorded(scrape(service)) == 40


@pytest.mark.long
def test_the_processes_end_with_their_supervisor(tmp_path: Path, owner_dsn: str) -> None:
    """After kill -9 of the supervisor, its processes end by themselves, and the port is free."""
    with running_service(tmp_path, DATABASE_URL=owner_dsn, PROCESSES="2") as service:
        pids = workers_of(service)
        service.kill()
        until(lambda: not any(map(psutil.pid_exists, pids)))
        assert service.output.count("the supervisor has ended") == 2
        with several(tmp_path, owner_dsn, PORT=str(service.port)) as successor:
            send_reports(successor, 1)


@pytest.mark.parametrize(
    "end", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)], ids=lambda end: end.name
)
def test_the_embedded_postgresql_is_the_supervisors(state_dir: Path, end: signal.Signals) -> None:
    """The option starts several processes on one embedded PostgreSQL, which a rolling restart leaves running.
    SIGTERM ends them all, and so does SIGINT.
    """
    with running_service(state_dir, "--processes", "3") as service:
        postmaster = service.postmaster_pid
        assert psutil.Process(postmaster).ppid() == service.process.pid
        pids = workers_of(service)
        assert len(pids) == 3
        service.process.send_signal(signal.SIGHUP)
        until(lambda: REPLACED in service.output)
        pids |= workers_of(service)
        send_reports(service, 10)
        assert service.postmaster_pid == postmaster
        assert service.terminate(end) == 0, service.output
    assert not [pid for pid in (postmaster, *pids) if psutil.pid_exists(pid)]


@pytest.mark.long
async def test_a_port_in_use_and_a_process_that_cannot_start_end_the_start(
    tmp_path: Path, owner_dsn: str, connection: Connection
) -> None:
    """Without SO_REUSEPORT in the settings, two services cannot share a port by mistake. An error of the first
    process ends the start, with its line and its exit code.
    """
    with several(tmp_path, owner_dsn) as service:
        second = run_command(tmp_path, "serve", DATABASE_URL=owner_dsn, PROCESSES="2", PORT=str(service.port))
        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1 port {service.port}" in second.stderr
    await connection.execute("ALTER TABLE erasures RENAME TO changed_by_hand")
    first = run_command(tmp_path, "serve", DATABASE_URL=owner_dsn, PROCESSES="2")
    assert first.returncode == 1
    assert first.stderr == 'the database rejected the command: relation "public.erasures" does not exist\n'


@pytest.mark.parametrize("number", ["0", "65"])
def test_a_wrong_number_of_processes_is_refused(tmp_path: Path, number: str) -> None:
    """The error names the setting or the option, the value, and the possible values."""
    reason = f"{number} processes cannot serve. Expected 1 to 64, about one for each core\n"
    setting = call_command(tmp_path, "serve", PROCESSES=number)
    assert (setting.returncode, setting.stderr) == (2, f"ORDER_TRACKING_PROCESSES: {reason}")
    option = call_command(tmp_path, "serve", "--processes", number)
    assert (option.returncode, option.stderr) == (2, f"--processes: {reason}")
