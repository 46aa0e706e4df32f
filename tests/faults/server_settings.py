"""States and settings of a server that an operator may choose, or that another application causes."""

import asyncio
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import asyncpg

from projections.postgres import Connection
from service.database.schema import SERVICE_ROLE
from service.event_log.store import APPEND_LOCK
from tests.faults.fault import expect_check_fails, until_refused
from tests.faults.world import World
from tests.support.waiting import until_async

# Each is set for the database while the service runs, and reaches its new connections.
DEFAULTS: Final = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "statement_timeout": "300ms",
    "lock_timeout": "300ms",
    "idle_session_timeout": "300ms",
    "idle_in_transaction_session_timeout": "300ms",
    "transaction_timeout": "300ms",
}
# Longer than each of these timeouts, and shorter than a report's time.
STALL_SECONDS: Final = 1.0
# The smallest notification queue: 512 KB.
NOTIFY_SETTINGS: Final = {"max_notify_queue_pages": "64"}
# The service uses fewer connections, and the harness takes the rest.
FEW_CONNECTIONS: Final = {"max_connections": "24"}

END_CONNECTIONS: Final = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = 'order-tracking' AND pid <> pg_backend_pid()
"""
# A transaction's equal payloads are sent once.
FILL_QUEUE: Final = "SELECT pg_notify('unrelated', n || repeat('x', 7900)) FROM generate_series(1, 16) AS n"
NOTIFY: Final = "SELECT pg_notify('unrelated', '')"
RECOVERY_REPORTS: Final = 1_000
RIGHTS: Final = f"INSERT (originator_id, originator_version, topic, state) ON order_events {{}} {SERVICE_ROLE}"


async def change_defaults(world: World) -> int:
    """Change the database's defaults. Not one of them may refuse a report, or end a rebuild."""
    connection = await world.connect()
    database = await connection.fetchval("SELECT current_database()")
    already = len(world.load.refused)
    try:
        for name, value in DEFAULTS.items():
            await connection.execute(f"ALTER DATABASE {database} SET {name} = '{value}'")
        await connection.execute(END_CONNECTIONS)
        if await world.load.proceeds():
            await connection.execute("SELECT pg_advisory_lock($1)", APPEND_LOCK)
            await asyncio.sleep(STALL_SECONDS)
            await connection.execute("SELECT pg_advisory_unlock($1)", APPEND_LOCK)
            await world.load.recovered()
            code, output = await world.command("replay")
            world.violations.expect(code == 0, f"replay: {output}")
            await world.load.recovered()
        else:
            # The service does not recover, so the account needs the former defaults.
            await connection.execute(f"ALTER DATABASE {database} RESET ALL")
            await connection.execute(END_CONNECTIONS)
    finally:
        await connection.close()
    refused = len(world.load.refused) - already
    world.violations.expect(refused == 0, f"{refused} reports were refused")
    return len(DEFAULTS)


async def use_other_encoding(world: World) -> int:
    """Start the service on a database that is not in UTF8; it must refuse to start and give the reason."""
    connection = await world.connect()
    await connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    await connection.close()
    dsn = world.dsn.replace("/order_tracking?", "/latin?")
    for command in ("serve", "check"):
        code, output = await world.command(command, DATABASE_URL=dsn)
        world.violations.expect(code == 1, f"{command} exits with {code}")
        world.violations.expect("encoding LATIN1" in output, f"{command} does not name the encoding: {output}")
        world.operator.findings.append(f"{command}: the encoding")
    return 1


async def fill_notification_queue(world: World) -> int:
    """Keep the queue full: a listener of another application idles in a transaction."""
    listener, other = await world.connect(), await world.connect()
    already = len(world.load.refused)
    try:
        await listener.add_listener("unrelated", lambda *_: None)
        await listener.execute("BEGIN; SELECT 1")
        with suppress(asyncpg.ProgramLimitExceededError):
            while True:
                await other.execute(FILL_QUEUE)
        await world.load.proceeds()
        with suppress(asyncpg.ProgramLimitExceededError):
            await other.execute(FILL_QUEUE)
            world.violations.lines.append("the notification queue was not full: this broke nothing")
    finally:
        await listener.close()
        # A queue that was full accepts nothing until a session reads its usage, which drops what was delivered.
        await other.fetchval("SELECT pg_notification_queue_usage()")
        await other.close()
    refused = len(world.load.refused) - already
    world.violations.expect(refused == 0, f"{refused} reports were refused")
    return 1


async def leave_full_queue(world: World) -> int:
    """Fill the queue, and end the listener that kept it full. Notifications must work again."""
    listener, other = await world.connect(), await world.connect()
    try:
        await listener.add_listener("unrelated", lambda *_: None)
        await listener.execute("BEGIN; SELECT 1")
        with suppress(asyncpg.ProgramLimitExceededError):
            while True:
                await other.execute(FILL_QUEUE)
        await world.load.proceeds()
        await listener.close()
        await world.load.proceeds(RECOVERY_REPORTS)
        with suppress(asyncpg.ProgramLimitExceededError):
            await other.execute(NOTIFY)
            return 1
        world.violations.lines.append("the notification queue stays full after its cause has ended")
    finally:
        await listener.close()
        await other.close()
    return 1


async def use_all_connections(world: World) -> int:
    """Take every connection of the server while the service must open new ones."""
    taken = [await world.connect()]
    service = world.service.process
    try:
        # Suspended, so that it does not open its connections again before the harness takes them.
        service.send_signal(signal.SIGSTOP)
        try:
            await taken[0].execute(END_CONNECTIONS)
            await _take_all(world, taken)
        finally:
            service.send_signal(signal.SIGCONT)
        await until_refused(world)
    finally:
        for connection in taken:
            await connection.close()
    await world.load.recovered()
    return 1


async def _take_all(world: World, taken: list[Connection]) -> None:
    """Take all connections until no more become free: a terminated backend ends a moment later."""
    count = len(taken)

    async def is_full() -> bool:
        nonlocal count
        with suppress(asyncpg.TooManyConnectionsError):
            while True:
                taken.append(await asyncpg.connect(world.dsn))
        is_more, count = len(taken) > count, len(taken)
        return not is_more

    await until_async(is_full)


async def revoke_rights(world: World) -> int:
    """Revoke the service's right to append, and grant it again."""
    return await _revoke(world, until_refused)


async def check_without_rights(world: World) -> int:
    """Check an installation whose role may not append."""
    return await _revoke(world, expect_check_fails)


async def _revoke(world: World, meanwhile: Callable[[World], Awaitable[None]]) -> int:
    connection = await world.connect()
    try:
        await connection.execute(f"REVOKE {RIGHTS.format('FROM')}")
        await meanwhile(world)
        await connection.execute(f"GRANT {RIGHTS.format('TO')}")
    finally:
        await connection.close()
    await world.load.recovered()
    return 1
