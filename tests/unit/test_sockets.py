"""A process takes only the sockets that were handed over to it, and explains what it cannot listen on."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.http.sockets import FIRST_FILE, InheritedFileError, take_inherited_sockets


@pytest.fixture(autouse=True)
def _first_file() -> Iterator[None]:
    """Give the test the place of the first inherited file."""
    saved = os.dup(FIRST_FILE) if Path(f"/dev/fd/{FIRST_FILE}").exists() else None
    yield
    if saved is not None:
        os.dup2(saved, FIRST_FILE, inheritable=False)
        os.close(saved)


def variables(process: int, count: str = "1") -> dict[str, str]:
    """Return an environment that announces inherited files."""
    return {"LISTEN_PID": str(process), "LISTEN_FDS": count, "LISTEN_FDNAMES": "http", "HOME": "/"}


def test_a_socket_that_listens_is_taken() -> None:
    """Its address is the one that was bound. No child inherits it, or the variables."""
    with socket.create_server(("127.0.0.1", 0)) as bound:
        os.dup2(bound.fileno(), FIRST_FILE)
        environment = variables(os.getpid())
        (taken,) = take_inherited_sockets(environment)
        assert environment == {"HOME": "/"}
        assert taken.getsockname() == bound.getsockname()
        assert not taken.get_inheritable()
        taken.detach()


@pytest.mark.parametrize("environment", [{}, variables(1), variables(os.getpid(), "0")])
def test_files_for_nobody_or_for_another_process_are_left_alone(environment: dict[str, str]) -> None:
    """The variables may have passed through a shell or a supervisor."""
    assert not take_inherited_sockets(environment)


def test_a_file_that_cannot_be_listened_on_is_explained(tmp_path: Path) -> None:
    """The error names the file, what was expected, and what to write into the unit."""
    with pytest.raises(InheritedFileError, match="LISTEN_FDS: 'some' is not a number of files"):
        take_inherited_sockets(variables(os.getpid(), "some"))
    file = os.open(tmp_path, os.O_RDONLY)
    os.dup2(file, FIRST_FILE)
    os.close(file)
    with pytest.raises(InheritedFileError, match="the inherited file 3 is not a socket"):
        take_inherited_sockets(variables(os.getpid()))
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as silent:
        os.dup2(silent.fileno(), FIRST_FILE)
    with pytest.raises(InheritedFileError, match="write ListenStream=ADDRESS:PORT and Accept=no"):
        take_inherited_sockets(variables(os.getpid()))
