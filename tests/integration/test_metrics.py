"""Metrics have the right values and bounded labels, and the alerts and the dashboard use only existing ones."""

import asyncio
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from projections.postgres import Connection
from service.version import build_info
from tests.support.client import Client, serving_client
from tests.support.folders import ROOT
from tests.support.waiting import until_async

pytestmark = pytest.mark.usefixtures("all_features")

OPERATIONS = ROOT / "docs" / "operations"
# The words of PromQL and the labels of our metrics.
WORDS = {
    "sum", "by", "rate", "increase", "time", "max", "le", "histogram_quantile", "outcome", "view", "state",
    "http_route", "http_response_status_code", "subscription", "cause", "budget", "or", "absent", "d", "h", "m",
}  # fmt: skip
# This metric comes from backup.sh, through node_exporter.
BACKUP_METRIC = "order_tracking_backup_timestamp_seconds"
PROMTOOL = shutil.which("promtool")


async def scraped(client: Client) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    async with client.session.get(f"http://127.0.0.1:{client.port}/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain")
        text = await response.text()
    found: dict[str, Any] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def test_the_metrics_have_the_right_values(client: Client) -> None:
    """The metrics count reports by outcome, batches, responses by route and status, lag, and quarantine
    entries.
    """
    for status in ("Diajukan", "Dikirim", "Dikirim", "mystery"):
        last = await client.webhook("KOM1", status)
    await client.raw(b"not json")
    for view in ("orders", "audit/transitions", "statistics"):
        await client.get(f"/{view}?after_position={last['position']}")
    await client.get("/orders/ABSENT", 404)
    await client.get("/no/such/path", 404)
    found = await scraped(client)
    outcomes = {labels[0][1]: value for labels, value in found["webhook_reports_total"].items()}
    assert outcomes == {
        "advanced": 2, "repeated": 1, "late": 0, "refused": 0, "unrecognised": 1, "quarantined": 1,
    }  # fmt: skip
    assert found["webhook_commit_seconds_count"][()] == found["webhook_batch_reports_count"][()] == 4
    assert found["webhook_batch_reports_sum"][()] == 4
    assert found["webhook_last_received_timestamp_seconds"][()] > 1.7e9
    assert {labels[0][1] for labels in found["projection_lag_events"]} == {
        "current_status", "timeline", "statistics",
    }  # fmt: skip
    assert set(found["projection_lag_events"].values()) == {0}
    assert found["quarantine_entries"][(("state", "open"),)] == 1
    answers = found["http_server_request_duration_seconds_count"]

    def answered(method: str, route: str, status: str) -> float:
        labels = {"http_request_method": method, "http_route": route, "http_response_status_code": status}
        return answers[tuple(sorted(labels.items()))]

    assert answered("PUT", "/webhook", "200") == 5
    assert answered("GET", "/orders/{order_no}", "404") == 1
    assert answered("GET", "unknown", "404") == 1
    assert found["asyncio_tasks"][()] > 3
    assert found["process_resident_memory_bytes"][()] > 1e6


async def test_requests_cannot_add_labels(client: Client) -> None:
    """Unknown paths, methods and order numbers never add a series."""
    await client.webhook("SECRET-1")
    for _ in range(2):
        before = {name: set(series) for name, series in (await scraped(client)).items()}
        for number in range(20):
            await client.webhook(f"SECRET-{number}")
            await client.get(f"/orders/SECRET-{number}-NOT", 404)
            await client.get(f"/x{number}", 404)
            async with client.session.request(f"ODD{number}", f"http://127.0.0.1:{client.port}/orders"):
                pass
    after = {name: set(series) for name, series in (await scraped(client)).items()}
    assert after == before
    assert "SECRET" not in str(after)


async def test_the_build_is_a_metric(client: Client) -> None:
    """The running version and commit are the labels of one metric."""
    labels = tuple(sorted(build_info().items()))
    assert (await scraped(client))["order_tracking_build_info"] == {labels: 1}


# Those of several processes, which the tests of the supervisor read.
SUPERVISOR_METRICS: Final = {"workers", "worker_restarts_total"}


@pytest.mark.parametrize("file", ["alerts.yaml", "grafana.json"])
async def test_alerts_and_dashboard_use_existing_metrics(dsn: str, file: str) -> None:
    """The alerts and the dashboard use only existing metrics."""
    async with serving_client(dsn, body_retention_days=30, subscription_networks="127.0.0.0/8") as client:
        await client.post("/subscriptions", 201, {"url": "http://127.0.0.1:9/"})
        await client.webhook("KOM1")
        await client.raw(b"not json")
        await until_async(partial(has_attempted, client))
        exists = {*await scraped(client), BACKUP_METRIC, *SUPERVISOR_METRICS}
    text = (OPERATIONS / file).read_text(encoding="utf-8")
    if file == "grafana.json":
        asked = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    else:
        asked = re.findall(r"expr: (.*)", text)
    assert len(asked) >= 9
    for expression in asked:
        names = set(re.findall(r"[a-z_]{1,}", re.sub(r'"[^"]*"', "", expression))) - WORDS
        assert names, expression
        assert names <= exists, (expression, names - exists)


async def has_attempted(client: Client) -> bool:
    """Return whether a delivery was attempted."""
    return "subscription_deliveries_total" in await scraped(client)


# Each alert: its input, one value a minute; the time of the evaluation; the labels of the alerts that fire.
SUBSCRIPTION_LAG: Final = 'subscription_lag_seconds{subscription="s1"}'
SUBSCRIPTION_HELD: Final = 'subscription_held_orders{subscription="s1"}'
FIRING: list[tuple[str, dict[str, str], str, list[dict[str, str]]]] = [
    (
        "ReportsAreTurnedAway",
        {'webhook_refusals_total{cause="disk_full"}': "0x5 1+1x9"},
        "15m",
        [{"cause": "disk_full"}],
    ),
    ("ReportsAreTurnedAway", {'webhook_refusals_total{cause="disk_full"}': "0x15"}, "15m", []),
    ("EventsWereLost", {"log_losses_total": "0x5 1+0x9"}, "15m", [{}]),
    ("EventsWereLost", {"log_losses_total": "1+0x15"}, "15m", []),
    ("BackupIsOld", {BACKUP_METRIC: "0x2880"}, "36h", []),
    ("BackupIsOld", {BACKUP_METRIC: "0x2880"}, "38h", [{}]),
    ("BackupIsOld", {BACKUP_METRIC: "0x1439 86400x1440"}, "47h", []),
    ("BackupIsOld", {}, "50m", []),
    ("VolumeIsUnusual", {"webhook_body_bytes_total": "0+120000000x40"}, "35m", [{}]),
    ("VolumeIsUnusual", {"webhook_body_bytes_total": "0+30000000x40"}, "35m", []),
    (
        "StrangersAreRefused",
        {'auth_refusals_total{cause="wrong_token"}': "0+20x20"},
        "15m",
        [{"cause": "wrong_token"}],
    ),
    ("StrangersAreRefused", {'auth_refusals_total{cause="wrong_token"}': "0+5x20"}, "15m", []),
    (
        "BudgetIsExhausted",
        {'budget_refusals_total{budget="streams"}': "0+1x30"},
        "25m",
        [{"budget": "streams"}],
    ),
    ("BudgetIsExhausted", {'budget_refusals_total{budget="streams"}': "0x5 1x30"}, "25m", []),
    ("RetentionStands", {"retention_last_pass_timestamp_seconds": "0x600"}, "7h", [{}]),
    ("RetentionStands", {"retention_last_pass_timestamp_seconds": "0+60x600"}, "7h", []),
    ("RetentionStands", {}, "7h", []),
    ("BackupIsOld", {}, "2h", [{}]),
    ("SubscriptionIsBehind", {SUBSCRIPTION_LAG: "0+60x30"}, "25m", [{"subscription": "s1"}]),
    ("SubscriptionIsBehind", {SUBSCRIPTION_LAG: "800x30"}, "25m", []),
    ("SubscriptionHoldsOrders", {SUBSCRIPTION_HELD: "2x90"}, "80m", [{"subscription": "s1"}]),
    ("SubscriptionHoldsOrders", {SUBSCRIPTION_HELD: "2x30 0x60"}, "80m", []),
    (
        "SubscriptionStopped",
        {'subscription_stopped{subscription="s1"}': "0x5 1x5"},
        "8m",
        [{"subscription": "s1"}],
    ),
    ("SubscriptionStopped", {'subscription_stopped{subscription="s1"}': "0x9"}, "8m", []),
    ("FeatureFails", {'feature_failures_total{feature="pages"}': "0x5 1+1x9"}, "15m", [{"feature": "pages"}]),
    ("FeatureFails", {'feature_failures_total{feature="pages"}': "0x15"}, "15m", []),
]


CRITICAL = ("ReportsAreTurnedAway", "EventsWereLost", "BackupIsOld", "SubscriptionStopped")


@pytest.mark.parametrize(("alert", "series", "time", "labels"), FIRING)
def test_an_alert_fires_when_it_should(
    alert: str, series: dict[str, str], time: str, labels: list[dict[str, str]], tmp_path: Path
) -> None:
    """Prometheus fires the alert with the cause in its text, and is silent while everything is well."""
    if PROMTOOL is None:
        pytest.skip("this machine has no promtool")
    rules = OPERATIONS / "alerts.yaml"
    summaries = {
        "ReportsAreTurnedAway": {
            "summary": "Webhooks get 503 because of disk_full; Komerce may switch the webhook off.",
            "description": 'The section "Why webhooks are refused" of docs/operations.md explains disk_full.',
        },
        "EventsWereLost": {"summary": "The database came back without acknowledged reports."},
        "BackupIsOld": {"summary": "The last backup is older than 36 hours, or its time is unknown."},
        "VolumeIsUnusual": {"summary": "Webhook bodies take more than 1 MB a second; a token may have leaked."},
        "StrangersAreRefused": {"summary": "Requests are refused because of wrong_token."},
        "BudgetIsExhausted": {"summary": "The budget streams is exhausted."},
        "RetentionStands": {"summary": "Old bodies are not erased."},
        "SubscriptionIsBehind": {"summary": "The subscription s1 has events that are older than 15 minutes."},
        "SubscriptionHoldsOrders": {"summary": "The subscription s1 holds 2 orders."},
        "SubscriptionStopped": {"summary": "The subscription s1 has stopped by itself."},
    }
    severity = "critical" if alert in CRITICAL else "warning"
    expected = [
        {"exp_labels": {**one, "severity": severity}, "exp_annotations": summaries[alert]} for one in labels
    ]
    given = [{"series": name, "values": values} for name, values in series.items()]
    checked = [{"eval_time": time, "alertname": alert, "exp_alerts": expected}]
    test = {"interval": "1m", "input_series": given, "alert_rule_test": checked}
    file = tmp_path / "test.yaml"
    # JSON is YAML.
    file.write_text(json.dumps({"rule_files": [str(rules)], "tests": [test]}), encoding="utf-8")
    for command in (["check", "rules", str(rules)], ["test", "rules", str(file)]):
        done = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


async def test_a_silence_does_not_end_with_a_restart(dsn: str, connection: Connection) -> None:
    """From the start on, the time of the last report is that of the log, or else that of the database."""
    name = "webhook_last_received_timestamp_seconds"

    async def shown() -> float:
        async with serving_client(dsn) as client:
            (line,) = [
                line for line in (await client.text("/metrics")).splitlines() if line.startswith(f"{name} ")
            ]
            return float(line.split()[1])

    created = await connection.fetchval("SELECT min(applied_at) FROM schema_version")
    assert await shown() == pytest.approx(created.timestamp())
    async with serving_client(dsn) as client:
        await client.webhook("KOM1")
    recorded = await connection.fetchval("SELECT recorded_at FROM order_events")
    assert await shown() == pytest.approx(recorded.timestamp())


async def test_prometheus_finds_no_fault_in_the_metrics(client: Client) -> None:
    """Names, types and help texts follow the conventions that promtool checks."""
    if PROMTOOL is None:
        pytest.skip("this machine has no promtool")
    await client.webhook("KOM1")
    metrics = (await client.text("/metrics")).encode()
    command = [PROMTOOL, "check", "metrics"]
    done = await asyncio.to_thread(subprocess.run, command, input=metrics, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
