"""The sockets of one port that several processes listen on.

Each process accepts from its own socket, among which the kernel spreads the connections (SO_REUSEPORT). The
supervisor keeps all of them open. So the connections that wait to be accepted outlive a process, and another
process can accept them.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from service.http.server import BACKLOG, limit_kernel

_Address = tuple[socket.AddressFamily, tuple[object, ...]]
# Where the port is in a socket address of IPv4 and IPv6.
PORT_INDEX: Final = 1


@contextmanager
def bound_sockets(
    host: str, port: int, count: int, *, reuse_port: bool
) -> Iterator[tuple[int, list[list[socket.socket]]]]:
    """Bind the sockets of some processes; yield the port, and the sockets of each process.

    They listen already, so that no other service can take the port, and early connections wait. With
    ``reuse_port``, they do not listen yet: other services would serve these connections earlier.

    Args:
        host: the address, or a host name, whose addresses all get sockets.
        port: the port, 0 for any free one.
        count: the number of processes.
        reuse_port: whether processes of another supervisor may listen on the port too.

    Raises:
        OSError: the address cannot be bound, or another program listens on it.
    """
    addresses = _resolve(host, port)
    opened: list[socket.socket] = []
    try:
        if not reuse_port and port:
            # With SO_REUSEPORT, binding would also succeed beside another service of the same user.
            for address in addresses:
                _bind(address, port, shares=False).close()
        groups: list[list[socket.socket]] = []
        for _ in range(count):
            group = []
            for address in addresses:
                one = _bind(address, port, shares=True)
                opened.append(one)
                if not reuse_port:
                    one.listen(BACKLOG)
                group.append(one)
                port = one.getsockname()[PORT_INDEX]
            groups.append(group)
        yield port, groups
    finally:
        for one in opened:
            one.close()


def _resolve(host: str, port: int) -> Sequence[_Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return [*dict.fromkeys((family, address) for family, _, _, _, address in found)]


def _bind(address: _Address, port: int, *, shares: bool) -> socket.socket:
    family, name = address
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shares:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        limit_kernel(one)
        one.bind((name[0], port, *name[2:]))
    except BaseException:
        one.close()
        raise
    return one
