"""The files of docs/operations work with the real programs, if this machine has them."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp
import pytest

from tests.support.commands import call_command
from tests.support.folders import ROOT, copied_folder, make_folder
from tests.support.processes import RunningService, environment, running_service
from tests.support.waiting import PATIENCE_SECONDS, until, until_async

OPERATIONS: Final = ROOT / "docs" / "operations"
# The sender and the proxy have different addresses of this machine, and only the proxy's is trusted.
SENDER: Final = "127.0.0.2"
PROXY: Final = "127.0.0.1"
TOKEN: Final = "tokentokentokentokentokentoken01"  # noqa: S105 - of a service that lives for one test
NGINX: Final = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
# How many webhooks and other requests an address may have in progress. The file allows more webhooks.
WEBHOOKS_MAX: Final = 20
READS_MAX: Final = 64
# How many pages for buyers an address may get at once before their rate is limited. The file allows more.
BUYERS_BURST: Final = 2
# The main configuration around the documented file, which belongs in /etc/nginx/conf.d.
MAIN: Final = """\
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/documented.conf;
}}
"""


def free_port() -> int:
    """Return an unused port."""
    with socket.create_server((PROXY, 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def service(state_template: Path) -> Iterator[RunningService]:
    """Run the service as it runs behind a proxy, which finds it again after a restart."""
    with (
        copied_folder(state_template) as copy,
        running_service(
            copy, WEBHOOK_TOKENS=TOKEN, TRUSTED_PROXIES=f"{PROXY}/32", PORT=str(free_port())
        ) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def proxy(service: RunningService) -> Iterator[tuple[str, Path]]:
    """Run nginx before the service, and yield its URL and the folder with its logs."""
    openssl = shutil.which("openssl")
    if NGINX is None or openssl is None:
        pytest.skip("this machine has no nginx, or no openssl to make it a certificate")
    folder = make_folder()
    port = free_port()
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run(
        [openssl, *made, "-keyout", folder / "privkey.pem", "-out", folder / "fullchain.pem"],
        check=True,
        capture_output=True,
    )
    documented = (OPERATIONS / "nginx.conf").read_text(encoding="utf-8")
    for theirs, ours in {
        "127.0.0.1:8080": service.url.removeprefix("http://"),
        "listen 443 ssl": f"listen {PROXY}:{port} ssl",
        "/etc/ssl/tracking.example": str(folder),
        "/var/log/nginx": str(folder),
        # Shorter and lower, for a quick test.
        "client_header_timeout 10s": "client_header_timeout 2s",
        "client_body_timeout 10s": "client_body_timeout 60s",
        "limit_conn order_tracking_webhooks 1024": f"limit_conn order_tracking_webhooks {WEBHOOKS_MAX}",
        "rate=10r/s": "rate=1r/m",
        "burst=50": f"burst={BUYERS_BURST}",
    }.items():
        assert theirs in documented
        documented = documented.replace(theirs, ours)
    (folder / "documented.conf").write_text(documented, encoding="utf-8")
    (folder / "nginx.conf").write_text(MAIN.format(folder=folder), encoding="utf-8")
    with (folder / "said").open("wb") as said:
        process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=said)
    try:

        def listens() -> bool:
            assert process.poll() is None, (folder / "said").read_text()
            try:
                socket.create_connection((PROXY, port)).close()
            except ConnectionRefusedError:
                return False
            return True

        until(listens)
        yield f"https://{PROXY}:{port}", folder
    finally:
        process.terminate()
        process.wait(PATIENCE_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


# Of the webhook's path and of a buyer's page, as a sender or a messenger may write them.
SPELLINGS: Final = (
    *("/webhook/{token}", "//WEBHOOK/{token}", "/\\webhook/{token}", "http://host/webhook/{token}"),
    *(
        "/%77ebhook/{token}",
        "/%2577ebhook/{token}",
        "/orders/../webhook/{token}",
        "/orders/%2e%2e/webhook/{token}",
    ),
    *("/webhok/{token}", "/{token}", "/t/{token}", "/\\t/{token}", "/T/{token}", "http://host/t/{token}"),
    *("/ordersx/{token}", "*{token}", "webhook/{token}", "/./webhook/{token}", "/;/webhook/{token}"),
)


async def test_behind_nginx_as_documented(service: RunningService, proxy: tuple[str, Path]) -> None:
    """Behind nginx, events keep the sender's address, streams arrive at once, and the service's own refusals
    arrive.
    """
    url, folder = proxy
    tls = client_tls(folder)
    from_sender = aiohttp.TCPConnector(ssl=tls, local_addr=(SENDER, 0))
    created = await asyncio.to_thread(
        call_command, service.state_dir, "keys", "create", "people", "--scope", "read:bodies"
    )
    key = created.stdout.split()[-1]
    bearer = {"Authorization": f"Bearer {key}"}
    webhook = f"{url}/webhook/{TOKEN}"
    report = {"order_no": "KOM1", "status": "Dikirim"}
    forged = {"X-Forwarded-For": "203.0.113.7"}
    async with (
        asyncio.timeout(PATIENCE_SECONDS),
        aiohttp.ClientSession(connector=from_sender) as session,
    ):

        async def knows_the_key() -> bool:
            async with session.get(f"{url}/orders", headers=bearer) as answer:
                return answer.status == 200

        # The service checks for new keys once a second.
        await until_async(knows_the_key)
        async with session.get(f"{url}/events/stream", headers=bearer) as stream:
            assert stream.status == 200
            async with session.put(webhook, json=report, headers=forged) as answer:
                assert (answer.status, (await answer.json())["outcome"]) == (200, "advanced")
            # This loop ends only if the proxy forwards each event at once.
            while not (await stream.content.readline()).startswith(b"data: "):
                pass
            # An orderly close of a TLS connection would wait for the other side.
            assert stream.connection is not None
            assert stream.connection.transport is not None
            stream.connection.transport.abort()
        async with session.get(f"{url}/orders/KOM1/events", headers=bearer) as answer:
            (event,) = (await answer.json())["events"]
            assert event["data"]["remote"] == SENDER
        async with session.put(webhook, data=b"x" * 65_537) as answer:
            assert answer.status == 413
            assert answer.content_type == "application/problem+json"
        named = {"Host": "tracking.example"}
        async with session.post(
            f"{url}/session", data={"key": key}, headers=named, allow_redirects=False
        ) as answer:
            assert answer.status == 303
            assert answer.cookies["__Host-order_tracking_session"]["secure"]
            assert "Strict-Transport-Security" in answer.headers
    host, port = url.removeprefix("https://").split(":")
    for spelling in SPELLINGS:
        for rest in ("Host: x", "Host: a b", f"Host: x\r\nX: {'x' * 40_000}"):
            request = f"PUT {spelling.format(token=TOKEN)} HTTP/1.1\r\n{rest}\r\nConnection: close\r\n\r\n"
            await asyncio.to_thread(send_broken, host, int(port), request, tls)
    await asyncio.to_thread(
        send_broken, host, int(port), f"PUT /webhook/{TOKEN} HTTP/1.1\r\nHost: x\r\nConn", tls
    )
    plain = f"PUT /webhook/{TOKEN} HTTP/1.1\r\nHost: x\r\n\r\n"
    await asyncio.to_thread(send_broken, host, int(port), plain, None)

    def logs() -> str:
        return "".join(log.read_text() for log in folder.glob("*.log"))

    # nginx logs a request after its response, and this request is the last one.
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session,
        session.get(f"{url}/orders/THE-LAST") as answer,
    ):
        assert answer.status == 401
    await asyncio.to_thread(until, lambda: "/orders/THE-LAST" in logs(), logs)
    assert "/orders/KOM1/events" in logs()
    assert TOKEN not in logs()


def send_broken(host: str, port: int, request: str, tls: ssl.SSLContext | None) -> None:
    """Send bytes, and read to the end of the connection, when the request has been processed."""
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection((host, port), PATIENCE_SECONDS))
        if tls is not None:
            connection = stack.enter_context(tls.wrap_socket(connection))
        connection.sendall(request.encode())
        with contextlib.suppress(ConnectionError):
            # An incomplete request gets no response.
            while request.endswith("\r\n\r\n") and connection.recv(65_536):
                pass


@asynccontextmanager
async def port_held(url: str) -> AsyncIterator[None]:
    """Hold the port of a URL for the length of the block, so that no other process can listen on it."""
    host, port = url.removeprefix("http://").split(":")
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((host, int(port)))
        yield


async def test_nginx_logs_no_token_while_the_service_is_down(
    service: RunningService, proxy: tuple[str, Path]
) -> None:
    """While the service is down, sender and buyer get a 5xx, and no log of nginx contains a token."""
    url, folder = proxy
    service.terminate()
    try:
        tls = client_tls(folder)
        async with (
            port_held(service.url),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session,
            session.put(f"{url}/webhook/{TOKEN}", json={"order_no": "KOM2", "status": "Dikirim"}) as answer,
            session.get(f"{url}/t/{TOKEN}") as page,
        ):
            assert (answer.status, page.status) == (502, 502)
            host, port = url.removeprefix("https://").split(":")
            for spelling in SPELLINGS:
                request = f"PUT {spelling.format(token=TOKEN)} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
                await asyncio.to_thread(send_broken, host, int(port), request, tls)
    finally:
        service.start()
    assert TOKEN not in "".join(log.read_text() for log in folder.glob("*.log"))


async def test_nginx_limits_the_rate_of_buyers_pages(proxy: tuple[str, Path]) -> None:
    """An address that tries links gets 429 after a few, and other requests of it are still served."""
    url, folder = proxy
    tls = client_tls(folder)
    connector = aiohttp.TCPConnector(ssl=tls, local_addr=(SENDER, 0))
    async with aiohttp.ClientSession(connector=connector) as session:
        statuses = []
        for path in (*["/t/forged"] * (BUYERS_BURST + 2), "/livez"):
            async with session.get(f"{url}{path}") as answer:
                statuses.append(answer.status)
    assert statuses == [404] * (BUYERS_BURST + 1) + [429, 200]


def client_tls(folder: Path) -> ssl.SSLContext:
    """Return a client's settings for TLS, which trust the test's certificate."""
    tls = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
    tls.check_hostname = False
    return tls


@contextlib.contextmanager
def slow_requests(url: str, tls: ssl.SSLContext, source: str, path: str, number: int) -> Iterator[None]:
    """Hold requests whose bodies never arrive, from one address, for the length of the block."""
    host, port = url.removeprefix("https://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(number):
            connection = stack.enter_context(
                socket.create_connection((host, int(port)), PATIENCE_SECONDS, source_address=(source, 0))
            )
            connection = stack.enter_context(tls.wrap_socket(connection))
            connection.sendall(f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n".encode())
        yield


async def test_one_address_cannot_use_up_nginx(proxy: tuple[str, Path]) -> None:
    """A stranger with many unfinished requests is refused; other addresses are not. Webhooks count apart."""
    url, folder = proxy
    tls = client_tls(folder)
    stranger = "127.0.0.3"

    async def status(source: str, path: str, method: str = "GET") -> int:
        connector = aiohttp.TCPConnector(ssl=tls, local_addr=(source, 0))
        report = {"order_no": "KOM3", "status": "Dikirim"} if method == "PUT" else None
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(method, f"{url}{path}", json=report) as answer,
        ):
            assert answer.headers["Server"] == "nginx"
            return answer.status

    async def is_limited(path: str, method: str) -> bool:
        # A webhook gets 503, which every sender understands as "later".
        return await status(stranger, path, method) == (503 if method == "PUT" else 429)

    webhook = f"/webhook/{TOKEN}"
    with slow_requests(url, tls, stranger, "/orders", READS_MAX):
        await until_async(lambda: is_limited("/livez", "GET"))
        assert await status(stranger, webhook, "PUT") == 200
        assert await status(SENDER, "/livez") == 200
    with slow_requests(url, tls, stranger, webhook, WEBHOOKS_MAX):
        await until_async(lambda: is_limited(webhook, "PUT"))
        assert await status(stranger, "/livez") == 200
        assert await status(SENDER, webhook, "PUT") == 200
    logs = "".join(log.read_text() for log in folder.glob("*.log"))
    assert TOKEN not in logs
    assert re.search(
        rf"^{stranger} \[[^]]+\] PUT 503 ", (folder / "webhook-access.log").read_text(), re.MULTILINE
    )


@pytest.mark.parametrize("sent", ["", "GET /livez HTTP/1.1\r\nHost: x\r\nX-Slow: "])
def test_nginx_closes_slow_connections(proxy: tuple[str, Path], sent: str) -> None:
    """A connection without a request's complete head is closed, after 2 s instead of the documented 10 s."""
    url, folder = proxy
    host, port = url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port)), PATIENCE_SECONDS) as connection,
        client_tls(folder).wrap_socket(connection) as tls,
    ):
        tls.sendall(sent.encode())
        # Parts of a head do not prolong its time.
        deadline = time.monotonic() + PATIENCE_SECONDS
        tls.settimeout(0.5)
        while time.monotonic() < deadline:
            try:
                if not tls.recv(65_536):
                    return
            except TimeoutError:
                tls.sendall(b"x" if sent else b"")
            except OSError:
                return
    pytest.fail("the connection is still open")


async def test_nginx_forwards_no_forged_header(service: RunningService, proxy: tuple[str, Path]) -> None:
    """Of the headers that describe a proxy's client, the service receives only those that nginx sets."""
    url, folder = proxy
    heads: list[str] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    names = (
        "Forwarded",
        "X-Forwarded-For",
        "X-Forwarded-Host",
        "X-Forwarded-Port",
        "X-Forwarded-Proto",
        "X-Real-IP",
    )
    host, port = service.url.removeprefix("http://").split(":")
    service.terminate()
    try:
        async with (
            await asyncio.start_server(respond, host, int(port)),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=client_tls(folder))) as session,
            session.get(f"{url}/orders", headers=dict.fromkeys(names, "203.0.113.7")) as answer,
        ):
            assert answer.status == 204
    finally:
        service.start()
    (head,) = heads
    received = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
    assert {name: value for name, value in received.items() if "orward" in name or "Real" in name} == {
        "X-Forwarded-For": f"203.0.113.7, {PROXY}",
        "X-Forwarded-Proto": "https",
    }


def test_nginx_refuses_weak_tls(proxy: tuple[str, Path]) -> None:
    """No cipher without forward secrecy is accepted."""
    url, folder = proxy
    host, port = url.removeprefix("https://").split(":")
    tls = client_tls(folder)
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    tls.set_ciphers("AES256-GCM-SHA384")
    with (
        socket.create_connection((host, int(port)), PATIENCE_SECONDS) as connection,
        pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"),
    ):
        tls.wrap_socket(connection)


@pytest.mark.parametrize(
    "name", ["order-tracking.service", "order-tracking-backup.service", "order-tracking-backup.timer"]
)
def test_the_unit_is_one_that_systemd_takes(name: str, tmp_path: Path) -> None:
    """The units are accepted by systemd without a warning about their names or values."""
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("this machine has no systemd")
    for file in OPERATIONS.glob("order-tracking*"):
        # Any existing program will do if its path needs no escaping in a unit file.
        documented = re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", file.read_text(encoding="utf-8"))
        (tmp_path / file.name).write_text(documented, encoding="utf-8")
    done = subprocess.run(
        [verify, "verify", "--man=no", str(tmp_path / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_has_a_fixed_base() -> None:
    """The base image is named by its digest, because a tag may be moved to another image."""
    containerfile = (OPERATIONS / "Containerfile").read_text(encoding="utf-8")
    bases = re.findall(r"(?m)^FROM (\S+)", containerfile)
    assert bases
    assert [base for base in bases if not re.search(r"@sha256:[0-9a-f]{64}$", base)] == []


def test_the_backup_script(service: RunningService, tmp_path: Path) -> None:
    """The script makes a dump, removes old ones and writes the time for Prometheus, but not after a failure."""
    program = tmp_path / "order-tracking"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m service "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = tmp_path / "backup.sh"
    documented = (OPERATIONS / "backup.sh").read_text(encoding="utf-8")
    for theirs in ("/var/backups/order-tracking", "/var/lib/node_exporter"):
        assert theirs in documented
        documented = documented.replace(theirs, str(tmp_path))
    script.write_text(documented, encoding="utf-8")
    expired = tmp_path / "tracking-2026-01-01T030000.dump"
    expired.touch()
    os.utime(expired, (0, 0))
    metric = tmp_path / "order_tracking.prom"
    names = environment(service.state_dir)

    def run(**changed: str) -> subprocess.CompletedProcess[str]:
        path = f"{tmp_path}:{os.defpath}"
        variables = {**names, "PYTHONPATH": str(ROOT), "PATH": path, **changed}
        return subprocess.run(["sh", script], env=variables, capture_output=True, text=True, check=False)

    failed = run(ORDER_TRACKING_STATE_DIR=str(tmp_path / "none"))
    assert failed.returncode != 0
    assert expired.exists()
    assert not metric.exists()
    before = int(time.time())
    done = run()
    assert done.returncode == 0, done.stderr
    assert [dump.stat().st_size > 0 for dump in tmp_path.glob("*.dump")] == [True]
    name, seconds = metric.read_text(encoding="utf-8").split()
    assert name == "order_tracking_backup_timestamp_seconds"
    assert before <= int(seconds) <= time.time()
    assert metric.stat().st_mode & 0o777 == 0o644
