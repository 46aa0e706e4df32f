"""A service whose database starts later listens at once, waits, and then serves on the same port."""

import http.client
import json
import re
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Final

import orjson
import psycopg
import pytest

from service.database.embedded_postgres import EmbeddedPostgres
from service.version import build_info
from tests.support.databases import DATABASE, FAST_SETTINGS
from tests.support.processes import RunningService, wait_for_output
from tests.support.waiting import PATIENCE_SECONDS, until

WAITS: Final = re.compile(r"the cause is at http://127\.0\.0\.1:(?P<port>\d+)/readyz")
WITHOUT_PORT: Final = re.compile(r"order-tracking waits for the database at its local socket\n")
LOGGED: Final = "waiting for the database"
REPORT: Final = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'


class Line:
    """A connection that stays open over several requests."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_SECONDS)
        self._connection.connect()
        self.own_port = self._connection.sock.getsockname()[1]

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], bytes]:
        """Send a request, and return the status, headers and body; fail if it needs another connection."""
        self._connection.request(method, path, body)
        assert self._connection.sock.getsockname()[1] == self.own_port
        response = self._connection.getresponse()
        return response.status, dict(response.headers), response.read()

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def postgres(state_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A PostgreSQL that is not running yet."""
    server = EmbeddedPostgres(state_dir, settings=FAST_SETTINGS)
    yield server
    server.stop()


@contextmanager
def waiting_service(folder: Path, dsn: str, **settings: str) -> Iterator[RunningService]:
    """Launch a service whose database does not exist yet."""
    service = RunningService(folder, DATABASE_URL=dsn, **settings).launch()
    try:
        yield service
    finally:
        service.end()


def waiting_port(service: RunningService) -> int:
    return int(wait_for_output(service.process, service.log_file, WAITS)["port"])


@contextmanager
def connecting(port: int) -> Iterator[Counter[object]]:
    """Open one connection after another during the block, and count the statuses and errors of /readyz."""
    results: Counter[object] = Counter()
    ended = threading.Event()

    def connect_again() -> None:
        while not ended.is_set():
            try:
                line = Line(port)
                results[line.request("GET", "/readyz")[0]] += 1
                line.close()
            except (OSError, http.client.HTTPException) as error:
                results[repr(error)] += 1

    thread = threading.Thread(target=connect_again)
    thread.start()
    try:
        yield results
    finally:
        ended.set()
        thread.join()


def test_it_listens_while_its_database_is_away_and_then_serves(
    tmp_path: Path, postgres: EmbeddedPostgres
) -> None:
    """Until the database is there, /livez is 200 and all else 503. Then the open connections are served too."""
    with waiting_service(tmp_path, postgres.dsn) as service:
        port = waiting_port(service)
        used, unused = Line(port), Line(port)
        status, _, alive = used.request("GET", "/livez")
        assert (status, json.loads(alive)) == (200, {"status": "alive", **build_info()})
        for method, path, body in (
            ("GET", "/readyz", None),
            ("GET", "/metrics", None),
            ("GET", "/orders/KOM1", None),
            ("OPTIONS", "*", None),
            ("PUT", "/webhook", REPORT),
            ("POST", "/webhook/some-token", REPORT),
        ):
            status, headers, content = used.request(method, path, body)
            assert (status, headers["Retry-After"]) == (503, "2"), path
            assert headers["Content-Type"] == "application/problem+json"
            problem = orjson.loads(content)
            assert problem["type"] == "/problems/temporarily-unavailable"
            assert problem.get("cause") == ("unreachable" if path == "/readyz" else None)
        assert "is listening on" not in service.output
        with connecting(port) as results:
            postgres.start()
            service.wait_until_it_answers()
            until(lambda: results[200])
        assert service.port == port
        assert results.keys() == {200, 503}, results
        for line, version in ((used, 1), (unused, 2)):
            status, _, content = line.request("PUT", "/webhook", REPORT)
            assert (status, orjson.loads(content)["version"]) == (200, version)
            line.close()
        line = Line(port)
        assert b'webhook_refusals_total{cause="unreachable"} 2.0' in line.request("GET", "/metrics")[2]
        line.close()
        assert service.output.count(LOGGED) == 1
        assert "the database is ready" in service.output
        assert "refused=2" in service.output
        assert service.terminate() == 0


def test_each_cause_is_logged_once(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    """A cause is logged when it changes. A database that is created later is waited for too."""
    with waiting_service(tmp_path, postgres.dsn.replace(DATABASE, "/later?")) as service:
        line = Line(waiting_port(service))

        def cause() -> object:
            return orjson.loads(line.request("GET", "/readyz")[2]).get("cause")

        assert cause() == "unreachable"
        postgres.start()
        until(lambda: cause() == "unusable", lambda: service.output)
        with psycopg.connect(postgres.dsn, autocommit=True) as connection:
            connection.execute("CREATE DATABASE later")
        service.wait_until_it_answers()
        causes = re.findall(rf"{LOGGED} .*cause=(\w+)", service.output)
        # While the server starts, it may refuse connections with an error of its own.
        assert (causes[0], causes[-1]) == ("unreachable", "unusable")
        assert all(one != other for one, other in pairwise(causes)), causes
        assert service.output.count("order-tracking waits for") == 1
        line.close()


def test_tokens_that_change_during_the_wait_are_read(
    tmp_path: Path, state_dir: Path, postgres: EmbeddedPostgres
) -> None:
    """SIGHUP during the wait does not end the service, which then accepts the new token."""
    old, new = "old-token-of-16-characters", "new-token-of-16-characters"
    file = tmp_path / "settings"
    file.write_text(f"ORDER_TRACKING_WEBHOOK_TOKENS={old}\n", encoding="utf-8")
    file.chmod(0o600)
    assert state_dir.exists()
    with waiting_service(tmp_path, postgres.dsn, ENV_FILE=str(file)) as service:
        port = waiting_port(service)
        file.write_text(f"ORDER_TRACKING_WEBHOOK_TOKENS={new}\n", encoding="utf-8")
        service.process.send_signal(signal.SIGHUP)
        postgres.start()
        service.wait_until_it_answers()
        line = Line(port)
        assert [line.request("PUT", f"/webhook/{token}", REPORT)[0] for token in (old, new)] == [404, 200]
        line.close()


def test_a_process_that_shares_its_port_listens_only_when_ready(
    tmp_path: Path, postgres: EmbeddedPostgres
) -> None:
    """With SO_REUSEPORT, a waiting process would take requests from those that can serve them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with waiting_service(tmp_path, postgres.dsn, PORT=str(port), REUSE_PORT="true") as service:
        wait_for_output(service.process, service.log_file, WITHOUT_PORT)
        with pytest.raises(ConnectionRefusedError):
            Line(port)
        with connecting(port) as results:
            postgres.start()
            service.wait_until_it_answers()
            until(lambda: results[200])
        assert 503 not in results


def test_it_ends_while_clients_are_connected(tmp_path: Path, postgres: EmbeddedPostgres) -> None:
    """SIGTERM ends a waiting service with exit code 0, although connections are open."""
    with waiting_service(tmp_path, postgres.dsn) as service:
        port = waiting_port(service)
        used, unused = Line(port), Line(port)
        assert used.request("GET", "/livez")[0] == 200
        assert service.terminate() == 0
        assert "Traceback" not in service.output
        used.close()
        unused.close()
