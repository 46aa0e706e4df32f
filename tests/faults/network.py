"""Faults of connections: cut ones to the database, and slow ones of callers."""

import asyncio
import socket
import time
from typing import Final

from service.database.connections import IDLE_SECONDS_MAX
from tests.faults.fault import expect_status
from tests.faults.proxy import Cut
from tests.faults.world import World
from tests.support.connections import OK, put
from tests.support.waiting import PATIENCE_SECONDS

# A moment longer than the time after which the service probes a connection before it uses it.
IDLE_SECONDS: Final = IDLE_SECONDS_MAX + 1.0
DROPPED_SHARE: Final = 0.6

SLOW_SOCKETS: Final = 500
# The service's own limit, plus a margin for a busy machine.
SLOW_SECONDS_MAX: Final = 10.0 + 3.0
QUIET_SECONDS: Final = 3.0
P99_ROOM: Final = 5.0
# Below this value, a multiple of a quiet p99 is noise of the scheduler.
P99_NOISE_SECONDS: Final = 0.1


# As many as one process serves at once.
STALLED_READERS: Final = 2_000
STALLED_SECONDS: Final = 20.0
STALLED_MEMORY_MB_MAX: Final = 200.0
STALLED_P99_SECONDS_MAX: Final = 1.0
RECEIVE_BUFFER_BYTES: Final = 4_096


async def cut(where: Cut, world: World) -> int:
    for _ in range(world.effort.times):
        await world.pause()
        await world.proxy.cut(where, PATIENCE_SECONDS)
        await world.load.recovered()
    return world.effort.times


async def drop_idle(idle_seconds: float, world: World) -> int:
    """Send nothing for a while, in which a firewall drops the idle connections; then every report is recorded.

    Args:
        idle_seconds: how long nothing is sent; the firewall drops a connection a little earlier.
        world: the world.
    """
    await _quarantine(world)
    await world.load.quiet()
    world.proxy.idle_seconds_max = DROPPED_SHARE * idle_seconds
    await asyncio.sleep(idle_seconds)
    already = len(world.load.refused)
    world.load.resume()
    await _quarantine(world)
    await expect_status(world, "/orders/KOM-H1", OK)
    await world.load.recovered()
    refused = len(world.load.refused) - already
    world.violations.expect(refused == 0, f"{refused} reports were refused after an idle time")
    return 1


async def _quarantine(world: World) -> None:
    response = await world.connections.request(put("{}"))
    status = response.status if response is not None else None
    world.violations.expect(status == OK, f"an unparseable body gets {status}")


async def slow_sockets(world: World) -> int:
    quiet = time.monotonic()
    await asyncio.sleep(QUIET_SECONDS)
    before = world.load.p99_seconds(quiet)
    began = time.monotonic()
    ended = await asyncio.gather(*(_trickle(world.port, number) for number in range(SLOW_SOCKETS)))
    p99 = world.load.p99_seconds(began)
    still_open = sum(seconds > SLOW_SECONDS_MAX for seconds in ended)
    in_time = world.expect_in_time
    in_time(still_open == 0, f"{still_open} slow connections are open after {SLOW_SECONDS_MAX:.0f} s")
    most = max(P99_ROOM * before, P99_NOISE_SECONDS)
    in_time(p99 <= most, f"p99 went from {before:.3f} to {p99:.3f} s")
    world.remarks.append(
        f"closed after {max(ended):.1f} s at most, p99 {before * 1e3:.0f} to {p99 * 1e3:.0f} ms"
    )
    return 1


async def stall_readers(world: World) -> int:
    """Open as many streams as the service serves, and read nothing from any of them, until each is cut off."""
    before = most = world.resources()[0].memory_mb
    began = time.monotonic()
    readers = [await _stalled_reader(world.port, number) for number in range(STALLED_READERS)]
    try:
        while time.monotonic() < began + STALLED_SECONDS:
            await asyncio.sleep(0.25)
            most = max(most, world.resources()[0].memory_mb)
    finally:
        for reader in readers:
            reader.close()
    p99 = world.load.p99_seconds(began)
    world.violations.expect(most <= STALLED_MEMORY_MB_MAX, f"memory grew to {most:.0f} MB")
    world.expect_in_time(p99 <= STALLED_P99_SECONDS_MAX, f"p99 is {p99:.3f} s")
    world.remarks.append(f"memory {before:.0f} to {most:.0f} MB, p99 {p99 * 1e3:.0f} ms")
    return 1


async def _stalled_reader(port: int, number: int) -> socket.socket:
    """Return a socket with a small buffer that has requested a stream, every other from the beginning."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    reader.settimeout(0)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(reader, ("127.0.0.1", port))
    query = b"?after=0" if number % 2 else b""
    await loop.sock_sendall(reader, b"GET /events/stream%b HTTP/1.1\r\nHost: localhost\r\n\r\n" % query)
    return reader


async def _trickle(port: int, number: int) -> float:
    """Send a header or a body at a byte a second, and return the seconds until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    if number % 2:
        writer.write(b"PUT /webhook HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
    else:
        writer.write(b"PUT /webhook HTTP/1.1\r\nX")
    began = time.monotonic()
    try:
        while time.monotonic() < began + SLOW_SECONDS_MAX + 1.0:
            writer.write(b" " if number % 2 else b"x")
            try:
                async with asyncio.timeout(1.0):
                    await reader.read()
                    break
            except TimeoutError:
                continue
    except OSError:
        pass
    finally:
        writer.transport.abort()
    return time.monotonic() - began
