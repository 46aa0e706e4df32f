"""What a crash does not take back, and how the service ends. ``make faults`` breaks everything else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from tests.acceptance.running import RunningService, environment, run_command, running_commands

RECOVERED_SECONDS_MAX = 20.0


async def kill_a_backend(dsn: str) -> None:
    """Kill -9 of one of the server's processes, once it takes connections."""
    due = time.monotonic() + RECOVERED_SECONDS_MAX
    while True:
        try:
            connection = await asyncpg.connect(dsn)
            pid: int = await connection.fetchval("SELECT pg_backend_pid()")
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            # It recovers from the one before.
            assert time.monotonic() < due
        else:
            os.kill(pid, signal.SIGKILL)
            connection.terminate()
            return


async def test_what_was_read_once_is_not_taken_back_by_a_crash(service: RunningService) -> None:
    """A read with after_position has the report, before a crash of PostgreSQL and after it, or it is 503."""
    async with aiohttp.ClientSession() as session:
        for number in range(3):
            body = {"order_no": f"KOM{number}", "status": "Dikirim"}
            async with session.put(f"{service.url}/webhook", json=body) as response:
                position = (await response.json())["position"]
            url = f"{service.url}/orders/KOM{number}?after_position={position}"
            async with session.get(url) as response:
                assert response.status == 200
            await kill_a_backend(service.dsn)
            statuses: set[int] = set()
            due = time.monotonic() + RECOVERED_SECONDS_MAX
            while time.monotonic() < due and 200 not in statuses:
                async with session.get(url) as response:
                    statuses.add(response.status)
            assert statuses <= {200, 503}
            assert 200 in statuses


@pytest.mark.parametrize("after", [0.3, 0.7, 1.0])
def test_ended_while_it_starts_it_leaves_nothing(state_dir: Path, after: float) -> None:
    """Whatever it was doing: no PostgreSQL goes on without it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "service", "serve"],
        env=environment(state_dir),
        cwd=state_dir,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(after)
    process.terminate()
    assert process.wait(15) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    assert f"{state_dir}/postgres" not in running_commands()


def test_in_the_background_it_outlives_a_terminal_and_ends_when_it_is_told(state_dir: Path) -> None:
    """As `nohup order-tracking serve &` starts it, with SIGHUP and SIGINT ignored."""
    log = state_dir / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["sh", "-c", 'trap "" INT HUP; exec "$0" -m service serve', sys.executable],
            env=environment(state_dir),
            cwd=state_dir,
            stdout=output,
            stderr=output,
        )
    due = time.monotonic() + RECOVERED_SECONDS_MAX
    while "listens on" not in log.read_text(encoding="utf-8"):
        assert time.monotonic() < due
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(15) == 0
    assert f"{state_dir}/postgres" not in running_commands()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_and_its_data_is_there_again(state_dir: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM alike: exit code 0, no process left, and the next start has the data."""
    service = RunningService(state_dir).start()
    postmaster = service.postmaster_pid
    sent = run_command(state_dir, "send", "KOM1", "AWB1", "Dikirim", "--url", f"{service.url}/webhook")
    assert sent.returncode == 0, sent.stderr
    service.process.send_signal(number)
    assert service.process.wait(15) == 0, service.output
    with pytest.raises(ProcessLookupError):
        os.kill(postmaster, 0)
    again = RunningService(state_dir).start()
    audit = run_command(state_dir, "audit", "KOM1")
    again.end()
    assert "Dikirim" in audit.stdout
