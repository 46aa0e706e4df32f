"""The result of a view's fold depends neither on the batches of events nor on their source."""

import hashlib
import json
from datetime import date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.logged import DecodedEvent
from domain.order import NEW_ORDER, EarlierReport, decide, evolve
from domain.statuses import ALIASES, SETTLED, Vocabulary, status_label
from projections import current_status, timeline
from projections.view import View
from projections.views import VIEWS
from tests.support.examples import (
    CNOTE,
    CNOTE_OF_THE_RETURN,
    MINUTE,
    RECEIVED_AT,
    SENT,
    arriving,
    history,
    says,
)
from tests.support.properties import MANY
from tests.support.written_law import VERDICTS

ORDER_NOS = ("KOM1", "KOM2", "KOM3")
# A vocabulary that has become known later.
LATER_WORDS = Vocabulary({"Transit Jakarta": "in_transit"})
STRINGS = [raws[0] for raws in ALIASES.values()] + ["Transit Jakarta"]
REPORTS = st.lists(
    st.builds(
        lambda order_no, status, cnote: says(status, cnote)._replace(order_no=order_no),
        st.sampled_from(ORDER_NOS),
        st.sampled_from(STRINGS),
        st.sampled_from([None, CNOTE, CNOTE_OF_THE_RETURN]),
    ),
    min_size=1,
    max_size=30,
)


@st.composite
def logs(draw: st.DrawFn) -> list[DecodedEvent]:
    """Draw a log of some orders. Its positions increase, with gaps that have no meaning."""
    states = dict.fromkeys(ORDER_NOS, NEW_ORDER)
    log: list[DecodedEvent] = []
    position = 0
    for number, report in enumerate(draw(REPORTS)):
        position += draw(st.integers(1, 3))
        arrived = arriving(report, RECEIVED_AT + number * MINUTE)
        event = decide(states[report.order_no], arrived)
        states[report.order_no] = evolve(NEW_ORDER, event)
        log.append((position, event))
        if event.verdict == "unrecognised" and draw(st.booleans()):
            position += 1
            again = arrived._replace(
                body="", reported_cnote=None, rejudges=EarlierReport(event.originator_version, event.timestamp)
            )
            event = decide(states[report.order_no], again, LATER_WORDS.recognise)
            states[report.order_no] = evolve(NEW_ORDER, event)
            log.append((position, event))
    return log


def pages_of(data: st.DataObject, events: list[DecodedEvent]) -> list[list[DecodedEvent]]:
    """Cut a list of events into consecutive slices at random places."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(events)), max_size=5)))
    return [events[start:end] for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True)]


# Every view

# The type in Python of a column's values, by its type in PostgreSQL.
PYTHON_TYPES: dict[str, type | tuple[type, ...]] = {
    "text": str,
    "text[]": (list, tuple),
    "smallint": int,
    "integer": int,
    "bigint": int,
    "timestamptz": datetime,
    "date": date,
}


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
@MANY
@given(logs())
def test_a_fold_fills_the_columns_of_its_tables(view: View, log: list[DecodedEvent]) -> None:
    """Each row has exactly its table's columns in their order, with values of their types, and its own key."""
    rows = view.new_rows()
    view.fold(log, rows)
    for table in view.tables:
        parameter = table.parameter(rows[table.name])
        for row in parameter:
            assert tuple(row) == table.names
            for name, type_, _ in table.columns:
                assert row[name] is None or isinstance(row[name], PYTHON_TYPES[type_]), name
        keys = [tuple(row[name] for name in table.key) for row in parameter]
        assert not table.key or len(keys) == len(set(keys))


# The present status of every order


@MANY
@given(logs(), st.data())
def test_current_status_is_the_same_page_by_page(log: list[DecodedEvent], data: st.DataObject) -> None:
    """A fold of the whole log and a fold in slices return the same rows and airway bills."""
    rows = current_status.VIEW.new_rows()
    current_status.fold(log, rows)
    paged_rows = current_status.VIEW.new_rows()
    for page in pages_of(data, log):
        current_status.fold(page, paged_rows)
    assert paged_rows == rows


@MANY
@given(logs())
def test_current_status_sums_up_each_order(log: list[DecodedEvent]) -> None:
    """Each column of a row equals a value computed separately from the order's events."""
    rows = current_status.VIEW.new_rows()
    current_status.fold(log, rows)
    assert set(rows["orders"]) == {event.originator_id for _, event in log}
    for order_no, folded in rows["orders"].items():
        row = current_status.to_order(folded)
        mine = [(position, event) for position, event in log if event.originator_id == order_no]
        reported = [event.reported_cnote for _, event in mine if event.reported_cnote is not None]
        assert {cnote for cnote, reported_of in rows["order_cnotes"] if reported_of == order_no} == {*reported}
        (first_position, first), (position, last) = mine[0], mine[-1]
        brought = next((event for _, event in mine if event.originator_version == last.status_version), None)
        reports = [event for _, event in mine if event.rejudges is None]
        counts: dict[str, Any] = {
            verdict: sum(event.verdict == verdict for event in reports) for verdict in VERDICTS
        }
        advanced = [event for _, event in mine if event.verdict == "advanced"]
        reached = {event.status: event.reached_at for event in reversed(advanced)}
        assert folded["first_position"] == first_position
        assert row == {
            "order_no": order_no,
            "cnote": last.cnote,
            "status": last.status,
            "status_label": status_label(last.status),
            "reported_status": brought.reported_status if brought else None,
            "settled": last.status in SETTLED,
            "version": len(mine),
            "position": position,
            "status_since": brought.reached_at if brought else None,
            "first_reported_at": first.timestamp,
            "last_reported_at": reports[-1].timestamp,
            "submitted_at": reached.get("submitted"),
            "picked_up_at": reached.get("picked_up"),
            "shipped_at": reached.get("in_transit"),
            "delivered_at": reached.get("delivered"),
            "delivery_attempts": sum(event.status == "out_for_delivery" for event in advanced),
            "counts": counts,
            "rejudgements": len(mine) - len(reports),
            "parked": None,
        }


def test_current_status_of_a_journey() -> None:
    """The row of an order that advanced, repeated, got a late and an unrecognised report and a second airway
    bill.
    """
    events = history(says("Packed", CNOTE), "Sent", "Sent", "Created", says("Return", CNOTE_OF_THE_RETURN), "?")
    rows = current_status.VIEW.new_rows()
    current_status.fold([(10 + i, event) for i, event in enumerate(events)], rows)
    (row,) = rows["orders"].values()
    assert [*rows["order_cnotes"].values()] == [
        {"cnote": cnote, "order_no": SENT.order_no} for cnote in (CNOTE, CNOTE_OF_THE_RETURN)
    ]
    assert list(row.values()) == [
        *(SENT.order_no, 6, 15, 10, "returning", "Return", RECEIVED_AT + 4 * MINUTE, CNOTE_OF_THE_RETURN),
        *(RECEIVED_AT, RECEIVED_AT + 5 * MINUTE, None, None, RECEIVED_AT + MINUTE, None, 0, 3, 1, 1, 0, 1, 0),
    ]


def test_milestones_are_the_first_times_and_attempts_are_counted() -> None:
    """A milestone keeps its first time, and has none if its status was only reported late; each return to
    out_for_delivery is another attempt.
    """
    events = history(
        *("Diajukan", "Dikirim", "Dijemput", "Diantar", "Diantar", "Bermasalah", "Dikirim", "Diantar"),
        *("Diterima", "Retur", "Hilang", "Dikirim", "Diterima"),
    )
    rows = current_status.VIEW.new_rows()
    current_status.fold(enumerate(events, 1), rows)
    order = current_status.to_order(rows["orders"][SENT.order_no])
    assert order["counts"]["advanced"] == 11
    assert order["submitted_at"] == RECEIVED_AT
    assert order["picked_up_at"] is None
    assert order["shipped_at"] == RECEIVED_AT + MINUTE
    assert order["delivered_at"] == RECEIVED_AT + 8 * MINUTE
    assert order["delivery_attempts"] == 2


# The timeline


@MANY
@given(logs(), st.data())
def test_timeline_has_a_row_for_each_event(log: list[DecodedEvent], data: st.DataObject) -> None:
    """Each event has one row, in the log's order, and each column equals the event's field of the same name."""
    rows = timeline.VIEW.new_rows()
    timeline.fold(log, rows)
    paged_rows = timeline.VIEW.new_rows()
    for page in pages_of(data, log):
        timeline.fold(page, paged_rows)
    assert paged_rows == rows
    renamed = {"order_no": "originator_id", "version": "originator_version", "received_at": "timestamp"}
    for row, (position, event) in zip(timeline.ENTRIES.parameter(rows["entries"]), log, strict=True):
        computed = {
            "position": position,
            "kind": timeline.KINDS[event.verdict, event.previous_status, event.recognised],
        }
        assert row == {
            column: computed.get(column, getattr(event, renamed.get(column, column), None))
            for column in timeline.ENTRIES.names
        }


def test_kinds_change_only_together_with_the_version_of_the_fold() -> None:
    """Each combination has its own kind. If a kind changes, the view must be rebuilt: raise fold_version."""
    kinds = [*timeline.KINDS.values()]
    assert len({*kinds, timeline.UNKNOWN_KIND}) == len(kinds) + 1
    digest = hashlib.sha256(json.dumps([*timeline.KINDS.items()]).encode()).hexdigest()
    assert (timeline.VIEW.fold_version, digest[:16]) == (4, "fc085ff1d35a47b2")


def test_times_of_the_examples_differ() -> None:
    """The events of the examples have different times, so the folds above cannot confuse them."""
    events = history("Packed", "Sent")
    assert timedelta(0) < events[1].timestamp - events[0].timestamp == MINUTE
