"""The resources of a process, as reported by the operating system."""

import os
import socket
from pathlib import Path
from typing import Final, NamedTuple, Self

_ESTABLISHED: Final = "01"
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Resources(NamedTuple):
    """Memory, threads, open files without callers' connections, and the number of these connections.

    The connections stand for asyncio tasks, which cannot be observed from outside: aiohttp has a task for each
    connection, and the task ends with the connection.
    """

    memory_mb: float
    threads: int
    descriptors: int
    callers: int

    @classmethod
    def of(cls, pid: int, port: int) -> Self:
        """Return the present resources of a process that listens on this port."""
        process = Path("/proc") / str(pid)
        pages = int((process / "statm").read_text().split()[1])
        names = [_link(descriptor) for descriptor in (process / "fd").iterdir()]
        callers = {f"socket:[{inode}]" for inode in _callers_inodes(port)}.intersection(names)
        threads = len(list((process / "task").iterdir()))
        return cls(pages * _PAGE_BYTES / 1e6, threads, len(names) - len(callers), len(callers))


def _link(descriptor: Path) -> str:
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:
        return ""


def _callers_inodes(port: int) -> list[str]:
    local = f"{socket.htonl(0x7F000001):08X}:{port:04X}"
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return [line[9] for line in lines if line[1] == local and line[3] == _ESTABLISHED]


def children(pid: int) -> list[int]:
    """Return the running child processes of a process."""
    text = (Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text()
    return [int(child) for child in text.split()]
