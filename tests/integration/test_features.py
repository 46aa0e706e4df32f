"""Features: what is on, what is gone when it is off, and what goes on when it is on again."""

import asyncio
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import aiohttp
import pytest
from pydantic import ValidationError
from structlog.testing import capture_logs

from projections.postgres import Connection
from service.app import Service
from service.database.schema import prepare_database
from service.features import DEFAULT, FEATURES, SWITCHED, choose_features
from service.features.settings import Settings
from service.listening import serving
from tests.support.client import Client, serving_client
from tests.support.folders import ROOT
from tests.support.receiver import Receiver, receiving
from tests.support.recording import record, running
from tests.support.reports import report
from tests.support.waiting import until_async

# A path of each feature, and how a metric of it begins.
SIGNS: Final = {
    "pages": ("/track", None),
    "subscriptions": ("/subscriptions", "subscription_"),
    "proofs": ("/history/key", "history_"),
}
PROOFS: Final = ("proofs",)


def parts() -> list[str]:
    """Return the declared locations of every feature."""
    found = []
    for feature in FEATURES:
        names = ("run", "settings", "problems", "check", "restore", "files")
        found += [location for name in names if (location := getattr(feature, name))]
        found += [command.location for command in feature.commands]
    return found


@pytest.mark.parametrize("location", parts())
def test_a_declaration_names_what_is_there(location: str) -> None:
    """Each location leads to an object of the feature's own package."""
    package = location.rpartition(":")[0].split(".")[2]
    (feature,) = [feature for feature in FEATURES if feature.name == package]
    commands = {command.location: command for command in feature.commands}
    if location not in commands:
        (part,) = [name for name, value in vars(feature).items() if value == location]
        assert feature.load(part) is not None


@pytest.mark.parametrize("features", [(), ("pages",), ("subscriptions",), ("proofs",), tuple(SIGNS)])
async def test_what_is_off_is_gone(dsn: str, features: tuple[str, ...]) -> None:
    """Paths, metrics, the contract, tasks, menu and connections are those of the features that are on."""
    async with serving_client(dsn, features=features) as client:
        await client.webhook("KOM1")
        metrics = await client.text("/metrics")
        paths = (await client.get("/openapi.json"))["paths"]
        for name, (path, metric) in SIGNS.items():
            is_on = name in features
            assert (await client.status("GET", path) != 404) == is_on, path
            if metric is not None:
                assert (f"# HELP {metric}" in metrics) == is_on, metric
                assert (path in paths) == is_on
        if "pages" in features:
            menu = (await client.text("/track/KOM1")).partition("<main")[0]
            assert ('href="/verify"' in menu, 'href="/deliveries"' in menu) == (
                "proofs" in features,
                "subscriptions" in features,
            )


@pytest.mark.parametrize("name", ["subscriptions", "proofs"])
async def test_a_feature_costs_tasks_and_connections_only_while_it_is_on(
    dsn: str, connection: Connection, name: str
) -> None:
    """A service without it has fewer tasks and sessions."""
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"

    async def count(service: Service) -> tuple[int, int]:
        """Count the tasks, and the sessions without those of the pool, which grows when the machine is busy."""
        pool = service.core.pool
        all_sessions: int = await connection.fetchval(sessions)
        return len(asyncio.all_tasks()), all_sessions - pool.idle - pool.used

    async with running(Settings(features=()), dsn) as service:
        await record(service, report("KOM0"))
        few_tasks, few_sessions = await count(service)
    async with running(Settings(features=(name,)), dsn) as service:
        await record(service, report("KOM1"))

        async def are_more() -> bool:
            tasks, found = await count(service)
            return tasks > few_tasks and found > few_sessions

        await until_async(are_more)


def test_nothing_of_a_feature_that_is_off_is_imported(dsn: str, tmp_path: Path) -> None:
    """A service without features imports the declarations and the settings of features, and nothing else."""
    program = f"""
import asyncio, sys
from service.features.settings import Settings
from service.app import Service
async def run():
    service = Service(Settings(features=(), state_dir={str(tmp_path)!r}), {dsn!r})
    await service.start()
    await service.stop()
asyncio.run(run())
print([name for name in sys.modules if name.startswith("service.features.")])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    names = eval(done.stdout.splitlines()[-1])  # noqa: S307 - our own list
    declared = {f"service.features.{feature.name}" for feature in FEATURES}
    settings = {"service.features.settings"} | {f"{name}.settings" for name in declared}
    assert {*names} <= declared | settings
    assert not [*tmp_path.iterdir()]


# Which features are on


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (None, DEFAULT),
        ("none", ()),
        ("pages", ("pages",)),
        (" proofs , pages,proofs", ("pages", "proofs")),
    ],
)
async def test_the_list_is_exact(connection: Connection, features: Any, expected: tuple[str, ...]) -> None:
    """Without a list, the default is on; a list is exactly what is on."""
    chosen = await choose_features(Settings(features=features), connection)
    assert {*chosen.on} == {*expected}
    assert chosen.used_but_off == {}


@pytest.mark.parametrize("features", ["pages,history", "none,pages", ",", "Pages"])
def test_an_unknown_feature_is_refused(features: Any) -> None:
    """The error names the known ones, or says that 'none' stands alone."""
    with pytest.raises(ValidationError, match=r"pages, proofs, subscriptions|none stands alone|is empty"):
        Settings(features=features)


async def test_a_database_with_a_history_is_followed_unless_a_list_says_otherwise(
    dsn: str, connection: Connection
) -> None:
    """Without a list, its tree grows on; with one, it stays, which is logged and recorded once."""
    size = "SELECT max(tile * 256 + length(hashes) / 32) FROM history_tiles WHERE level = 0"

    async def has_size(expected: int) -> bool:
        return bool(await connection.fetchval(size) == expected)

    async with running(Settings(features=PROOFS), dsn) as service:
        await record(service, report("KOM1"))
        await until_async(lambda: has_size(2))
    async with running(Settings(), dsn) as service:
        await record(service, report("KOM2"))
        await until_async(lambda: has_size(3))
    for _ in range(2):
        with capture_logs() as logs:
            async with running(Settings(features=("pages",)), dsn) as service:
                await record(service, report("KOM3"))
        (line,) = [log for log in logs if log["event"] == "a feature is off that the database has used"]
        assert (line["feature"], line["database"]) == ("proofs", "there is a history")
    assert await has_size(3)
    actions = "SELECT action FROM operations WHERE subject = 'proofs' ORDER BY operation_id"
    assert [one for (one,) in await connection.fetch(actions)] == ["feature_stopped"]
    # It catches up with what was recorded in the meantime.
    async with running(Settings(features=PROOFS), dsn):
        await until_async(lambda: has_size(5))
    assert [one for (one,) in await connection.fetch(actions)] == ["feature_stopped", "feature_resumed"]


async def test_an_old_checkpoint_is_continued_after_the_feature_was_off(dsn: str) -> None:
    """A proof from after the pause continues the checkpoint from before it."""

    async def signed(client: Client, position: int) -> Any:
        return await client.get(f"/orders/KOM1/proof?after_position={position}&since=2")

    async with serving_client(dsn, features=PROOFS) as client:
        receipt = await client.webhook("KOM1")
        await until_async(lambda: is_signed(client, receipt["position"]))
    async with serving_client(dsn, features=()) as client:
        receipt = await client.webhook("KOM1", "Diterima")
    async with serving_client(dsn, features=PROOFS) as client:
        await until_async(lambda: is_signed(client, receipt["position"]))
        assert (await signed(client, receipt["position"]))["since"]["size"] == 2


async def is_signed(client: Client, position: int) -> bool:
    return await client.status("GET", f"/orders/KOM1/proof?after_position={position}") == 200


async def test_a_subscription_goes_on_where_it_stopped(dsn: str) -> None:
    """What was recorded while the feature was off is delivered when it is on again, in order."""
    on, off = (
        {"features": features, "subscription_networks": "127.0.0.0/8"} for features in (("subscriptions",), ())
    )
    async with receiving() as receiver:
        await _pause(dsn, receiver, on, off)


async def _pause(dsn: str, receiver: Receiver, on: Any, off: Any) -> None:
    async with serving_client(dsn, **on) as client:
        await client.post("/subscriptions", 201, {"url": receiver.url, "verdicts": []})
        await client.webhook("KOM1", "Diajukan")
        await receiver.wait_for(1)
    with capture_logs() as logs:
        async with serving_client(dsn, **off) as client:
            for status in ("Dikemas", "Dikirim", "Diterima"):
                await client.webhook("KOM1", status)
    assert [log["database"] for log in logs if log.get("feature") == "subscriptions"] == [
        "active subscriptions: 1"
    ]
    assert len(receiver.requests) == 1
    async with serving_client(dsn, **on):
        await receiver.wait_for(4)
    assert [one.version for one in receiver.accepted] == [1, 2, 3, 4]


async def test_services_with_two_sets_of_features_share_a_database(dsn: str) -> None:
    """A service without features records beside one with all: the other shows and proves its reports."""
    whole = Settings(port=0, features=tuple(SWITCHED))
    async with serving(whole, dsn) as (port, _), serving_client(dsn, features=()) as small:
        receipt = await small.webhook("KOM1")
        client = Client(small.session, port)
        assert "KOM1" in await client.text(f"/track?after_position={receipt['position']}")
        await until_async(lambda: is_signed(client, receipt["position"]))


async def test_a_feature_that_fails_loses_no_report(dsn: str) -> None:
    """A failure after the commit is logged and counted, and the webhook, the views and others go on."""
    settings = Settings(port=0, features=("subscriptions", "pages"))
    async with serving(settings, dsn) as (port, service), aiohttp.ClientSession() as session:

        def fail(*_arguments: object) -> None:
            raise RuntimeError("a fault of the feature")

        contributions = service.core.contributions
        contributions["subscriptions"] = replace(contributions["subscriptions"], on_commit=fail)
        service.core.followers.join("subscriptions", fail)
        client = Client(session, port)
        with capture_logs() as logs:
            receipts = [await client.webhook(f"KOM{number}") for number in range(3)]
            for receipt in receipts:
                assert await client.get(f"/orders/KOM0?after_position={receipt['position']}")
        lines = [log for log in logs if log["event"] == "a feature failed after a commit"]
        assert [log["feature"] for log in lines] == ["subscriptions"]
        metrics = await client.text("/metrics")
        assert 'feature_failures_total{feature="pages"} 0.0' in metrics
        failures = re.search(r'feature_failures_total\{feature="subscriptions"\} (.+)', metrics)
        assert failures is not None
        assert float(failures[1]) >= 2 * len(receipts)


async def test_the_schema_has_the_tables_of_every_feature(empty_dsn: str) -> None:
    """A database that a service without features has made needs no migration when one is switched on."""
    await prepare_database(empty_dsn)
    async with serving_client(empty_dsn, features=tuple(SWITCHED)) as client:
        receipt = await client.webhook("KOM1")
        await until_async(lambda: is_signed(client, receipt["position"]))
        assert (await client.get("/subscriptions"))["subscriptions"] == []
