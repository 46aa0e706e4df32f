"""The sender's account finds exactly the lost, doubled, altered and given-up reports."""

import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from service.features.simulator.account import (
    Account,
    Delivery,
    RecordedEvent,
    ServiceLog,
    UnreadableLogError,
    compare,
)

PREFIX = "KOM1-"


def event(number: int, body: str, *, report_id: str | None = None, order_no: str = "KOM1-1") -> RecordedEvent:
    return RecordedEvent(report_id or f"id{number}", order_no, number, number * 10, "advanced", body)


def receipt(recorded: RecordedEvent, **changes: Any) -> bytes:
    fields = {
        "report_id": recorded.report_id,
        "order_no": recorded.order_no,
        "version": recorded.version,
        "position": recorded.position,
        "outcome": recorded.verdict,
    }
    return json.dumps({**fields, **changes}).encode()


def errors(account: Account) -> tuple[int, int, int, int]:
    return len(account.lost), len(account.doubled), len(account.altered), account.given_up


A, B, AGAIN = event(1, "a"), event(2, "b"), event(3, "a")


@pytest.mark.parametrize(
    ("deliveries", "events"),
    [
        ({}, []),
        ({"a": Delivery(1, [receipt(A)]), "b": Delivery(1, [receipt(B)])}, [A, B]),
        # The response to an attempt was lost, and both are recorded.
        ({"a": Delivery(2, [receipt(AGAIN)])}, [A, AGAIN]),
        # The first attempt never arrived, and the second is recorded.
        ({"a": Delivery(2, [receipt(A)])}, [A]),
        # A copy was sent, and both are acknowledged.
        ({"a": Delivery(2, [receipt(AGAIN), receipt(A)])}, [A, AGAIN]),
        # Orders of other senders are ignored.
        ({}, [event(7, "x", order_no="KOM2-1")]),
    ],
)
def test_a_correct_log_agrees(deliveries: dict[str, Delivery], events: list[RecordedEvent]) -> None:
    """A report may have as many events as attempts, and must have as many as receipts."""
    account = compare(deliveries, events, PREFIX)
    assert (errors(account), account.agrees) == ((0, 0, 0, 0), True)


@pytest.mark.parametrize(
    ("deliveries", "events", "expected"),
    [
        # A report was acknowledged but not recorded, or acknowledged twice and recorded once.
        ({"a": Delivery(1, [receipt(A)])}, [], (1, 0, 0, 0)),
        ({"a": Delivery(2, [receipt(A), receipt(A)])}, [A], (1, 0, 0, 0)),
        ({"a": Delivery(2, [receipt(A), receipt(AGAIN)])}, [A], (1, 0, 0, 0)),
        # The recorded event differs from the receipt.
        ({"a": Delivery(1, [receipt(A, position=11)])}, [A], (1, 0, 0, 0)),
        ({"a": Delivery(1, [receipt(A, version=2)])}, [A], (1, 0, 0, 0)),
        ({"a": Delivery(1, [receipt(A, outcome="quarantined")])}, [A], (1, 0, 0, 0)),
        ({"a": Delivery(1, [receipt(A, order_no="KOM1-2")])}, [A], (1, 0, 0, 0)),
        # Two reports have each other's receipts.
        ({"a": Delivery(1, [receipt(B)]), "b": Delivery(1, [receipt(A)])}, [A, B], (2, 0, 0, 0)),
        # A 200 response has no receipt.
        ({"a": Delivery(1, [b"OK"])}, [A], (1, 0, 0, 0)),
        ({"a": Delivery(1, [b"[]"])}, [A], (1, 0, 0, 0)),
        ({"a": Delivery(1, [b'{"report_id": []}'])}, [A], (1, 0, 0, 0)),
        # A report was recorded more often than sent.
        ({"a": Delivery(1, [receipt(A)])}, [A, AGAIN], (0, 1, 0, 0)),
        ({"a": Delivery(0)}, [A], (0, 1, 0, 0)),
        ({"a": Delivery(2, [receipt(A)])}, [A, event(3, "a", report_id="id1")], (1, 1, 0, 0)),
        # An event has a body that was never sent.
        ({"a": Delivery(1)}, [event(1, "A")], (0, 0, 1, 0)),
        # A report was never acknowledged.
        ({"a": Delivery(7, is_given_up=True)}, [], (0, 0, 0, 1)),
    ],
)
def test_each_kind_of_error_is_counted(
    deliveries: dict[str, Delivery], events: list[RecordedEvent], expected: tuple[int, int, int, int]
) -> None:
    """Lost, doubled, altered and given-up reports are counted separately, and the account disagrees."""
    account = compare(deliveries, events, PREFIX)
    assert (errors(account), account.agrees) == (expected, False)


def test_it_prints_every_number_and_the_first_details() -> None:
    """The account prints a line for each number, and shows only the first five lost reports."""
    deliveries = {f"text {number}": Delivery(1, [b"OK"]) for number in range(1_000)}
    lines = list(compare({**deliveries, "a": Delivery(2, [receipt(A)])}, [A], PREFIX).lines())
    assert lines[0].split() == ["sent", "1,001", "reports,", "in", "1,002", "attempts"]
    assert lines[1].split()[:2] == ["acknowledged", "1,001"]
    assert lines[2].split() == ["recorded", "1", "events:", "1", "advanced"]
    assert lines[3].split() == ["lost", "1,000"]
    assert sum("text" in line for line in lines) == 5


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, "<html>", r"/events returned 200, not the log: "),
        (200, "[]", r"/events returned 200, not the log: "),
        (503, "{}", r"/events returned 503, not the log: "),
        (403, "{}", r"rejects that API key: pass one of the scope read:bodies with --key$"),
        (410, '{"detail": "why"}', r"^the database has lost events, or was restored, .* \(why\): begin again$"),
    ],
)
async def test_an_unreadable_log_is_an_error(status: int, body: str, message: str) -> None:
    """Any response except a page of the log raises an error that names the response."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    app = web.Application()
    app.router.add_get("/events", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession() as session:
            api = ServiceLog(session, f"http://127.0.0.1:{runner.addresses[0][1]}", "otk_key")
            with pytest.raises(UnreadableLogError, match=message):
                _ = [event async for event in api.events(0)]
    finally:
        await runner.cleanup()
