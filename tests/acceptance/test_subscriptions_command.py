"""``order-tracking subscriptions``: every subcommand, its output, and its errors."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from service.database.embedded_postgres import running_dsn
from tests.support.commands import Completed, call_command
from tests.support.processes import RunningService, running_service
from tests.support.waiting import until

NETWORKS = {"SUBSCRIPTION_NETWORKS": "127.0.0.0/8"}
# Nothing listens there.
DOWN = "http://127.0.0.1:9/hooks"
NO_ID = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def service(state_dir: Path) -> Iterator[RunningService]:
    """Run a service that attempts each event twice."""
    with running_service(state_dir, SUBSCRIPTION_RETRY_SECONDS="0,0.05", **NETWORKS) as service:
        yield service


def call(service: RunningService, *arguments: str, code: int = 0) -> Completed:
    """Run a subcommand, and expect its exit code."""
    done = call_command(service.state_dir, "subscriptions", *arguments, **NETWORKS)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def add(service: RunningService, *options: str) -> str:
    """Add a subscription for an endpoint that is down, and return its id."""
    (number,) = re.findall(r"^id +(\S+)$", call(service, "add", DOWN, *options).stdout, re.MULTILINE)
    return str(number)


def read(service: RunningService, path: str) -> Any:
    """Read a path of the API."""
    with urllib.request.urlopen(service.url + path) as response:  # noqa: S310 - our own
        return json.load(response)


def push(service: RunningService, order_no: str, status: str) -> None:
    """Send a report."""
    body = json.dumps({"order_no": order_no, "status": status}).encode()
    request = urllib.request.Request(f"{service.url}/webhook", body, method="PUT")  # noqa: S310 - our own
    urllib.request.urlopen(request).close()  # noqa: S310 - our own


def test_a_subscription_from_its_first_day_to_its_last(service: RunningService) -> None:
    """Each subcommand does what it says, and its output names what has changed."""
    number = add(
        service, "--verdict", "advanced", "--verdict", "late", "--status", "in_transit", "--include", "body"
    )
    listed = call(service, "list").stdout
    assert number in listed
    assert "advanced, late" in listed
    found = read(service, f"/subscriptions/{number}")
    assert (found["verdicts"], found["statuses"], found["include"]) == (
        ["advanced", "late"],
        ["in_transit"],
        ["body"],
    )
    push(service, "KOM1", "Dikirim")
    push(service, "KOM2", "Dikirim")
    until(lambda: held(service, number) == [("KOM1", 2), ("KOM2", 2)], lambda: held(service, number))
    shown = call(service, "show", number).stdout
    assert "cannot connect to 127.0.0.1:9" in shown
    assert "KOM2" in shown
    assert "version 1 of KOM1 is due now" in call(service, "retry", number, "KOM1").stdout
    assert call(service, "retry", number, "--all").stdout.count("is due now") == 2
    until(lambda: held(service, number) == [("KOM1", 2), ("KOM2", 2)], lambda: held(service, number))
    assert "version 1 of KOM1 is skipped" in call(service, "skip", number, "KOM1", "the shop knows").stdout
    until(lambda: held(service, number) == [("KOM2", 2)], lambda: held(service, number))
    assert call(service, "pause", number).stdout == "paused\n"
    assert "paused: operator" in call(service, "list").stdout
    checked = call_command(service.state_dir, "check", **NETWORKS)
    assert f"the subscription {number} has held orders that await you: 1" in checked.stdout
    with psycopg.connect(str(running_dsn(service.state_dir))) as connection:
        connection.execute("UPDATE subscriptions SET state_reason = 'log_went_back'")
    checked = call_command(service.state_dir, "check", **NETWORKS)
    assert f"WRONG  the subscription {number} has stopped by itself (log_went_back)" in checked.stdout
    replayed = call(service, "replay", number, "--from-position", "0").stdout
    assert replayed == "the events above position 0 are sent again\n"
    call(service, "replay", number, "--from-time", "2026-01-01T00:00:00Z")
    assert call(service, "resume", number).stdout == "active\n"
    rotated = call(service, "rotate-secret", number)
    assert rotated.stdout.startswith("whsec_")
    assert "the previous secret signs until" in rotated.stderr
    assert "cannot connect to 127.0.0.1:9" in call(service, "test", number, code=1).stderr
    assert call(service, "remove", number).stdout == "removed\n"
    assert read(service, "/subscriptions")["subscriptions"] == []
    recorded = [
        one for one in reversed(read(service, "/audit/operations")["operations"]) if one["via"] == "cli"
    ]
    assert [one["action"].removeprefix("subscription_") for one in recorded] == [
        *("added", "delivery_retried", "delivery_retried", "delivery_retried", "delivery_skipped", "paused"),
        *("replayed", "replayed", "resumed", "secret_rotated", "tested", "removed"),
    ]


def held(service: RunningService, number: str) -> list[tuple[str, int]]:
    """Return the held orders that await an operator, and their attempts."""
    return sorted(
        (one["order_no"], one["attempts"])
        for one in read(service, f"/subscriptions/{number}/held")["held"]
        if one["next_attempt_at"] is None
    )


def test_errors_say_what_was_expected(service: RunningService) -> None:
    """Wrong usage exits with 2 and an unknown subscription with 1, in one line that names the value."""
    for arguments, code, expected in (
        (("add", "shop.example/hooks"), 2, "'shop.example/hooks' is not a URL. Expected https://host/path"),
        (("add", "https://10.0.0.1/"), 2, "10.0.0.1 is not a public address"),
        (("add", DOWN, "--verdict", "advance"), 2, "--verdict advance is unknown. Expected one of advanced,"),
        (
            ("add", DOWN, "--verdict", "late", "--all-verdicts"),
            2,
            "pass only one of --verdict and --all-verdicts",
        ),
        (("add", DOWN, "--from-time", "yesterday"), 2, "yesterday is not a time"),
        (("add", DOWN, "--from-time", "2026-01-01"), 2, "2026-01-01 has no offset"),
        (("add", DOWN, "--from-time", "2999-01-01T00:00:00Z"), 2, "lies in the future"),
        (("add", DOWN, "--from-position", "99"), 1, "the log ends at position 0, before 99: pass at most 0"),
        (
            ("add", DOWN, "--from-position", "0", "--from-time", "2026-01-01T00:00:00Z"),
            2,
            "pass only one of --from-position and --from-time",
        ),
        (("show", "nonsense"), 1, "no subscription has the id nonsense"),
        (("pause", NO_ID), 1, f"no subscription has the id {NO_ID}"),
        (("remove", NO_ID), 1, NO_ID),
        (("rotate-secret", NO_ID), 1, NO_ID),
        (("test", NO_ID), 1, NO_ID),
        (("replay", NO_ID), 2, "pass --from-position or --from-time"),
        (("retry", NO_ID), 2, "pass either an order number or --all"),
        (("retry", NO_ID, "KOM9"), 1, "does not hold the order KOM9"),
        (("skip", NO_ID, "KOM9", ""), 2, "the reason must have 1 to 500 printable characters"),
    ):
        done = call(service, *arguments, code=code)
        assert expected in done.stderr, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1


def test_every_verdict(service: RunningService) -> None:
    """With --all-verdicts, and from the beginning, every event is due."""
    push(service, "KOM1", "Entah di mana")
    number = add(service, "--all-verdicts", "--from-position", "0")
    assert read(service, f"/subscriptions/{number}")["verdicts"] == []
    until(lambda: held(service, number) == [("KOM1", 2)], lambda: held(service, number))
