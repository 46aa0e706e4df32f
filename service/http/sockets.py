"""The sockets that a service inherits from the program that starts it, as systemd hands them over (LISTEN_FDS).

That program keeps the port open. So the connections that arrive during a restart wait, and the next process
accepts them. Several services may inherit the same sockets.
"""

import os
import socket
from collections.abc import MutableMapping, Sequence
from typing import Final

# The first inherited file, by systemd's protocol: sd_listen_fds(3).
FIRST_FILE: Final = 3
PROCESS_VARIABLE: Final = "LISTEN_PID"
COUNT_VARIABLE: Final = "LISTEN_FDS"
# Of the same protocol. PostgreSQL must inherit none of them.
VARIABLES: Final = (PROCESS_VARIABLE, COUNT_VARIABLE, "LISTEN_FDNAMES")


class InheritedFileError(ValueError):
    """The service cannot listen on an inherited file. ``str()`` says on which, and what to do."""


def take_inherited_sockets(variables: MutableMapping[str, str] = os.environ) -> Sequence[socket.socket]:
    """Take the sockets that this process inherits, and remove the variables that announce them.

    Args:
        variables: the environment.

    Returns:
        The sockets, which listen already; none if the variables are for another process.

    Raises:
        InheritedFileError: a file is not a TCP socket that listens.
    """
    values = {name: variables.pop(name, "") for name in VARIABLES}
    if values[PROCESS_VARIABLE] != str(os.getpid()):
        return ()
    count = values[COUNT_VARIABLE]
    if not count.isdecimal():
        raise InheritedFileError(f"{COUNT_VARIABLE}: {count!r} is not a number of files")
    return [_take(file) for file in range(FIRST_FILE, FIRST_FILE + int(count))]


def _take(file: int) -> socket.socket:
    try:
        os.set_inheritable(file, False)  # noqa: FBT003 - the standard library's signature
        one = socket.socket(fileno=file)
        is_listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1
    except OSError as error:
        raise InheritedFileError(f"the inherited file {file} is not a socket: {error.strerror}") from None
    if one.family not in {socket.AF_INET, socket.AF_INET6} or not is_listening:
        one.detach()
        raise InheritedFileError(
            f"the inherited file {file} is not a TCP socket that listens: in the socket unit, write "
            "ListenStream=ADDRESS:PORT and Accept=no"
        )
    return one
