"""A word that becomes known heals the reports that used it, and history stays as it was."""

import asyncio
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from domain.order import Order
from domain.statuses import Vocabulary
from projections.postgres import Connection
from service.database.connections import connect, connected
from service.database.operations import Actor
from service.event_log import store
from service.event_log.codec import decode_event
from service.event_log.follow import Log
from service.event_log.snapshot import snapshot
from service.features.settings import Settings
from service.http.times import to_rfc3339
from service.maintenance.erasure import erase_order
from service.maintenance.rejudgement import (
    PendingReport,
    PendingReports,
    find_pending,
    log_batches,
    order_batches,
    rejudge,
)
from tests.support.client import Client, serving_client
from tests.support.commands import Completed, call_command
from tests.support.examples import GOLDEN_EVENTS, ORDER_NO
from tests.support.recording import EQUAL, dedicated_connection, logged_events, make_recorder, rebuilt

Command: TypeAlias = Callable[..., Completed]

WORD = "Antar Ulang"
CONTENT = f'"{WORD}" = "out_for_delivery"\n'
KNOWN = Vocabulary({WORD: "out_for_delivery"})


@pytest.fixture
def vocabulary_file(tmp_path: Path) -> Path:
    file = tmp_path / "words.toml"
    file.write_text(CONTENT, encoding="utf-8")
    return file


@pytest.fixture
def command(tmp_path: Path, owner_dsn: str) -> Command:
    """Return a function that runs a command on this test's database."""
    return partial(call_command, tmp_path, DATABASE_URL=owner_dsn)


async def pending_reports(
    dsn: str, order_no: str | None = None, vocabulary: Vocabulary = KNOWN
) -> list[PendingReport]:
    async with dedicated_connection(dsn) as held:
        pending = PendingReports(vocabulary.recognise)
        if order_no is not None:
            batches = order_batches(Log(held), order_no, lambda _count: None)
            return [one async for one in find_pending(batches, pending)]
        async with snapshot(lambda: connect(dsn)) as whole:
            return [one async for one in find_pending(log_batches(whole, lambda _count: None), pending)]


async def settled_position(client: Client) -> int:
    """Wait until every view has reached the head, and return it."""
    position: int = (await client.get("/projections"))["head"]
    for path in ("/orders", "/audit/transitions", "/statistics"):
        await client.get(f"{path}?after_position={position}")
    return position


async def test_a_word_that_becomes_known_heals(
    client: Client, connection: Connection, dsn: str, command: Command, vocabulary_file: Path
) -> None:
    """A dry run lists the reports, --apply judges them again, and a second run has nothing to do."""
    for order_no, status in [
        *(("KOM1", "Dikirim"), ("KOM1", WORD), ("KOM2", WORD), ("KOM3", "Diterima"), ("KOM3", WORD)),
        *(("KOM1", "Kata lain"), ("KOM4", "Dikirim")),
    ]:
        await client.webhook(order_no, status)
    await settled_position(client)
    before = await logged_events(connection)
    words = {"VOCABULARY_FILE": str(vocabulary_file)}

    unknown = command("rejudge", "--dry-run")
    assert (unknown.returncode, unknown.stdout) == (0, "reports that --apply would judge again: 0\n")
    listed = command("rejudge", "--dry-run", **words)
    assert listed.returncode == 1
    rows = [line.split("│")[1:-1] for line in listed.stdout.splitlines() if "KOM" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["KOM1", "2", WORD, "advanced", "out_for_delivery"],
        ["KOM2", "1", WORD, "advanced", "out_for_delivery"],
        ["KOM3", "2", WORD, "late", "delivered"],
    ]
    assert listed.stdout.endswith("reports that --apply would judge again: 3\n")
    assert await logged_events(connection) == before

    one = command("rejudge", "--apply", "--order", "KOM2", **words)
    assert (one.returncode, one.stdout) == (0, "judged again: 1 (advanced 1)\n")
    rest = command("rejudge", "--apply", **words)
    assert (rest.returncode, rest.stdout) == (0, "judged again: 2 (advanced 1, late 1)\n")
    again = command("rejudge", "--apply", **words)
    assert (again.returncode, again.stdout) == (0, "judged again: 0\n")
    head = await settled_position(client)

    events = await logged_events(connection)
    assert events[: len(before)] == before
    added = {event.originator_id: event for _, event in events[len(before) :]}
    assert {order_no: event.rejudges for order_no, event in added.items()} == {"KOM1": 2, "KOM2": 1, "KOM3": 2}
    assert {event.body for event in added.values()} == {""}
    assert len({event.report_id for _, event in events}) == len(events)

    order = await client.get("/orders/KOM1")
    assert (order["status"], order["version"], order["rejudgements"]) == ("out_for_delivery", 4, 1)
    assert order["counts"] == {"advanced": 1, "repeated": 0, "late": 0, "refused": 0, "unrecognised": 2}
    # The order reached the status when the old report arrived.
    entries = (await client.get("/orders/KOM1/timeline"))["entries"]
    assert (entries[3]["reported_at"], entries[1]["reported_at"]) == (entries[1]["received_at"], None)
    assert order["status_since"] == entries[1]["received_at"]
    assert (await client.get("/orders/KOM1?version=4"))["status_since"] == order["status_since"]
    assert (await client.get("/orders/KOM2"))["status"] == "out_for_delivery"
    entries = (await client.get("/orders/KOM3/timeline"))["entries"]
    assert [(entry["verdict"], entry["rejudges"]) for entry in entries] == [
        ("advanced", None),
        ("unrecognised", None),
        ("late", 2),
    ]
    transitions = await client.walk(f"/audit/transitions?since={entries[2]['received_at']}", "transitions")
    assert ("KOM3", 2) in [(one["order_no"], one["rejudges"]) for one in transitions]
    # Only the word that is still unknown needs attention.
    unrecognised = (await client.get("/statistics"))["unrecognised"]
    assert [(word["reported_status"], word["reports"]) for word in unrecognised] == [("Kata lain", 1)]
    days = (await client.get("/statistics"))["days"]
    assert sum(sum(day["reports"].values()) for day in days) == len(before)
    assert (await client.get(f"/orders/KOM1?version={order['version']}"))["counts"] == order["counts"]
    assert await rebuilt(dsn, verify=True) == EQUAL

    (action, *_) = (await client.get("/audit/operations"))["operations"]
    assert (action["action"], action["subject"]) == ("reports_rejudged", "*")
    assert head == events[-1][0]


async def test_a_rejudged_report_repeats_nothing(client: Client, dsn: str) -> None:
    """A rejudgement that only repeats the status has an entry of its own: it does not count as a report."""
    await client.webhook("KOM1", "Diantar")
    await client.webhook("KOM1", WORD, cnote="AWB2")
    async with dedicated_connection(dsn) as held:
        recorder = make_recorder(held, recognise=KNOWN.recognise)
        (pending,) = await pending_reports(dsn)
        receipt = await rejudge(recorder, pending)
    assert (pending.verdict, receipt["outcome"]) == ("repeated", "repeated")
    await settled_position(client)
    entries = (await client.get("/orders/KOM1/timeline"))["entries"]
    assert [(entry["verdict"], entry["repeats"], entry["rejudges"]) for entry in entries] == [
        ("advanced", 0, None),
        ("unrecognised", 0, None),
        ("repeated", 0, 2),
    ]
    # The airway bill of the old report may be outdated by now.
    assert (await client.get("/orders/KOM1"))["cnote"] == "AWB1"
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_rejudgement_never_undoes_a_later_report(
    client: Client, connection: Connection, dsn: str
) -> None:
    """It advances its order only if no later report has. Else it is late, whatever the table has for it."""
    words = Vocabulary({"A": "picked_up", "B": "returning", "C": "in_transit"})
    for order_no, statuses in {
        "TURNED": ["Diantar", "B", "Diterima"],
        "MOVED": ["Dipacking", "A", "C"],
        "CANCELLED": ["Dibatalkan", "C"],
    }.items():
        for status in statuses:
            await client.webhook(order_no, status)
    async with dedicated_connection(dsn) as held:
        recorder = make_recorder(held, recognise=words.recognise)
        pending = await pending_reports(dsn, vocabulary=words)
        receipts = [await rejudge(recorder, one) for one in pending]
    found = [(one.order_no, one.reported_status, one.verdict, one.status) for one in pending]
    assert found == [
        ("CANCELLED", "C", "refused", "cancelled"),
        # The second one follows the first, although it was judged again after it.
        ("MOVED", "A", "advanced", "picked_up"),
        ("MOVED", "C", "advanced", "in_transit"),
        ("TURNED", "B", "late", "delivered"),
    ]
    assert [receipt["outcome"] for receipt in receipts] == [verdict for *_, verdict, _ in found]
    await settled_position(client)
    (*_, late) = (await client.get("/orders/TURNED/timeline"))["entries"]
    assert late["reason"] == "returning was reported before delivered, which the order has reached since"
    moved = await client.get("/orders/MOVED")
    reported = [event for _, event in await logged_events(connection) if event.rejudges is None]
    reached = {event.reported_status: event.timestamp for event in reported if event.originator_id == "MOVED"}
    assert moved["picked_up_at"] == to_rfc3339(reached["A"])
    assert moved["shipped_at"] == moved["status_since"] == to_rfc3339(reached["C"])
    durations = {(one["from"], one["to"]) for one in (await client.get("/statistics"))["moves"]}
    assert {("packed", "picked_up"), ("picked_up", "in_transit")} <= durations
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_two_rejudgements_at_once_give_one_event(
    client: Client, connection: Connection, dsn: str
) -> None:
    """The claim of a report is checked under the append lock, so two runs append one event and one receipt."""
    await client.webhook("KOM1", WORD)
    (pending,) = await pending_reports(dsn)
    async with dedicated_connection(dsn) as one, dedicated_connection(dsn) as other:
        recorders = [make_recorder(held, recognise=KNOWN.recognise) for held in (one, other)]
        receipts = await asyncio.gather(*(rejudge(recorder, pending) for recorder in recorders * 3))
    assert len({receipt["report_id"] for receipt in receipts}) == 1
    assert [event.rejudges for _, event in await logged_events(connection)] == [None, 1]
    assert await pending_reports(dsn) == []


async def test_an_order_that_cannot_be_read_is_left_out(
    client: Client, connection: Connection, dsn: str, command: Command, vocabulary_file: Path
) -> None:
    """An undecodable event excludes its order alone, and the command says so."""
    await client.webhook("KOM1", WORD)
    await client.webhook("KOM2", WORD)
    await connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ('KOM1', 2, 'x', '')"
    )
    assert [one.order_no for one in await pending_reports(dsn)] == ["KOM2"]
    done = command("rejudge", "--apply", VOCABULARY_FILE=str(vocabulary_file))
    assert done.returncode == 1
    assert done.stdout == "judged again: 1 (advanced 1)\n"
    assert "orders left out, because this release cannot read their events: 1" in done.stderr


async def test_one_option_is_required(command: Command) -> None:
    """Without an option, and with both, the command appends nothing and says what to pass."""
    for options in ((), ("--apply", "--dry-run")):
        done = command("rejudge", *options)
        assert (done.returncode, "pass either --dry-run" in done.stderr) == (2, True)


async def test_an_erasure_after_a_rejudgement(client: Client, dsn: str, owner_dsn: str) -> None:
    """An erasure empties the unknown word of the old report. The views still equal a rebuild."""
    for order_no in ("KOM1", "KOM2"):
        await client.webhook(order_no, WORD)
    async with dedicated_connection(dsn) as held:
        recorder = make_recorder(held, recognise=KNOWN.recognise)
        for pending in await pending_reports(dsn):
            await rejudge(recorder, pending)
    await settled_position(client)
    async with connected(owner_dsn) as owner:
        for order_no in ("KOM1", "KOM2"):
            await erase_order(owner, order_no, "asked for", Actor("cli", "tests"))
            assert await rebuilt(dsn, verify=True) == EQUAL
    assert (await client.get("/statistics"))["unrecognised"] == []
    assert (await client.get("/orders/KOM1"))["status"] == "out_for_delivery"
    assert await pending_reports(dsn) == []


async def test_a_service_uses_its_vocabulary_file(dsn: str, vocabulary_file: Path) -> None:
    """Reports are judged by the file's words, and /transitions shows them with the file's hash."""
    async with serving_client(dsn, vocabulary_file=vocabulary_file) as client:
        receipt = await client.webhook("KOM1", "ANTAR_ULANG")
        assert (receipt["outcome"], receipt["status"]) == ("advanced", "out_for_delivery")
        rules: dict[str, Any] = await client.get("/transitions")
        sha256 = hashlib.sha256(CONTENT.encode()).hexdigest()
        assert rules["vocabulary_file"] == {"words": {"antar ulang": "out_for_delivery"}, "sha256": sha256}
        (rule,) = [one for one in rules["statuses"] if one["status"] == "out_for_delivery"]
        assert rule["aliases"] == ["diantar", "delivery", "delivering", "out for delivery", "antar ulang"]
    async with serving_client(dsn) as client:
        assert (await client.get("/transitions"))["vocabulary_file"] is None
        assert (await client.webhook("KOM1", WORD))["outcome"] == "unrecognised"


async def test_a_log_of_every_shape(connection: Connection, dsn: str, owner_dsn: str) -> None:
    """Events of every shape that a release has written fold, replay and verify, before and after an erasure."""
    for version, state in enumerate(GOLDEN_EVENTS, start=1):
        await connection.execute(
            "INSERT INTO order_events (originator_id, originator_version, topic, state) "
            "VALUES ($1, $2, $3, $4)",
            *(ORDER_NO, version, Order.StatusReported.TOPIC, state),
        )
    async with serving_client(dsn) as client:
        await settled_position(client)
        assert await rebuilt(dsn, verify=True) == EQUAL
        async with connected(owner_dsn) as owner:
            await erase_order(owner, ORDER_NO, "asked for", Actor("cli", "tests"))
        assert await rebuilt(dsn, verify=True) == EQUAL
        order = await client.get(f"/orders/{ORDER_NO}")
        assert (order["status"], order["version"], order["rejudgements"]) == ("completed", 6, 1)
        assert order["parked"] is None
        events = (await client.get(f"/orders/{ORDER_NO}/events"))["events"]
        assert [event["data"]["body"] for event in events] == [""] * 6
        assert [event["data"].get("rejudges") for event in events] == [None, None, None, 3, None, None]


async def test_the_librarys_reader_reads_a_rejudgement(
    client: Client, connection: Connection, dsn: str
) -> None:
    """An aggregate that replays the log has the same state as the decision."""
    await client.webhook("KOM1", WORD)
    async with dedicated_connection(dsn) as held:
        (pending,) = await pending_reports(dsn)
        await rejudge(make_recorder(held, recognise=KNOWN.recognise), pending)
    order = Order.new("KOM1")
    for recorded in await store.read_stream(connection, "KOM1", 0, 10):
        order = decode_event(*recorded[1:5]).mutate(order)
    assert (order.state.status, order.state.version) == ("out_for_delivery", 2)
    assert Settings().vocabulary_file is None
