"""An order decides the verdicts of its reports, and its last event alone contains its state."""

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from eventsourcing.domain import OriginatorIDError, OriginatorVersionError
from eventsourcing.persistence import StoredEvent
from eventsourcing.utils import get_topic, register_topic, resolve_topic
from hypothesis import given
from hypothesis import strategies as st

from domain.order import NEW_ORDER, Arrival, Order, Report, decide, evolve
from domain.statuses import ALIASES, STANDARD_VOCABULARY
from service.event_log.codec import MAPPER, decode_event
from tests.support import written_law
from tests.support.examples import (
    CNOTE,
    CNOTE_OF_THE_RETURN,
    MINUTE,
    ORDER_NO,
    RECEIVED_AT,
    SENT,
    SENT_EVENT,
    SENT_STATE,
    arriving,
    folded,
    history,
    judged,
    says,
)
from tests.support.properties import MANY

ADVANCED, REPEATED, LATE, REFUSED, UNRECOGNISED = written_law.VERDICTS

# Every raw string, some in other spellings, and some unknown words.
STRINGS = [
    *(raw for raws in ALIASES.values() for raw in raws),
    "PICK_UP",
    " Dikirim ",
    "out-for-delivery",
    "Transit Jakarta",
    "",
]
RECEIVED = st.lists(
    st.builds(
        lambda status, cnote, minutes: says(status, cnote, RECEIVED_AT + minutes * MINUTE),
        st.sampled_from(STRINGS),
        st.sampled_from([None, CNOTE, CNOTE_OF_THE_RETURN, "C"]),
        st.integers(-10, 10),
    ),
    min_size=1,
    max_size=20,
)

# The documented lifecycles


@pytest.mark.parametrize(
    ("reports", "verdicts", "status"),
    [
        (
            ("Diajukan", "Dipacking", "Dijemput", "Dikirim", "Diantar", "Diterima", "Selesai"),
            (ADVANCED,) * 7,
            "completed",
        ),
        (("Packed", "Sent", "Received"), (ADVANCED,) * 3, "delivered"),
        (("Packed", "Sent", "Problem", "Sent", "Received"), (ADVANCED,) * 5, "delivered"),
        (("Sent", "Return", "Return Done"), (ADVANCED,) * 3, "returned"),
        (("Return", "Problem", "Received", "Return Done"), (ADVANCED, ADVANCED, REFUSED, ADVANCED), "returned"),
        (("Created", "Canceled", "Sent"), (ADVANCED, ADVANCED, REFUSED), "cancelled"),
        (("Sent", "Canceled"), (ADVANCED, REFUSED), "in_transit"),
        (("Packed", "Packed", "Packed"), (ADVANCED, REPEATED, REPEATED), "packed"),
        (("Delivering", "Packed"), (ADVANCED, LATE), "out_for_delivery"),
        (("Sent", "Transit Jakarta"), (ADVANCED, UNRECOGNISED), "in_transit"),
        (("Transit Jakarta", "Selesai"), (UNRECOGNISED, ADVANCED), "completed"),
        (("Return", "Received"), (ADVANCED, REFUSED), "returning"),
        (("Lost", "Sent", "Received"), (ADVANCED,) * 3, "delivered"),
    ],
)
def test_lifecycles(reports: tuple[str, ...], verdicts: tuple[str, ...], status: str) -> None:
    """The lifecycles in docs/statuses.md and in the sender's documentation get the documented verdicts."""
    events = history(*reports)
    assert tuple(event.verdict for event in events) == verdicts
    assert folded(events).state.status == status


def test_a_new_order_is_empty() -> None:
    """An order without reports has version 0, no status and no airway bill."""
    order = Order.new(ORDER_NO)
    assert order.id == ORDER_NO
    assert order.state == NEW_ORDER
    assert order.version == 0
    assert order.pending_events == []


@pytest.mark.parametrize("status", [word.raw_strings[0] for word in written_law.VOCABULARY])
def test_any_status_may_be_the_first(status: str) -> None:
    """Any status may come first: it advances the order and skips no stage."""
    (event,) = history(status)
    assert (event.originator_version, event.verdict, event.skipped) == (1, ADVANCED, [])
    assert (event.previous_status, event.status, event.status_version) == (
        None,
        STANDARD_VOCABULARY.recognise(status),
        1,
    )


def test_the_event_carries_the_report() -> None:
    """The event contains every field of the report unchanged, next to the decision."""
    event = decide(NEW_ORDER, SENT)
    carried = Report(
        Arrival(event.report_id, event.timestamp, event.remote),
        event.originator_id,
        event.reported_status,
        event.reported_cnote,
        event.body,
        event.occurred_at,
        event.quarantine_id,
    )
    assert carried == SENT
    assert event.recognised == "in_transit"


def test_an_immediate_retry() -> None:
    """An immediate retry is repeated if the first report advanced; otherwise it gets the same verdict again."""
    for reports in (("Packed", "Sent"), ("Sent", "Packed"), ("Cancelled", "Sent"), ("Sent", "?")):
        *_, first, again = history(*reports, reports[-1])
        assert again.verdict == (REPEATED if first.verdict == ADVANCED else first.verdict)
        assert again.status == first.status


@pytest.mark.parametrize(
    ("reports", "moved_back_to"),
    [
        (("Sent", "Delivering", "Sent"), "in_transit"),
        (("Pickup", "Problem", "Pickup"), "picked_up"),
        (("Sent", "Problem", "Sent"), "in_transit"),
    ],
)
def test_an_overtaken_retry_can_move_a_status_back(reports: tuple[str, ...], moved_back_to: str) -> None:
    """A retry that a later report overtook can move the status back, as docs/statuses.md warns.

    The sender gives no sign that distinguishes such a retry from a new attempt.
    """
    last = history(*reports)[-1]
    assert (last.verdict, last.status) == (ADVANCED, moved_back_to)


def test_reports_that_move_nothing_leave_the_state_alone() -> None:
    """Late, unrecognised and repeated reports change neither the status nor its version nor the leg."""
    before, *events = history("Problem", "Created", "?", "Kendala")
    assert [event.verdict for event in events] == [LATE, UNRECOGNISED, REPEATED]
    for event in events:
        assert (event.status, event.status_version, event.leg) == ("problem", 1, "before_transit")
        assert event.previous_status == before.status


def test_skipped_stages_are_recorded() -> None:
    """The event names the stages without a report."""
    assert history("Diajukan", "Diterima")[-1].skipped == [
        "packed",
        "picked_up",
        "in_transit",
        "out_for_delivery",
    ]


# The airway bill


def test_the_first_cnote_is_kept_with_any_verdict() -> None:
    """If an order has no airway bill, a report with any verdict sets it."""
    for status in ("Sent", "?", "Packed"):
        *_, event = history("Delivering", says(status, CNOTE))
        assert event.cnote == CNOTE


@pytest.mark.parametrize(
    ("status", "verdict", "kept"),
    [
        ("Return", ADVANCED, CNOTE_OF_THE_RETURN),
        ("Sent", REPEATED, CNOTE_OF_THE_RETURN),
        ("Packed", LATE, CNOTE),
        ("Cancelled", REFUSED, CNOTE),
        ("?", UNRECOGNISED, CNOTE),
    ],
)
def test_a_new_cnote(status: str, verdict: str, kept: str) -> None:
    """A new cnote replaces the order's cnote only if its report advanced or repeated."""
    _, event = history(says("Sent", CNOTE), says(status, CNOTE_OF_THE_RETURN))
    assert event.verdict == verdict
    assert event.reported_cnote == CNOTE_OF_THE_RETURN
    assert event.cnote == kept


def test_a_missing_cnote_does_not_remove_the_orders() -> None:
    """A report without a cnote does not remove the order's cnote."""
    assert history(says("Sent", CNOTE), "Delivering", "Delivering")[-1].cnote == CNOTE


@pytest.mark.parametrize("cnote", [None, CNOTE])
def test_a_mere_repeat_names_the_version_that_it_repeats(cnote: str | None) -> None:
    """A repeat without a new cnote has the version of the event that set the status in ``repeats``."""
    *_, event = history("Created", says("Sent", CNOTE), says("Packed"), says("Sent", cnote))
    assert (event.verdict, event.repeats) == (REPEATED, 2)


def test_a_repeat_with_a_new_cnote_is_an_entry_of_its_own() -> None:
    """A repeat with a new cnote has no ``repeats``, and later repeats refer to the event that set
    the status.
    """
    _, news, repeat = history(
        says("Sent", CNOTE), says("Sent", CNOTE_OF_THE_RETURN), says("Sent", CNOTE_OF_THE_RETURN)
    )
    assert (news.verdict, news.repeats, news.status_version) == (REPEATED, None, 1)
    assert (repeat.verdict, repeat.repeats) == (REPEATED, 1)


# Time and versions


def test_received_at_never_goes_back() -> None:
    """If the clock goes back, a later report gets the time of the earlier one, so the history keeps
    its order.
    """
    times = [RECEIVED_AT, RECEIVED_AT - MINUTE, RECEIVED_AT + MINUTE, RECEIVED_AT]
    assert [event.timestamp for event in judged(arriving(SENT, time) for time in times)] == [
        RECEIVED_AT,
        RECEIVED_AT,
        RECEIVED_AT + MINUTE,
        RECEIVED_AT + MINUTE,
    ]


def test_the_senders_time_does_not_order_reports() -> None:
    """occurred_at is recorded but does not influence the verdict."""
    old = SENT._replace(occurred_at=datetime(2001, 1, 1, tzinfo=UTC))
    _, event = history("Packed", old)
    assert (event.verdict, event.occurred_at) == (ADVANCED, old.occurred_at)


def test_an_order_takes_only_its_own_next_event() -> None:
    """The fold refuses an event of another order, and an event out of sequence."""
    first, second = history("Packed", "Sent")
    with pytest.raises(OriginatorVersionError):
        second.mutate(None)
    with pytest.raises(OriginatorIDError):
        first.mutate(Order.new("another"))


# A command decides, and an event changes the state


def test_report_is_the_same_judgement_and_waits_in_pending_events() -> None:
    """Order.report returns the same events as decide, applies them, and keeps them as pending events."""
    order = Order.new(ORDER_NO)
    events = [order.report(says(status)) for status in ("Packed", "Sent", "Packed")]
    assert events == judged(says(status) for status in ("Packed", "Sent", "Packed"))
    assert order.state == evolve(NEW_ORDER, events[-1])
    assert order.collect_events() == events


def test_a_report_of_another_order_is_refused() -> None:
    """A report of another order raises an error and does not change the order."""
    order = Order.new("another")
    with pytest.raises(OriginatorIDError):
        order.report(SENT)
    assert order.pending_events == []
    assert order.state == NEW_ORDER


def test_loading_keeps_the_verdict_that_was_recorded() -> None:
    """Loading an event keeps its recorded verdict and fields, even if today's table would decide otherwise."""
    created, sent = history("Created", "Sent")
    assert sent.verdict == ADVANCED
    otherwise = dataclasses.replace(
        sent,
        verdict=REFUSED,
        status="submitted",
        status_version=1,
        skipped=[],
        leg="on_the_way_back",
        cnote="X",
    )
    stored = MAPPER.to_stored_event(otherwise)
    loaded = decode_event(ORDER_NO, stored.originator_version, stored.topic, stored.state)
    assert loaded == otherwise
    state = (2, sent.timestamp, "submitted", "on_the_way_back", 1, created.timestamp, "X")
    assert folded([created, loaded]).state == state


@MANY
@given(RECEIVED)
def test_the_last_event_and_the_full_fold_agree(received: list[Report]) -> None:
    """Deciding from the last event and deciding from the full history give the same events and state."""
    events = judged(received)
    assert folded(events).state == evolve(NEW_ORDER, events[-1])

    order = Order.new(ORDER_NO)
    assert [order.report(report) for report in received] == events
    assert order.state == evolve(NEW_ORDER, events[-1])


@MANY
@given(RECEIVED)
def test_the_last_event_sums_up_all_of_them(received: list[Report]) -> None:
    """Version, time, status, leg and cnote of the last event agree with the whole history."""
    events = judged(received)
    advances = [event for event in events if event.verdict == ADVANCED]
    last_advance = advances[-1] if advances else None
    bills = [event for event in events if event.reported_cnote is not None]
    moving_bills = [event for event in bills if event.verdict in (ADVANCED, REPEATED)]
    told_by = [*bills[:1], *moving_bills][-1:]

    version, received_at, status, leg, status_version, since, cnote = evolve(NEW_ORDER, events[-1])
    assert version == len(received)
    assert received_at == max(report.arrival.received_at for report in received)
    assert status == (last_advance.recognised if last_advance else None)
    assert status_version == (last_advance.originator_version if last_advance else None)
    assert since == (last_advance.timestamp if last_advance else None)
    assert leg == (
        written_law.LEG_AFTER[last_advance.previous_status]
        if last_advance is not None and status == "problem"
        else None
    )
    assert cnote == (told_by[0].reported_cnote if told_by else None)


@MANY
@given(RECEIVED)
def test_the_invariants_of_every_event(received: list[Report]) -> None:
    """Versions count up, times never go back, previous_status is the status before, and repeats
    name advances.
    """
    events = judged(received)
    assert [event.originator_version for event in events] == list(range(1, len(events) + 1))
    assert [event.previous_status for event in events] == [None, *(event.status for event in events[:-1])]
    assert sorted(event.timestamp for event in events) == [event.timestamp for event in events]
    for event in events:
        assert event.recognised == STANDARD_VOCABULARY.recognise(event.reported_status)
        assert (event.status == event.recognised) or event.verdict not in (ADVANCED, REPEATED)
        assert (event.reason is not None) == (event.verdict in (LATE, REFUSED, UNRECOGNISED))
        if event.repeats is not None:
            assert event.verdict == REPEATED
            repeated = events[event.repeats - 1]
            assert (repeated.verdict, repeated.status) == (ADVANCED, event.status)


# Loading bypasses __init__


def loaded(topic: str, state: bytes) -> Any:
    return MAPPER.to_domain_event(StoredEvent(ORDER_NO, 1, topic, state))


def test_the_topic_is_a_name_of_the_field() -> None:
    """The topic contains no module name, so the class can be moved or renamed without changing the log."""
    assert get_topic(Order.StatusReported) == "order.status_reported"
    assert resolve_topic("order.status_reported") is Order.StatusReported


def test_class_version_1_has_all_fields_when_loaded() -> None:
    """An event of the first release has all fields of today's class but those with a default, which apply."""
    assert getattr(Order.StatusReported, "class_version", 1) == 1
    names = {
        field.name for field in dataclasses.fields(Order.StatusReported) if field.default is dataclasses.MISSING
    }
    assert vars(loaded("order.status_reported", SENT_STATE)).keys() == names
    assert vars(decode_event(ORDER_NO, 1, "order.status_reported", SENT_STATE)).keys() == names
    assert loaded("order.status_reported", SENT_STATE) == SENT_EVENT


def test_an_event_of_an_older_class_version_is_upcast_when_loaded() -> None:
    """A second class version can load the events of the first, with every field, and writes class_version 2."""

    class StatusReportedWithCourier(Order.StatusReported):
        TOPIC = "order.status_reported.with_courier"
        class_version = 2

        courier: str | None

        @staticmethod
        def upcast_v1_v2(state: dict[str, Any]) -> None:
            state["courier"] = None

    register_topic(StatusReportedWithCourier.TOPIC, StatusReportedWithCourier)

    upcast = loaded(StatusReportedWithCourier.TOPIC, SENT_STATE)
    assert type(upcast) is StatusReportedWithCourier
    assert vars(upcast) == {**vars(SENT_EVENT), "courier": None}
    names = {field.name for field in dataclasses.fields(StatusReportedWithCourier)}
    assert vars(upcast).keys() == names - {
        "token_name",
        "rejudges",
        "imported_at",
        "reported_at",
        "traceparent",
    }
    assert (upcast.token_name, upcast.rejudges, upcast.imported_at) == (None, None, None)
    assert folded([upcast]).state == evolve(NEW_ORDER, SENT_EVENT)

    by_jne = object.__new__(StatusReportedWithCourier)
    vars(by_jne).update(vars(upcast), courier="JNE")
    stored = MAPPER.to_stored_event(by_jne)
    assert b'"class_version":2' in stored.state
    assert loaded(stored.topic, stored.state) == by_jne


def test_a_new_order_is_before_every_time() -> None:
    """The first event keeps the time of arrival, however early it is."""
    early = datetime(1, 1, 1, tzinfo=UTC) + timedelta(microseconds=1)
    assert decide(NEW_ORDER, arriving(SENT, early)).timestamp == early
