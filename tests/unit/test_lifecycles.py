"""The lives of simulated orders are realistic and legal, and a seed determines them."""

import json
from collections import Counter
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest

from domain.statuses import STANDARD_VOCABULARY, STATUSES
from domain.transitions import Leg, judge
from service.features.simulator.lifecycles import NEXT, STEPS_MAX, UNKNOWN_WORDS, WORDS, Plan, Troubles, life

STARTED = datetime(2026, 11, 24, 14, 2, 6, 120_345, tzinfo=UTC)
ORDERS = 400


def reports_of(troubles: Troubles, orders: int = ORDERS, seed: int = 1) -> list[list[dict[str, Any]]]:
    """Return the reports of each order in the sequence in which they are sent, including copies."""
    return [
        [json.loads(push.body) for turn in journey.turns for push in turn]
        for journey in Plan(seed, STARTED, troubles=troubles).journeys(orders)
    ]


def test_every_step_of_a_life_is_a_legal_move() -> None:
    """The transition table advances every order at every step, and the lives cover every status."""
    seen = set()
    for number in range(2_000):
        statuses = list(life(Random(number)))
        assert 1 <= len(statuses) <= STEPS_MAX
        status, leg = None, None
        for reported in statuses:
            judgement = judge(status, leg, reported)
            assert judgement.verdict == "advanced", (status, leg, reported)
            status, leg = reported, judgement.leg
        seen.update(statuses)
    assert seen == set(STATUSES)


def test_chances_are_hundredths() -> None:
    """The chances of a status add up to at most 100, and each of its next statuses is a legal move."""
    for (status, leg), ways in NEXT.items():
        assert sum(ways.values()) <= 100
        for reported in ways:
            assert judge(status, leg, reported).verdict == "advanced"


def test_every_word_means_its_status() -> None:
    """Every status has words in both languages, and the vocabulary does not contain the unknown words."""
    assert WORDS.keys() == set(STATUSES)
    for status, languages in WORDS.items():
        assert {STANDARD_VOCABULARY.recognise(word) for words in languages for word in words} == {status}
    assert {STANDARD_VOCABULARY.recognise(word) for word in UNKNOWN_WORDS} == {None}


def test_without_troubles_every_report_is_sent_once_and_in_order() -> None:
    """Each turn has one report, which advances the order. Times increase, none is in the future, and no two
    bodies are equal.
    """
    bodies = []
    for journey in Plan(1, STARTED).journeys(ORDERS):
        assert journey.reports_withheld == 0
        status, leg, before = None, None, datetime.min.replace(tzinfo=UTC)
        for (push,) in journey.turns:
            report = json.loads(push.body)
            assert report["order_no"] == journey.order_no
            judgement = judge(status, leg, STANDARD_VOCABULARY.recognise(report["status"]))
            assert judgement.verdict == "advanced"
            status, leg = STANDARD_VOCABULARY.recognise(report["status"]), judgement.leg
            at = datetime.fromisoformat(report["timestamp"])
            assert before < at <= STARTED
            before = at
            bodies.append(push.body)
    assert len(bodies) == len(set(bodies))


def test_the_airway_bill_comes_with_the_courier_and_may_change_with_a_return() -> None:
    """The airway bill is empty until the courier comes, and then changes only with a return."""
    changed = 0
    for reports in reports_of(Troubles()):
        cnote = ""
        for report in reports:
            if report["cnote"] != cnote:
                status = STANDARD_VOCABULARY.recognise(report["status"])
                assert cnote == "" or status == "returning"
                changed += cnote != ""
                cnote = report["cnote"]
    assert changed


def test_a_seed_determines_the_journeys() -> None:
    """The same seed gives the same journeys for any number of orders, and another seed gives other ones."""
    troubles = Troubles(0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    first = list(Plan(1, STARTED, troubles=troubles).journeys(50))
    assert list(Plan(1, STARTED, troubles=troubles).journeys(100))[:50] == first
    assert list(Plan(2, STARTED, troubles=troubles).journeys(50)) != first


def test_two_runs_never_share_an_order() -> None:
    """Order numbers contain the start of the run, so two runs never share an order."""
    later = Plan(1, STARTED.replace(microsecond=120_346))
    assert not any(journey.order_no.startswith(Plan(1, STARTED).prefix) for journey in later.journeys(ORDERS))


def test_troubles_do_not_change_the_reports_themselves() -> None:
    """With all troubles except unknown words, each report equals that of an undisturbed run, or is missing."""
    undisturbed = {report["mark"]: report for order in reports_of(Troubles()) for report in order}
    troubles = Troubles(0.2, 0.2, 0.2, 0.2, 0.2)
    disturbed = [report for order in reports_of(troubles) for report in order]
    assert all(undisturbed[report["mark"]] == report for report in disturbed)
    missing = len(undisturbed) - len({report["mark"] for report in disturbed})
    withheld = sum(journey.reports_withheld for journey in Plan(1, STARTED, troubles=troubles).journeys(ORDERS))
    assert missing == withheld
    assert 0.15 < missing / len(undisturbed) < 0.25


@pytest.mark.parametrize(("trouble", "least"), [("reordered", 1), ("delayed", 2)])
def test_overtaken_reports_come_after_later_ones(trouble: str, least: int) -> None:
    """One report overtakes a reordered one, several a delayed one, and each is still sent once."""
    overtaken = Counter[int]()
    for reports in reports_of(Troubles(**{trouble: 0.1})):
        steps = [int(report["mark"].rpartition("/")[2]) for report in reports]
        assert sorted(steps) == list(range(1, len(steps) + 1))
        overtaken.update(sum(earlier > step for earlier in steps[:place]) for place, step in enumerate(steps))
    assert overtaken[least]
    assert (max(overtaken) > 2) is (trouble == "delayed")


def test_copies_come_at_once_or_after_the_next_report() -> None:
    """A doubled report has two equal bodies; only one push of each report is cut off."""
    at_once = apart = 0
    for journey in Plan(1, STARTED, ("POST",), Troubles(doubled=0.1, hung_up=1.0)).journeys(ORDERS):
        bodies = Counter(push.body for turn in journey.turns for push in turn)
        copies = sum(count - 1 for count in bodies.values())
        together = sum(len(turn) - len({push.body for push in turn}) for turn in journey.turns)
        at_once += together
        apart += copies - together
        assert max(bodies.values()) <= 2
        pushes = [push for turn in journey.turns for push in turn]
        assert {push.method for push in pushes} == {"POST"}
        assert sum(push.patience_seconds is not None for push in pushes) == len(bodies)
    assert at_once > 20
    assert apart > 20


def test_unknown_words_replace_known_ones() -> None:
    """The share of unknown words equals the configured share."""
    words = [report["status"] for order in reports_of(Troubles(unknown=0.5)) for report in order]
    assert 0.45 < sum(word in UNKNOWN_WORDS for word in words) / len(words) < 0.55


def test_the_lives_cover_every_leg_of_a_problem() -> None:
    """Problems occur before transit, on the way out and on the way back."""
    legs: set[Leg | None] = set()
    for number in range(5_000):
        status, leg = None, None
        for reported in life(Random(number)):
            leg = judge(status, leg, reported).leg
            status = reported
            legs.add(leg)
    assert legs == {None, "before_transit", "on_the_way_out", "on_the_way_back"}
