"""Erasure: it empties bodies and addresses, changes nothing else, and holds up no webhook."""

import asyncio

import asyncpg
import pytest

from projections.postgres_errors import Connection
from service.database.connections import connect
from tests.support.client import Client

AS_OWNER = "SET ROLE order_tracking_owner"
ERASE = "CALL erase_order('KOM1', 'asked for')"


async def test_an_erasure_waits_for_no_lock_of_maintenance(client: Client, owner_dsn: str) -> None:
    """During a VACUUM or a CREATE INDEX CONCURRENTLY, an erasure ends, and webhooks are recorded."""
    await client.webhook("KOM1")
    maintenance, owner = await connect(owner_dsn), await connect(owner_dsn)
    # The lock that both of them take.
    await maintenance.execute("BEGIN; LOCK TABLE order_events IN SHARE UPDATE EXCLUSIVE MODE")
    await owner.execute(AS_OWNER)
    erasing = asyncio.create_task(owner.execute(ERASE))
    receipt = await client.webhook("KOM1", "Diterima")
    assert receipt["version"] == 2
    await erasing
    await maintenance.close()
    await owner.close()
    (first, *_) = (await client.get("/orders/KOM1/events"))["events"]
    assert (first["data"]["body"], first["data"]["remote"]) == ("", None)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE order_events SET state = convert_to('{}', 'UTF8')",
        "UPDATE order_events SET state = erased(state), topic = 'other'",
        "UPDATE order_events SET state = erased(state), originator_version = 9",
        "UPDATE order_events SET state = erased(state), recorded_at = now()",
        """UPDATE order_events SET state = convert_to(
            (convert_from(erased(state), 'UTF8')::jsonb || '{"verdict": "late"}')::text, 'UTF8')""",
        "DELETE FROM order_events",
        "TRUNCATE order_events CASCADE",
    ],
)
async def test_the_trigger_lets_only_an_erasure_pass(
    client: Client, connection: Connection, change: str
) -> None:
    """The log's owner can change an event in no other way."""
    await client.webhook("KOM1")
    before = await connection.fetch("TABLE order_events")
    await connection.execute(AS_OWNER)
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="events are immutable"):
        await connection.execute(change)
    await connection.execute("RESET ROLE")
    assert await connection.fetch("TABLE order_events") == before


async def test_another_role_cannot_erase_by_an_update(client: Client, connection: Connection) -> None:
    """A role with the right to update the log, but no member of its owner, cannot empty a body."""
    await client.webhook("KOM1")
    await connection.execute("BEGIN; CREATE ROLE stranger; GRANT SELECT, UPDATE ON order_events TO stranger")
    await connection.execute("SET ROLE stranger")
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="events are immutable"):
        await connection.execute("UPDATE order_events SET state = erased(state)")
    await connection.execute("ROLLBACK")


async def test_a_late_retry_after_an_erasure_gets_its_receipt(client: Client, connection: Connection) -> None:
    """The same key and status get the first receipt again, so what was erased is not recorded once more."""
    body = b'{"order_no": "KOM1", "status": "Dikirim", "buyer": "Budi"}'
    first = await client.raw(body, **{"webhook-id": "key-1"})
    await connection.execute(f"SET ROLE order_tracking_owner; {ERASE}; RESET ROLE")
    assert await client.raw(body, **{"webhook-id": "key-1"}) == first
    other = await client.raw(body.replace(b"Dikirim", b"Diterima"), **{"webhook-id": "key-1"})
    assert (other["version"], other["outcome"]) == (2, "advanced")
    assert (
        await connection.fetchval(
            "SELECT count(*) FROM order_events WHERE convert_from(state, 'UTF8') ~ 'Budi'"
        )
        == 1
    )
