"""Refused webhooks: the cause of each 503 is counted, logged, measured and shown."""

import asyncio
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from domain.order import Report
from service.batcher import BatchFailedError, OverloadedError
from service.database.connections import (
    DedicatedConnection,
    StorageUnavailableError,
    UnsupportedServerError,
    connect,
)
from service.database.embedded_postgres import EmbeddedPostgres
from service.database.schema import SERVICE_ROLE
from service.event_log.store import UnreplicatedCommitError
from service.ingest.refusals import CAUSES, LOG_SECONDS, Cause, QuarantineFullError, Refusals, find_cause
from tests.support.client import Client, serving_client
from tests.support.databases import FAST_SETTINGS
from tests.support.folders import copied_folder
from tests.support.recording import locked_log
from tests.support.waiting import until_async


async def is_ready(client: Client) -> bool:
    return await client.status("GET", "/readyz") == 200


BODY = b'{"order_no":"KOM1","status":"Dikirim"}'
KEYED = {"Idempotency-Key": "key-1"}


def chained(*errors: Exception) -> Exception:
    """Return the first error, each caused by the next."""
    for error, cause in pairwise(errors):
        error.__cause__ = cause
    return errors[0]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OverloadedError("too many"), "queue_full"),
        (QuarantineFullError("too many"), "quarantine_full"),
        (asyncpg.DiskFullError(), "disk_full"),
        (chained(StorageUnavailableError(), BatchFailedError(), asyncpg.DiskFullError()), "disk_full"),
        (asyncpg.ReadOnlySQLTransactionError(), "read_only"),
        (chained(StorageUnavailableError(), asyncpg.TooManyConnectionsError()), "too_many_connections"),
        (asyncpg.LockNotAvailableError(), "lock_held"),
        (chained(StorageUnavailableError(), ConnectionRefusedError()), "unreachable"),
        (asyncpg.CannotConnectNowError(), "unreachable"),
        (UnsupportedServerError("too old"), "unusable"),
        (chained(StorageUnavailableError(), TimeoutError()), "no_answer"),
        (asyncpg.QueryCanceledError(), "no_answer"),
        (chained(StorageUnavailableError(), asyncpg.InvalidPasswordError()), "unusable"),
        (asyncpg.InsufficientPrivilegeError(), "unusable"),
        (UnreplicatedCommitError("cancelled"), "replication_wait"),
        (chained(StorageUnavailableError(), asyncpg.TargetServerAttributeNotMatched()), "read_only"),
    ],
)
def test_the_cause_is_found_in_the_chain_of_errors(error: Exception, cause: Cause) -> None:
    """The first error with a known cause decides; a loss of the connection comes second."""
    assert find_cause(error) == cause


@pytest.mark.attacks("handler", "seconds")
async def test_a_held_lock_is_named_everywhere(dsn: str) -> None:
    """While a session holds the append lock, each 503 is explained; the next recorded webhook ends that."""
    async with serving_client(dsn, request_seconds_max=0.3) as client:
        with capture_logs() as logs:
            async with locked_log(dsn):
                for number in range(2):
                    body = b'{"order_no":"KOM%d","status":"Dikirim"}' % number
                    assert await client.status("PUT", "/webhook", body) == 503
                problem = await client.get("/readyz", status=503)
                assert problem["cause"] == "lock_held"
                page = await client.text("/?lang=en")
                assert "Webhooks are not being accepted (503): Another session holds a lock on the log." in page
            assert 'webhook_refusals_total{cause="lock_held"} 2.0' in await client.text("/metrics")
            assert (await client.webhook("KOM1"))["version"] == 1
            await until_async(partial(is_ready, client))
        events = [(log["event"], log["cause"]) for log in logs if "webhooks are" in log["event"]]
        assert events == [("webhooks are refused", "lock_held"), ("webhooks are recorded again", "lock_held")]
        assert "not being accepted" not in await client.text("/?lang=en")


BACKENDS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"


async def test_a_stall_takes_few_connections(dsn: str) -> None:
    """While the log is locked, callers with keys that give up leave no more than two backends behind."""
    async with serving_client(dsn, request_seconds_max=1.5) as client:
        await client.raw(BODY, **KEYED)
        await client.get("/readyz")
        async with locked_log(dsn) as holder:
            before, most, calls = await holder.fetchval(BACKENDS), 0, []
            for number in range(150):
                body = b'{"order_no":"K%d","status":"Dikirim"}' % number
                calls.append(asyncio.create_task(client.status("PUT", "/webhook", body, KEYED)))
                await asyncio.sleep(0.02)
                most = max(most, await holder.fetchval(BACKENDS))
            assert {*await asyncio.gather(*calls)} == {503}
            assert most <= before + 2
        assert (await client.raw(BODY, **{"Idempotency-Key": "key-2"}))["version"] == 2


async def test_every_cause_has_a_series_and_a_text(dsn: str) -> None:
    """Before the first refusal, each cause has a series at 0, so that an alert can compare it."""
    async with serving_client(dsn) as client:
        metrics = await client.text("/metrics")
        for cause in CAUSES:
            assert f'webhook_refusals_total{{cause="{cause}"}} 0.0' in metrics


async def test_a_lasting_cause_is_logged_again(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cause is logged when it begins, when it changes, and every LOG_SECONDS while it lasts."""
    dedicated = DedicatedConnection(lambda: connect(dsn))
    refusals = Refusals(dedicated, lambda _keyed: None)
    now = 1_000_000.0
    monkeypatch.setattr("service.ingest.refusals.monotonic", lambda: now)
    with capture_logs() as logs:
        for error in (OverloadedError("a"), OverloadedError("a"), asyncpg.DiskFullError("b")):
            await refusals.count(error, "plain")
        assert [(log["cause"], log["refused"]) for log in logs] == [("queue_full", 1), ("disk_full", 1)]
        now += LOG_SECONDS
        await refusals.count(asyncpg.DiskFullError("b"), "plain")
    assert [(log["cause"], log["refused"]) for log in logs[2:]] == [("disk_full", 2)]
    recent = [refusals.recent]
    now += LOG_SECONDS
    recent.append(refusals.recent)
    assert [each is not None for each in recent] == [True, False]
    await dedicated.close()


async def cause_of_refusal(client: Client, headers: dict[str, str]) -> Any:
    """Send a webhook that gets 503, and return the cause that the response names."""
    async with client.session.put(client.url("/webhook"), data=BODY, headers=headers) as response:
        assert response.status == 503, await response.text()
        return (await response.json())["cause"]


@pytest.mark.parametrize(
    ("break_it", "repair_it"),
    [
        (
            "SELECT setval('order_events_notification_id_seq', 9223372036854775807)",
            "SELECT setval('order_events_notification_id_seq', 100)",
        ),
        (
            "ALTER TABLE order_events ADD CONSTRAINT added CHECK (false) NOT VALID",
            "ALTER TABLE order_events DROP CONSTRAINT added",
        ),
        (
            "CREATE UNIQUE INDEX added ON order_events ((true))",
            "DROP INDEX added",
        ),
        (
            (
                "CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;"
                "CREATE TRIGGER added BEFORE INSERT ON order_events FOR EACH ROW EXECUTE FUNCTION fail()"
            ),
            "DROP TRIGGER added ON order_events",
        ),
        (
            f"REVOKE USAGE ON SCHEMA public FROM PUBLIC, {SERVICE_ROLE}",
            f"GRANT USAGE ON SCHEMA public TO {SERVICE_ROLE}",
        ),
        ("ALTER TABLE order_events RENAME TO away", "ALTER TABLE away RENAME TO order_events"),
        (
            "REVOKE INSERT ON order_events FROM order_tracking_service",
            (
                "GRANT INSERT (originator_id, originator_version, topic, state) ON order_events"
                " TO order_tracking_service"
            ),
        ),
    ],
    ids=["sequence at its end", "constraint", "unique index", "trigger", "schema", "table", "right"],
)
async def test_no_report_is_blamed_for_the_database(dsn: str, break_it: str, repair_it: str) -> None:
    """What fails every report is not their fault: they get 503 with a cause, and none is quarantined."""
    owner = await connect(dsn.partition("&role=")[0])
    async with serving_client(dsn, request_seconds_max=0.5) as client:
        await client.webhook("KOM0")
        await owner.execute(break_it)
        for headers in ({}, KEYED):
            causes = await asyncio.gather(*(cause_of_refusal(client, headers) for _ in range(3)))
            assert {*causes} == {"unusable"}
            assert (await client.get("/readyz", status=503))["cause"] == "unusable"
        await owner.execute(repair_it)
        assert (await client.raw(BODY, **KEYED))["version"] == 1
        assert (await client.webhook("KOM1"))["version"] == 2
        assert (await client.get("/quarantine"))["entries"] == []
        await until_async(partial(is_ready, client))
    await owner.close()


async def test_the_defaults_of_a_role_do_not_hide_the_log(dsn: str) -> None:
    """The service sends its search path, so that another default of the database does not hide its tables."""
    owner = await connect(dsn.partition("&role=")[0])
    name = await owner.fetchval("SELECT current_database()")
    await owner.execute(f'ALTER DATABASE "{name}" SET search_path = elsewhere')
    await owner.close()
    async with serving_client(dsn) as client:
        assert (await client.webhook("KOM1"))["version"] == 1


async def test_a_refusal_ends_by_a_success_on_the_same_path(dsn: str) -> None:
    """Successes of another kind of webhook do not end a refusal, which is logged once."""
    owner = await connect(dsn.partition("&role=")[0])
    await owner.execute("REVOKE INSERT ON idempotency_keys FROM order_tracking_service")
    async with serving_client(dsn, request_seconds_max=0.5) as client:
        with capture_logs() as logs:
            for number in range(4):
                assert await cause_of_refusal(client, KEYED) == "unusable"
                assert (await client.webhook(f"K{number}"))["version"] == 1
                assert (await client.get("/readyz", status=503))["cause"] == "unusable"
        assert [log["path"] for log in logs if "webhooks are" in log["event"]] == ["keyed"]
        await owner.execute("GRANT INSERT ON idempotency_keys TO order_tracking_service")
        await client.raw(BODY, **KEYED)
        await until_async(partial(is_ready, client))
    await owner.close()


async def test_a_failure_of_the_service_counts_as_a_refusal(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever escapes while a webhook is handled gets 500, and is counted and shown like a 503."""

    def fail(*_arguments: object) -> Report:
        raise RuntimeError("a defect")

    async with serving_client(dsn) as client:
        monkeypatch.setattr("service.ingest.webhook.parse", fail)
        assert await client.status("PUT", "/webhook", BODY) == 500
        assert (await client.get("/readyz", status=503))["cause"] == "failed"
        assert 'webhook_refusals_total{cause="failed"} 1.0' in await client.text("/metrics")


async def test_a_commit_that_waits_for_a_standby_is_named(state_template: Path) -> None:
    """If no standby confirms a synchronous commit, the webhook gets 503 and the operator learns why."""
    settings = {**FAST_SETTINGS, "synchronous_standby_names": "missing"}
    with copied_folder(state_template) as copy, EmbeddedPostgres(copy, settings=settings) as server:
        async with serving_client(server.dsn, request_seconds_max=0.5) as client:
            statuses = [
                client.status("PUT", "/webhook", b'{"order_no":"K","status":"Dikirim"}') for _ in range(3)
            ]
            assert await asyncio.gather(*statuses) == [503, 503, 503]
            assert (await client.get("/readyz", status=503))["cause"] == "replication_wait"


async def test_a_full_queue_does_not_hide_its_cause(dsn: str) -> None:
    """While nothing can be recorded, the queue is full too, for the same cause. Unparseable bodies are kept."""
    async with serving_client(dsn, request_seconds_max=0.3, queue_reports_max=2) as client:
        async with locked_log(dsn):
            body = b'{"order_no":"KOM1","status":"Dikirim"}'
            assert await client.status("PUT", "/webhook", body) == 503
            for _ in range(3):
                many = await asyncio.gather(*(client.status("PUT", "/webhook", body) for _ in range(10)))
                assert {*many} == {503}
                assert (await client.get("/readyz", status=503))["cause"] == "lock_held"
            assert (await client.raw(b"not json"))["outcome"] == "quarantined"
            assert (await client.get("/readyz", status=503))["cause"] == "lock_held"
            metrics = await client.text("/metrics")
            assert 'webhook_refusals_total{cause="lock_held"} 31.0' in metrics
            assert 'webhook_refusals_total{cause="queue_full"} 0.0' in metrics
        await client.webhook("KOM1")
        await until_async(partial(is_ready, client))
        assert 'webhook_refusals_total{cause="failed"} 0.0' in await client.text("/metrics")
