"""Lost commits: a failover to a standby, and a restore of an older backup, under a running service.

The operator who fails over to an asynchronous standby, or restores a backup, loses the reports that it never
had. Everything else must hold: nothing more is lost, each order continues from its last event in the log that
is left, and a consumer whose position lies beyond that log gets 410.
"""

import asyncio
import re
from functools import partial
from typing import Final

from tests.faults.fault import expect_check_fails
from tests.faults.processes import suspend
from tests.faults.standby import (
    copy_data,
    dump_database,
    kill_server,
    promote,
    replace_data,
    restore_database,
    socket_of,
    wait_until_applied,
)
from tests.faults.world import World, in_thread
from tests.support.account import read_log
from tests.support.connections import GONE, get
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async

# The reports of this time are lost: many more than those in flight, so that the log stays below the consumers'
# positions for a while.
LOST_SECONDS: Final = 2.0
READ_ONLY_REPORTS: Final = 3
# How long the database is away before a standby takes its place: longer than a report's time.
OUTAGE_SECONDS: Final = 6.0
# Waits for commits on the primary alone, and cancels them.
CANCEL_WAITING: Final = """
    SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity
    WHERE wait_event = 'SyncRep' AND application_name = 'order-tracking'
"""
EVENT_ID: Final = re.compile(rb"(?m)^id: (\d+)\n")
CHUNK_BYTES: Final = 65_536
STREAM: Final = b"GET /events/stream?after=0 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


async def fail_over(world: World) -> int:
    """Lose the primary while its asynchronous standby is stopped, and promote the standby."""
    standby = world.standby
    await in_thread(standby.stop)
    reader = asyncio.create_task(_read_stream(world.port))
    try:
        await world.load.recovered(int(LOST_SECONDS * world.per_second))
        await in_thread(kill_server, world.primary)
        with world.outage():
            world.load.pause()
            await in_thread(standby.start)
            await wait_until_applied(standby.dsn)
            _note_missing(world, await _report_ids(standby.dsn))
            await _reach_standby(world)
        await _promote(world)
        await _expect_gone(world, reader)
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
    world.load.resume()
    await world.load.recovered()
    return 1


async def fail_over_under_load(world: World) -> int:
    """The same without a pause: the positions of lost events are taken again before a reader comes back."""
    await in_thread(world.standby.stop)
    await world.load.recovered(int(LOST_SECONDS * world.per_second))
    await in_thread(kill_server, world.primary)
    with world.outage():
        await in_thread(world.standby.start)
        await wait_until_applied(world.standby.dsn)
        _note_missing(world, await _report_ids(world.standby.dsn))
        # Longer than a report's time: what was refused in the meantime must never be recorded.
        await asyncio.sleep(OUTAGE_SECONDS)
    await _promote(world)
    await world.load.recovered()
    await _expect_reader_gone(world)
    return 1


async def fail_over_synchronously(world: World) -> int:
    """Lose the standby, whose return ends the wait of every commit; then lose the primary."""
    await in_thread(world.standby.stop)
    await world.operator.until_shown("replication_wait")
    await in_thread(world.standby.start)
    await world.load.recovered()
    await world.pause()
    await in_thread(kill_server, world.primary)
    await wait_until_applied(world.standby.dsn)
    await _promote(world)
    await world.load.recovered()
    return 2


async def freeze_primary(world: World) -> int:
    """Suspend the primary, which still accepts connections but answers none, and promote the standby.

    It stays suspended, so nothing ends its connections: deliveries and the history must catch up all the same.
    """
    await world.pause()
    primary, postmaster = world.primary, world.primary.pid
    assert postmaster is not None
    suspend(postmaster)
    world.at_end(partial(kill_server, primary))
    await _fail_over_from_silence(world)
    return 1


async def vanish_primary(world: World) -> int:
    """Take the primary's network link down, and promote the standby. Nothing acknowledges a packet any more."""
    assert world.link is not None
    await world.pause()
    await in_thread(world.link.take_down)
    await _fail_over_from_silence(world)
    return 1


async def _fail_over_from_silence(world: World) -> None:
    with world.outage():
        await wait_until_applied(world.standby.dsn)
        await asyncio.sleep(OUTAGE_SECONDS)
    await _promote(world)
    await world.load.recovered()


async def cancel_waiting_commits(world: World) -> int:
    """Cancel commits that wait for the lost synchronous standby, then lose the primary.

    PostgreSQL ends such a wait with a warning, and the commit succeeds on the primary alone. It does the same
    when the statement's time limit is reached.
    """
    await in_thread(world.standby.stop)
    connection = await world.connect()
    try:
        await until_async(lambda: connection.fetchval(CANCEL_WAITING))
        await world.pause()
        seen = await _report_ids(world.primary.dsn)
        await in_thread(kill_server, world.primary)
    finally:
        connection.terminate()
    await in_thread(world.standby.start)
    await wait_until_applied(world.standby.dsn)
    # Readers may have seen events that only the primary had. No such event may be acknowledged.
    world.may_be_gone = not seen <= await _report_ids(world.standby.dsn)
    await _promote(world)
    await world.load.recovered()
    return 1


async def check_standby(world: World) -> int:
    """Check an installation whose address leads to the standby, which can record nothing."""
    world.proxy.server_socket = world.standby_socket
    await expect_check_fails(world)
    world.proxy.server_socket = socket_of(world.state_dir)
    return 1


async def restore_backup(world: World) -> int:
    """Put an earlier copy in place of the server's data, under the running service."""
    copy = world.state_dir / "copy"
    await world.load.quiet()
    await in_thread(copy_data, world.state_dir, copy)
    kept = await _report_ids(world.dsn)
    world.load.resume()
    reader = asyncio.create_task(_read_stream(world.port))
    try:
        await world.load.recovered(int(LOST_SECONDS * world.per_second))
        # The service looks the order of a failed report up again. None is in flight here, so that everything it
        # remembers is put to the test.
        await world.load.quiet()
        await in_thread(world.primary.stop)
        await in_thread(replace_data, world.state_dir, copy)
        _note_missing(world, kept)
        await in_thread(world.primary.start)
        await _expect_gone(world, reader)
    finally:
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
    world.load.resume()
    await world.load.recovered()
    return 1


async def restore_cleanly(world: World) -> int:
    """Restore an earlier dump into the database of the running service, as ``pg_restore --clean`` does.

    No connection is cut, so nothing tells the service to drop what it remembers of the log. The next reports
    come at once, before a view finds that it has another log.
    """
    dump = world.folder / "dump"
    await world.load.quiet()
    await in_thread(dump_database, world.state_dir, dump)
    kept = await _report_ids(world.dsn)
    world.load.resume()
    await world.load.recovered(int(LOST_SECONDS * world.per_second))
    await world.load.quiet()
    await in_thread(restore_database, world.state_dir, dump)
    _note_missing(world, kept)
    world.load.resume()
    await world.load.recovered()
    await _expect_reader_gone(world)
    return 1


async def _report_ids(dsn: str) -> set[str]:
    return {event.report_id for _, event in await read_log(dsn)}


def _note_missing(world: World, kept: set[str]) -> None:
    """Note the acknowledged reports that the new server lacks. Until it takes reports, there are no others."""
    world.missing = {one.receipt["report_id"] for one in world.acknowledged()} - kept
    world.may_be_gone = True
    world.violations.expect(len(world.missing) > 0, "no commit was lost: this broke nothing")


async def _reach_standby(world: World) -> None:
    """Send reports to the standby itself, which cannot record them. A DSN with two hosts does not reach it."""
    if not world.layout.through_proxy:
        return
    world.proxy.server_socket = world.standby_socket
    await asyncio.gather(*(world.load.attempt(world.load.next_body()[0]) for _ in range(READ_ONLY_REPORTS)))
    await world.operator.until_shown("read_only")


async def _promote(world: World) -> None:
    world.server = world.standby
    if world.layout.through_proxy:
        world.proxy.server_socket = world.standby_socket
    connection = await world.connect()
    try:
        await promote(connection)
    finally:
        await connection.close()


async def _expect_gone(world: World, reader: "asyncio.Task[int]") -> None:
    """Expect 410 for each consumer with a position beyond the head: at /events, and after its stream's end."""
    await _expect_reader_gone(world)
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            position = await reader
    except TimeoutError:
        world.violations.lines.append("a stream goes on beyond the head of the log")
        return
    response = await world.connections.request(get(f"/events/stream?after={position}"))
    status = response.status if response is not None else None
    world.violations.expect(status == GONE, f"a stream after the lost position {position} gets {status}")


async def _expect_reader_gone(world: World) -> None:
    try:
        await until_async(condition(lambda: world.tail.times_gone > 0))
    except AssertionError:
        world.violations.lines.append("a reader of /events that read lost events gets no 410")
    else:
        world.operator.findings.append("consumers: 410")


async def _read_stream(port: int) -> int:
    """Read server-sent events until the stream ends, and return the last position."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(STREAM)
        position, rest = 0, b""
        while data := await reader.read(CHUNK_BYTES):
            rest += data
            for found in EVENT_ID.findall(rest):
                position = int(found)
            rest = rest[rest.rfind(b"\n\n") + 1 :] if b"\n\n" in rest else rest
    finally:
        writer.close()
    return position
