"""The servers that a DSN names, a primary and its standbys, and which of them to use."""

import re
from typing import Final, NamedTuple
from urllib.parse import parse_qs, parse_qsl, unquote, urlencode, urlsplit

SCHEMES: Final = ("postgresql://", "postgres://")
LOCAL_SOCKET: Final = "its local socket"
DEFAULT_PORT: Final = 5432
PORT_MAX: Final = 65_535
# libpq's parameter and its values.
TARGET: Final = "target_session_attrs"
TARGETS: Final = ("any", "primary", "standby", "read-write", "read-only")
# PostgreSQL's setting that makes every transaction of a connection read-only.
READ_ONLY: Final = "default_transaction_read_only"
# The colons of an IPv6 address are between brackets.
_HOST: Final = re.compile(r"(?:\[(?P<address>[^\]]+)\]|(?P<name>[^:\[\]]+))(?::(?P<port>.*))?")


class Host(NamedTuple):
    """A server's host name, IP address or socket folder, and its port."""

    name: str
    port: int

    def __str__(self) -> str:
        if self.name.startswith("/"):
            return LOCAL_SOCKET
        return f"[{self.name}]:{self.port}" if ":" in self.name else f"{self.name}:{self.port}"


def read_hosts(dsn: str) -> list[Host]:
    """Return the servers that a DSN names before its path, or in the parameters host and port, if any.

    Raises:
        ValueError: a host or a port is invalid. ``str()`` names it.
    """
    parts = urlsplit(dsn)
    listed = parts.netloc.rpartition("@")[2]
    if listed:
        return [_read_host(item) for item in listed.split(",")]
    parameters = parse_qs(parts.query)
    names = [name for value in parameters.get("host", ()) for name in value.split(",")]
    ports = [port for value in parameters.get("port", ()) for port in value.split(",")] or [str(DEFAULT_PORT)]
    if len(ports) not in {1, len(names)}:
        raise ValueError(
            f"it names {len(names)} hosts and {len(ports)} ports: name one port, or one for each host"
        )
    return [_host(name, ports[number % len(ports)]) for number, name in enumerate(names)]


def read_target(dsn: str) -> str:
    """Return which of a DSN's servers to connect to: of several, by default one that can be written.

    Raises:
        ValueError: the DSN names an unknown target.
    """
    default = "read-write" if len(read_hosts(dsn)) > 1 else "any"
    target = dict(parse_qsl(urlsplit(dsn).query)).get(TARGET, default)
    if target not in TARGETS:
        raise ValueError(f"{TARGET} is {target!r}, but must be one of {', '.join(TARGETS)}")
    return target


def as_reader(dsn: str) -> str:
    """Return a DSN whose connections only read, by default from any of its servers that responds.

    Raises:
        ValueError: the DSN requires a server that accepts writes. A connection that only reads finds none.
    """
    present = dict(parse_qsl(urlsplit(dsn).query))
    if present.get(TARGET) == "read-write":
        raise ValueError(f"{TARGET} is 'read-write', but a process that only reads needs any or standby")
    added = {READ_ONLY: "on"} if READ_ONLY not in present else {}
    added |= {TARGET: "any"} if TARGET not in present else {}
    if not added:
        return dsn
    return f"{dsn}{'&' if '?' in dsn else '?'}{urlencode(added)}"


def _read_host(item: str) -> Host:
    match = _HOST.fullmatch(item)
    if match is None:
        raise ValueError(f"{item!r} is not a host with a port, such as db.example:5432")
    return _host(match["address"] or unquote(match["name"]), match["port"] or str(DEFAULT_PORT))


def _host(name: str, port: str) -> Host:
    try:
        # A socket's folder is not a host name.
        _ = b"" if name.startswith("/") else name.encode("idna")
    except UnicodeError:
        raise ValueError(f"{name!r} is not a valid host name or IP address") from None
    if not port.isascii() or not port.isdigit() or not 0 < int(port) <= PORT_MAX:
        raise ValueError(f"the port {port!r} of {name} is not a number from 1 to {PORT_MAX}")
    return Host(name, int(port))
