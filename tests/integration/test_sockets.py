"""The sockets that several processes listen on."""

import socket
from contextlib import ExitStack

import pytest

from service.http.sockets import bound_sockets


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_sockets_of_a_free_port_share_it(host: str) -> None:
    """Every process has a socket for each address of the host, all on one port, which others cannot take."""
    with bound_sockets(host, 0, 3, reuse_port=False) as (port, groups):
        assert len(groups) == 3
        assert {one.getsockname()[1] for group in groups for one in group} == {port}
        with pytest.raises(OSError, match="in use"), ExitStack() as stack:
            stack.enter_context(bound_sockets("127.0.0.1", port, 1, reuse_port=False))
        with socket.create_connection((host, port)):
            pass
