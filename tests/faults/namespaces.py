"""A network of two namespaces with one link, which can be taken down as if a host had vanished.

One is that of the harness and the service, the other that of the primary. Nothing outside of them changes, and
no address outside of them is used.
"""

import asyncio
import ctypes
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.support.waiting import PATIENCE_SECONDS, until

CLONE_NEWNET: Final = 0x40000000
SERVICE_ADDRESS: Final = "192.0.2.1"
PRIMARY_ADDRESS: Final = "192.0.2.2"
NETWORK: Final = "192.0.2.0/30"
SERVICE_END: Final = "to-primary"
PRIMARY_END: Final = "to-service"
OWN: Final = "/proc/thread-self/ns/net"


class Link:
    """The link, seen from the service's side.

    Args:
        pid: a process in the primary's namespace.
    """

    def __init__(self, pid: int) -> None:
        self._namespace = f"/proc/{pid}/ns/net"
        _ip("link", "set", "lo", "up")
        _ip("link", "add", SERVICE_END, "type", "veth", "peer", "name", PRIMARY_END, "netns", str(pid))
        _ip("address", "add", f"{SERVICE_ADDRESS}/30", "dev", SERVICE_END)
        _ip("link", "set", SERVICE_END, "up")
        self._ip_of_primary("link", "set", "lo", "up")
        self._ip_of_primary("address", "add", f"{PRIMARY_ADDRESS}/30", "dev", PRIMARY_END)
        self._ip_of_primary("link", "set", PRIMARY_END, "up")

    def take_down(self) -> None:
        """Take the primary's end down: whatever is sent to it from now on is lost, without an error."""
        self._ip_of_primary("link", "set", PRIMARY_END, "down")

    def run_beyond(self, work: Callable[[], object]) -> None:
        """Run a blocking function in the primary's namespace, with the processes that it starts."""
        with _entered(self._namespace):
            work()

    def _ip_of_primary(self, *arguments: str) -> None:
        self.run_beyond(lambda: _ip(*arguments))


@contextmanager
def linked() -> Iterator[Link]:
    """Move this thread, and all that it starts, into a new network, and yield its link to another one.

    Raises:
        OSError: this machine does not permit it, or lacks a program.
    """
    loop = asyncio.get_running_loop()
    home = os.open(OWN, os.O_RDONLY)
    try:
        _call("unshare", CLONE_NEWNET)
        try:
            # A thread that is running already would start processes in the former network.
            loop.set_default_executor(ThreadPoolExecutor())
            holder = subprocess.Popen(["unshare", "--net", "sleep", str(24 * 3600)])
            try:
                own, other = Path(OWN), Path(f"/proc/{holder.pid}/ns/net")
                until(lambda: other.stat().st_ino != own.stat().st_ino)
                yield Link(holder.pid)
            finally:
                holder.kill()
                holder.wait(PATIENCE_SECONDS)
        finally:
            _call("setns", home, CLONE_NEWNET)
            loop.set_default_executor(ThreadPoolExecutor())
    finally:
        os.close(home)


@contextmanager
def _entered(namespace: str) -> Iterator[None]:
    home, other = os.open(OWN, os.O_RDONLY), os.open(namespace, os.O_RDONLY)
    try:
        _call("setns", other, CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)
        os.close(other)


def _call(name: str, *arguments: int) -> None:
    # Python 3.11 does not have these calls.
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
