"""The servers that a DSN names."""

import pytest

from service.dsn import as_reader, read_hosts, read_target


@pytest.mark.parametrize(
    ("dsn", "hosts"),
    [
        ("postgresql://u:p@h1/db", ["h1:5432"]),
        ("postgresql://u:p@h1:5433,h2/db?x=1", ["h1:5433", "h2:5432"]),
        ("postgresql://u:p%40@[::1]:7,[fe80::2],10.0.0.1:8/db", ["[::1]:7", "[fe80::2]:5432", "10.0.0.1:8"]),
        ("postgresql:///db?host=h1,h2&port=1,2", ["h1:1", "h2:2"]),
        ("postgresql:///db?host=h1,h2&port=6", ["h1:6", "h2:6"]),
        ("postgresql:///db?host=%2Frun%2Fpg", ["its local socket"]),
        ("postgresql://%2Frun%2Fpg:5/db", ["its local socket"]),
        ("postgresql:///db", []),
    ],
)
def test_the_servers_of_a_dsn(dsn: str, hosts: list[str]) -> None:
    """Servers are named before the path or in parameters, each with a port or the default one."""
    assert [str(host) for host in read_hosts(dsn)] == hosts


@pytest.mark.parametrize("hosts", ["h1:0", "h1:65536", "h1,,h2", "[::1]x", "h1:1:2", "x" * 64 + ".example"])
def test_an_invalid_server_is_refused(hosts: str) -> None:
    """An invalid host or port is named."""
    with pytest.raises(ValueError, match="is not a"):
        read_hosts(f"postgresql://u@{hosts}/db")


def test_of_several_servers_one_must_be_writable() -> None:
    """By default, a connection to one of several servers needs one that can be written."""
    assert read_target("postgresql://h1/db") == "any"
    assert read_target("postgresql://h1,h2/db") == "read-write"
    assert read_target("postgresql://h1,h2/db?target_session_attrs=any") == "any"


def test_a_reader_takes_any_server() -> None:
    """By default, a reader connects to any of several servers; its transactions are read-only."""
    dsn = as_reader("postgresql://h1,h2/db")
    assert read_target(dsn) == "any"
    assert dsn.endswith("/db?default_transaction_read_only=on&target_session_attrs=any")
    assert as_reader(dsn) == dsn
    assert read_target(as_reader("postgresql://h1,h2/db?target_session_attrs=standby")) == "standby"


def test_a_reader_refuses_to_require_a_server_that_accepts_writes() -> None:
    """PostgreSQL's own check of such a server would fail for every connection of a reader."""
    with pytest.raises(ValueError, match="target_session_attrs is 'read-write', but a process that only reads"):
        as_reader("postgresql://h1/db?target_session_attrs=read-write")
