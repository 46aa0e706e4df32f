"""Crashes of PostgreSQL, and the end of the service. ``make faults`` tests every other fault."""

import asyncio
import os
import signal
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from tests.support.commands import call_command
from tests.support.processes import COMMAND, RunningService, running_commands, running_service
from tests.support.waiting import PATIENCE_SECONDS, until, until_async


async def crash(dsn: str) -> None:
    """Kill one of the server's processes with SIGKILL, and wait until the server has ended all the others."""
    ended = asyncio.Event()

    async def takes_connections() -> bool:
        try:
            await (await asyncpg.connect(dsn)).close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            # The server is still recovering from the last crash.
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


async def test_a_crash_does_not_take_back_a_report_that_was_read(service: RunningService) -> None:
    """After a crash of PostgreSQL, a read with after_position still includes the report, or gets 503."""
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
    """SIGTERM at any stage of the start leaves no PostgreSQL running."""
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
    """A service under `nohup order-tracking serve &`, with SIGHUP and SIGINT ignored, survives SIGHUP and ends
    by SIGINT.
    """
    service = RunningService(state_dir)
    service.command = ("sh", "-c", 'trap "" INT HUP; exec "$@"', "sh", *COMMAND)
    try:
        service.start()
        service.process.send_signal(signal.SIGHUP)
        # If SIGHUP stopped the service, it would have begun to stop before this response.
        service.wait_until_it_answers()
        assert service.process.poll() is None
        assert "stopping" not in service.output
        assert service.terminate(signal.SIGINT) == 0
    finally:
        service.end()
    assert f"{state_dir}/postgres" not in running_commands()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_and_its_data_is_there_again(state_dir: Path, number: signal.Signals) -> None:
    """Ctrl-C and SIGTERM end the service with exit code 0 and without leftover processes, and its
    data remains.
    """
    with running_service(state_dir) as service:
        postmaster = service.postmaster_pid
        url = f"{service.url}/webhook"
        sent = call_command(state_dir, "send", "KOM1", "AWB1", "Dikirim", "--url", url)
        assert sent.returncode == 0, sent.stderr
        assert service.terminate(number) == 0, service.output
    with pytest.raises(ProcessLookupError):
        os.kill(postmaster, 0)
    assert "Dikirim" in call_command(state_dir, "audit", "KOM1").stdout


def test_a_token_is_replaced_without_a_restart(state_dir: Path, tmp_path: Path) -> None:
    """SIGHUP reads the tokens again; a bad file changes nothing, and names of tokens may be logged."""
    old, new = "old-token-of-16-characters", "new-token-of-16-characters"
    file = tmp_path / "settings"
    file.write_text(f"ORDER_TRACKING_WEBHOOK_TOKENS={old}\n", encoding="utf-8")
    file.chmod(0o600)
    with running_service(state_dir, ENV_FILE=str(file)) as service:

        def status(token: str) -> int:
            body = b'{"order_no":"KOM1","status":"Dikirim"}'
            request = urllib.request.Request(f"{service.url}/webhook/{token}", body, method="PUT")  # noqa: S310
            try:
                with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
                    return int(answer.status)
            except urllib.error.HTTPError as error:
                return error.code

        def is_kept_again(times: int) -> bool:
            return service.output.count("the tokens stay as they were") > times

        assert (status(old), status(new)) == (200, 404)
        file.write_text(f"ORDER_TRACKING_WEBHOOK_TOKENS=shop:{new}\n", encoding="utf-8")
        service.process.send_signal(signal.SIGHUP)
        until(lambda: "the tokens were read again" in service.output)
        assert (status(old), status(new)) == (404, 200)
        for content in ("ORDER_TRACKING_WEBHOOK_TOKENS=short\n", "ORDER_TRACKING_WEBHOOK_TOKENS=\n"):
            kept = service.output.count("the tokens stay as they were")
            file.write_text(content, encoding="utf-8")
            service.process.send_signal(signal.SIGHUP)
            until(partial(is_kept_again, kept))
            assert (status(old), status(new)) == (404, 200)
        assert old not in service.output
        assert new not in service.output
        assert "shop" in service.output
