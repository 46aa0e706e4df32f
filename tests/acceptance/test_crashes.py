"""What a crash does not take back, and how the service ends. ``make faults`` breaks everything else."""

import asyncio
import os
import signal
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from tests.support.commands import call_command
from tests.support.processes import COMMAND, RunningService, running_commands, running_service
from tests.support.waiting import PATIENCE_SECONDS, until, until_async


async def crash(dsn: str) -> None:
    """Kill -9 one of the server's processes, and wait until the server has ended all the others for it."""
    ended = asyncio.Event()

    async def takes_connections() -> bool:
        try:
            await (await asyncpg.connect(dsn)).close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            # It still recovers from the last crash.
            return False
        return True

    await until_async(takes_connections)
    witness = await asyncpg.connect(dsn)
    witness.add_termination_listener(lambda _connection: ended.set())
    victim = await asyncpg.connect(dsn)
    os.kill(await victim.fetchval("SELECT pg_backend_pid()"), signal.SIGKILL)
    async with asyncio.timeout(PATIENCE_SECONDS):
        await ended.wait()
    victim.terminate()


async def test_what_was_read_once_is_not_taken_back_by_a_crash(service: RunningService) -> None:
    """A read with after_position has the report, before a crash of PostgreSQL and after it, or it is 503."""
    async with aiohttp.ClientSession() as session:
        for number in range(2):
            body = {"order_no": f"KOM{number}", "status": "Dikirim"}
            async with session.put(f"{service.url}/webhook", json=body) as response:
                position = (await response.json())["position"]
            url = f"{service.url}/orders/KOM{number}?after_position={position}"
            async with session.get(url) as response:
                assert response.status == 200
            await crash(service.dsn)

            async def is_read_again(url: str = url) -> bool:
                async with session.get(url) as response:
                    assert response.status in {200, 503}
                    return response.status == 200

            await until_async(is_read_again)


@pytest.mark.parametrize("stage", ["no file yet", "the lock", "the server", "the socket"])
def test_a_service_that_is_ended_at_its_start_leaves_nothing(state_dir: Path, stage: str) -> None:
    """At whatever stage SIGTERM meets it, no PostgreSQL is left running."""
    service = RunningService(state_dir).launch()
    server = f"{state_dir}/postgres"
    conditions = {
        "no file yet": lambda: True,
        "the lock": lambda: (state_dir / "lock").read_bytes().strip(),
        "the server": lambda: server in running_commands(),
        "the socket": lambda: [*(state_dir / "run").glob(".s.PGSQL*")],
    }
    until(conditions[stage], lambda: service.output)
    assert service.terminate() in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    until(lambda: server not in running_commands())


def test_in_the_background_it_outlives_a_terminal_and_ends_by_sigint(state_dir: Path) -> None:
    """As `nohup order-tracking serve &` starts it, with SIGHUP and SIGINT ignored."""
    service = RunningService(state_dir)
    service.command = ("sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *COMMAND)
    try:
        service.start()
        service.process.send_signal(signal.SIGHUP)
        # It would have begun to stop by the time that it answers again.
        service.wait_until_it_answers()
        assert service.process.poll() is None
        assert "stopping" not in service.output
        assert service.terminate(signal.SIGINT) == 0
    finally:
        service.end()
    assert f"{state_dir}/postgres" not in running_commands()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_and_its_data_is_there_again(state_dir: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM alike: exit code 0, no process left, and the data is there at the next start."""
    with running_service(state_dir) as service:
        postmaster = service.postmaster_pid
        url = f"{service.url}/webhook"
        sent = call_command(state_dir, "send", "KOM1", "AWB1", "Dikirim", "--url", url)
        assert sent.returncode == 0, sent.stderr
        assert service.terminate(number) == 0, service.output
    with pytest.raises(ProcessLookupError):
        os.kill(postmaster, 0)
    assert "Dikirim" in call_command(state_dir, "audit", "KOM1").stdout
