"""The sender's account: what is lost, doubled or altered is found, and nothing else is called so."""

import json
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from service.simulator.account import Account, Recorded, Sent, ServiceLog, UnreadableAccountError, compare

PREFIX = "KOM1-"


def event(number: int, body: str, *, report_id: str | None = None, order_no: str = "KOM1-1") -> Recorded:
    return Recorded(report_id or f"id{number}", order_no, number, number * 10, "advanced", body)


def receipt(recorded: Recorded, **changes: Any) -> bytes:
    said = {
        "report_id": recorded.report_id,
        "order_no": recorded.order_no,
        "version": recorded.version,
        "position": recorded.position,
        "outcome": recorded.verdict,
    }
    return json.dumps({**said, **changes}).encode()


def found(account: Account) -> tuple[int, int, int, int]:
    return len(account.lost), len(account.doubled), len(account.altered), account.given_up


A, B, AGAIN = event(1, "a"), event(2, "b"), event(3, "a")


@pytest.mark.parametrize(
    ("sent", "events"),
    [
        ({}, []),
        ({"a": Sent(1, [receipt(A)]), "b": Sent(1, [receipt(B)])}, [A, B]),
        # The answer of an attempt was lost, and both are recorded.
        ({"a": Sent(2, [receipt(AGAIN)])}, [A, AGAIN]),
        # Or the attempt never arrived.
        ({"a": Sent(2, [receipt(A)])}, [A]),
        # A copy, and both are acknowledged.
        ({"a": Sent(2, [receipt(AGAIN), receipt(A)])}, [A, AGAIN]),
        # What others reported is not ours to judge.
        ({}, [event(7, "x", order_no="KOM2-1")]),
    ],
)
def test_what_is_right_agrees(sent: dict[str, Sent], events: list[Recorded]) -> None:
    """As many events as acknowledgements at least, and as attempts at most."""
    account = compare(sent, events, PREFIX)
    assert (found(account), account.agrees) == ((0, 0, 0, 0), True)


@pytest.mark.parametrize(
    ("sent", "events", "wrong"),
    [
        # Acknowledged, and not there; or there once, and acknowledged twice.
        ({"a": Sent(1, [receipt(A)])}, [], (1, 0, 0, 0)),
        ({"a": Sent(2, [receipt(A), receipt(A)])}, [A], (1, 0, 0, 0)),
        ({"a": Sent(2, [receipt(A), receipt(AGAIN)])}, [A], (1, 0, 0, 0)),
        # There, but otherwise than told.
        ({"a": Sent(1, [receipt(A, position=11)])}, [A], (1, 0, 0, 0)),
        ({"a": Sent(1, [receipt(A, version=2)])}, [A], (1, 0, 0, 0)),
        ({"a": Sent(1, [receipt(A, outcome="quarantined")])}, [A], (1, 0, 0, 0)),
        ({"a": Sent(1, [receipt(A, order_no="KOM1-2")])}, [A], (1, 0, 0, 0)),
        # A receipt of the other's event.
        ({"a": Sent(1, [receipt(B)]), "b": Sent(1, [receipt(A)])}, [A, B], (2, 0, 0, 0)),
        # 200, but nothing that could be a receipt.
        ({"a": Sent(1, [b"OK"])}, [A], (1, 0, 0, 0)),
        ({"a": Sent(1, [b"[]"])}, [A], (1, 0, 0, 0)),
        ({"a": Sent(1, [b'{"report_id": []}'])}, [A], (1, 0, 0, 0)),
        # More often than sent.
        ({"a": Sent(1, [receipt(A)])}, [A, AGAIN], (0, 1, 0, 0)),
        ({"a": Sent(0)}, [A], (0, 1, 0, 0)),
        ({"a": Sent(2, [receipt(A)])}, [A, event(3, "a", report_id="id1")], (1, 1, 0, 0)),
        # Never sent so.
        ({"a": Sent(1)}, [event(1, "A")], (0, 0, 1, 0)),
        # Never acknowledged.
        ({"a": Sent(7, is_given_up=True)}, [], (0, 0, 0, 1)),
    ],
)
def test_what_is_wrong_is_counted(
    sent: dict[str, Sent], events: list[Recorded], wrong: tuple[int, int, int, int]
) -> None:
    """Lost, doubled, altered, given up: each for itself, and the account does not agree."""
    account = compare(sent, events, PREFIX)
    assert (found(account), account.agrees) == (wrong, False)


def test_it_prints_the_numbers_and_the_first_of_what_is_wrong() -> None:
    """A line for each number; of many lost reports only some are shown."""
    sent = {f"text {number}": Sent(1, [b"OK"]) for number in range(1_000)}
    lines = list(compare({**sent, "a": Sent(2, [receipt(A)])}, [A], PREFIX).lines())
    assert lines[0].split() == ["sent", "1,001", "reports,", "in", "1,002", "attempts"]
    assert lines[1].split()[:2] == ["acknowledged", "1,001"]
    assert lines[2].split() == ["recorded", "1", "events:", "1", "advanced"]
    assert lines[3].split() == ["lost", "1,000"]
    assert sum("text" in line for line in lines) == 5


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (200, "<html>", r"answers 200 to GET /events$"),
        (200, "[]", r"answers 200 to GET /events$"),
        (503, "{}", r"answers 503 to GET /events$"),
        (403, "{}", r"does not take that key: give one of the scope read with --key$"),
    ],
)
async def test_what_is_no_log_is_told(status: int, body: str, said: str) -> None:
    """An account is of what the service says, or there is none."""

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
            with pytest.raises(UnreadableAccountError, match=said):
                _ = [event async for event in api.events(0)]
    finally:
        await runner.cleanup()
