"""The past is imported from a file, after what the log has already, and a bad file changes nothing."""

import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeAlias

import pytest

from projections.postgres import Connection
from service.maintenance import imports
from service.maintenance.imports import BadFileError, read_reports
from tests.support.client import Client
from tests.support.commands import Completed, call_command
from tests.support.recording import EQUAL, dedicated_connection, logged_events, make_recorder, rebuilt

Command: TypeAlias = Callable[..., Completed]

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)
PAST = """order_no,cnote,status,at
KOM1,,Diajukan,2026-01-01T08:00:00+07:00
KOM1,AWB1,Dikirim,2026-01-02T08:00:00+07:00
KOM2,AWB2,Diterima,2026-01-05T01:00:00Z
KOM1,AWB1,Diterima,2026-01-04T08:00:00+07:00
"""


@pytest.fixture
def command(tmp_path: Path, owner_dsn: str) -> Command:
    """Return a function that runs a command on this test's database."""
    return partial(call_command, tmp_path, DATABASE_URL=owner_dsn)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    """Return a function that writes a file and returns its path."""

    def write(content: str) -> str:
        path = tmp_path / "past.csv"
        path.write_text(content, encoding="utf-8")
        return str(path)

    return write


async def caught_up(client: Client) -> int:
    position: int = (await client.get("/projections"))["head"]
    for path in ("/orders", "/audit/transitions", "/statistics"):
        await client.get(f"{path}?after_position={position}")
    return position


async def test_the_past_is_imported(
    client: Client, connection: Connection, dsn: str, command: Command, file: Callable[[str], str]
) -> None:
    """Each order's rows are recorded by their times; durations come out right; a second import adds nothing."""
    path = file(PAST)
    done = command("import-reports", path)
    assert (done.returncode, done.stdout) == (0, "recorded: 4\n"), done.stderr
    await caught_up(client)
    order = await client.get("/orders/KOM1")
    assert (order["status"], order["cnote"], order["version"]) == ("delivered", "AWB1", 3)
    assert order["first_reported_at"] == "2026-01-01T01:00:00Z"
    assert order["last_reported_at"] == order["status_since"] == "2026-01-04T01:00:00Z"
    moves = {(move["from"], move["to"]): move for move in (await client.get("/statistics"))["moves"]}
    two_days = timedelta(days=2).total_seconds()
    assert moves["in_transit", "delivered"]["seconds_p50"] == pytest.approx(two_days, rel=0.06)
    entries = (await client.get("/orders/KOM1/timeline"))["entries"]
    assert [entry["skipped"] for entry in entries] == [[], ["packed", "picked_up"], []]
    (first, *_) = (await client.get("/orders/KOM1/events"))["events"]
    assert first["data"]["imported_at"] is not None
    assert json.loads(first["data"]["body"]) == {
        "order_no": "KOM1", "cnote": "", "status": "Diajukan", "at": "2026-01-01T08:00:00+07:00",
    }  # fmt: skip
    assert await rebuilt(dsn, verify=True) == EQUAL

    before = await logged_events(connection)
    again = command("import-reports", path)
    assert (again.returncode, again.stdout) == (0, "recorded: 0\nimported before: 4\n")
    assert await logged_events(connection) == before
    longer = command("import-reports", file(PAST + "KOM2,AWB2,Selesai,2026-01-06T01:00:00Z\n"))
    assert (longer.returncode, longer.stdout) == (0, "recorded: 1\nimported before: 4\n")
    operations = (await client.get("/audit/operations?action=reports_imported"))["operations"]
    assert [(one["subject"], one["reason"]) for one in operations] == [
        *(("*", f"5 rows of {path}"), ("*", f"4 rows of {path}"), ("*", f"4 rows of {path}"))
    ]


async def test_what_came_by_webhook_stays_first(
    client: Client, connection: Connection, command: Command, file: Callable[[str], str]
) -> None:
    """A row that is not later than its order's last report is left out, and the command fails and names it."""
    await client.webhook("KOM1", "Dikirim")
    done = command("import-reports", file(PAST))
    assert (done.returncode, done.stdout) == (1, "recorded: 1\n")
    assert "a report at the same time or later: 3; such as of KOM1" in done.stderr
    assert [event.originator_id for _, event in await logged_events(connection)] == ["KOM1", "KOM2"]


async def test_reconcile_lists_what_import_takes(
    client: Client, dsn: str, command: Command, file: Callable[[str], str]
) -> None:
    """Unsettled orders without news are listed; rows that you fill in are recorded, and others are left out."""
    command("import-reports", file(PAST + "=KOM3,AWB3,Dikirim,2026-01-02T08:00:00+07:00\n"))
    command("import-reports", file("order_no,cnote,status,at\n'=KOM4,,Dikirim,2026-01-03T08:00:00+07:00\n"))
    await client.webhook("KOM5", "Dikirim")
    await caught_up(client)
    listed = command("reconcile", "--days", "3")
    rows = [*csv.DictReader(io.StringIO(listed.stdout))]
    assert [(row["order_no"], row["status"], row["at"], row["status_now"]) for row in rows] == [
        ("'=KOM3", "", "", "in_transit"),
        ("'=KOM4", "", "", "in_transit"),
    ]
    assert rows[0]["last_reported_at"] == "2026-01-02T01:00:00Z"
    assert "orders without news for 3 days: 2" in listed.stderr
    assert len([*csv.DictReader(io.StringIO(command("reconcile", "--days", "0").stdout))]) == 3
    rows[1] |= {"status": "Diterima", "at": "2026-01-09T08:00:00+07:00"}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    done = command("import-reports", file(text.getvalue()))
    assert (done.returncode, done.stdout) == (
        0,
        "recorded: 1\nleft out, because status and at are blank: 1\n",
    )
    await caught_up(client)
    assert (await client.get("/orders/%3DKOM4"))["status"] == "delivered"
    assert await rebuilt(dsn, verify=True) == EQUAL


async def test_a_long_reconciliation_is_complete(
    client: Client, command: Command, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Orders with the same time are listed once each, across pages."""
    monkeypatch.setattr("service.cli.reconcile.PAGE_ORDERS", 3)
    rows = "".join(f"KOM{number},,Dikirim,2026-01-0{number % 2 + 1}T08:00:00Z\n" for number in range(10))
    command("import-reports", file(f"order_no,cnote,status,at\n{rows}"))
    await caught_up(client)
    listed = [*csv.DictReader(io.StringIO(command("reconcile").stdout))]
    assert sorted(row["order_no"] for row in listed) == [f"KOM{number}" for number in range(10)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: the heading lacks order_no, cnote, status, at: expected "),
        ("order_no,cnote,status,at\n", "the file has no rows"),
        (
            "order_no,status\nKOM1,Dikirim\n",
            "line 1: the heading lacks cnote, at: expected the columns order_no, ",
        ),
        ("order_no,cnote,status,at,at\n", "line 1: a column occurs twice"),
        ("order_no,cnote,status,at\nKOM1,A,Dikirim\n", "line 2: it has 3 cells, but the heading has 4"),
        ('order_no,cnote,status,at\n"KOM1"x,A,Dikirim,2026-01-01T00:00:00Z\n', "line 2: it is not CSV: "),
        ("order_no,cnote,status,at\n,A,Dikirim,2026-01-01T00:00:00Z\n", "line 2: order_no is blank"),
        ("order_no,cnote,status,at\nKOM1,A,,2026-01-01T00:00:00Z\n", "line 2: status is blank"),
        ("order_no,cnote,status,at\nKOM1,A,Dikirim,\n", "line 2: at is '': expected an RFC 3339 time with an "),
        ("order_no,cnote,status,at\nKOM1,A,Dikirim,2026-01-01 08:00\n", "without an offset: expected an "),
        ("order_no,cnote,status,at\nKOM1,A,Dikirim,kemarin\n", "line 2: at is 'kemarin': expected "),
        ("order_no,cnote,status,at\nKOM1,A,Dikirim,2026-06-01T12:06:00Z\n", "which is in the future"),
        ("order_no,cnote,status,at\nKOM1,A,Dikirim,1999-06-01T12:06:00Z\n", "which is before the year 2000"),
        ('{"order_no":"KOM1","status":"Dikirim"}', "line 1: at is None: expected an RFC 3339 time"),
        ('{"order_no":"KOM1"\n', "line 1: it is not JSON: "),
        (
            '{"order_no":"KOM1","status":"Dikirim","at":"2026-01-01T00:00:00Z"}\n\n[]\n',
            "line 3: it is not a JSON ",
        ),
        (
            '{"order_no":"A","order_no":"B","status":"x","at":"2026-01-01T00:00:00Z"}',
            "line 1: order_no occurs twice",
        ),
        (
            '{"order_no":"A","status":"x","at":"2026-01-01T00:00:00Z","at":"2026-01-02T00:00:00Z"}',
            "line 1: at occurs twice",
        ),
    ],
)
def test_a_bad_file_is_refused(content: str, message: str) -> None:
    """The error names the line, the value, and what is expected."""
    with pytest.raises(BadFileError) as raised:
        read_reports(content.encode(), NOW)
    assert message in str(raised.value)


async def test_a_bad_row_keeps_the_others_out(
    connection: Connection, command: Command, file: Callable[[str], str], tmp_path: Path
) -> None:
    """Nothing of a file with a bad row is recorded. Of many bad rows, the first are listed."""
    done = command("import-reports", file(PAST + "KOM9,,Dikirim,x\n" * 25))
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0].startswith("line 6: at is 'x': expected ")
    assert lines[20:] == [
        "and 5 more",
        f"nothing was imported from {tmp_path / 'past.csv'}: correct the file, and import it again",
    ]
    absent = command("import-reports", str(tmp_path / "absent.csv"))
    assert (absent.returncode, "No such file" in absent.stderr) == (2, True)
    (tmp_path / "past.csv").write_bytes(b"order_no\xff")
    latin = command("import-reports", str(tmp_path / "past.csv"))
    assert (latin.returncode, "the file is not UTF-8 (at byte 8)" in latin.stderr) == (2, True)
    assert await logged_events(connection) == []


def test_too_many_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of more than ROWS_MAX rows is refused before it is recorded in part."""
    monkeypatch.setattr(imports, "ROWS_MAX", 3)
    with pytest.raises(BadFileError, match="more than 3 rows: divide it by order number"):
        read_reports(PAST.encode(), NOW)


def test_an_endless_file_is_refused(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    """A file is read up to the size limit only."""
    monkeypatch.setattr(imports, "FILE_BYTES_MAX", 2 * 1024**2)
    done = command("import-reports", "/dev/zero")
    assert (done.returncode, "larger than 2 MiB: divide it" in done.stderr) == (2, True)


def test_a_file_with_json_lines() -> None:
    """Each line is kept as the event's body, unchanged; rows of one order are sorted by time."""
    lines = [
        '{"order_no":"KOM1", "status":"Diterima","at":"2026-01-02T00:00:00Z","courier":"JNE"}',
        '{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim","at":"2026-01-01T00:00:00Z"}',
        '{"order_no":"KOM2","status":null,"at":""}',
    ]
    file = read_reports("\n".join(lines).encode("utf-8-sig"), NOW)
    assert (file.rows, file.blank, [*file.orders]) == (2, 1, ["KOM1"])
    assert [report.body for report in file.orders["KOM1"]] == [lines[1], lines[0]]
    assert {report.arrival.imported_at for report in file.orders["KOM1"]} == {NOW}


async def test_an_order_that_cannot_be_read_fails_alone(
    client: Client, connection: Connection, dsn: str
) -> None:
    """Reports of an order with an undecodable event are left out, and those of other orders are recorded."""
    await client.webhook("KOM1", "Dikirim")
    await connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) VALUES ('KOM1', 2, 'x', '')"
    )
    reports = read_reports(PAST.encode(), NOW)
    batches: list[int] = []
    async with dedicated_connection(dsn) as held:
        done = await imports.import_reports(make_recorder(held), reports, batches.append)
    assert (done.recorded, done.failed, sum(batches)) == (1, 3, 4)


async def test_large_files_are_recorded_in_batches(
    connection: Connection, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order is never divided between two transactions."""
    monkeypatch.setattr(imports, "BATCH_ROWS", 5)
    rows = "".join(
        f"KOM{order},,Dikirim,2026-01-01T00:00:{second:02}Z\n" for order in range(6) for second in range(3)
    )
    reports = read_reports(f"order_no,cnote,status,at\n{rows}".encode(), NOW)
    batches: list[int] = []
    async with dedicated_connection(dsn) as held:
        done = await imports.import_reports(make_recorder(held), reports, batches.append)
    assert (done.recorded, batches) == (18, [6, 6, 6])
    events = await logged_events(connection)
    assert [event.originator_version for _, event in events] == [1, 2, 3] * 6
