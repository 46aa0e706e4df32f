"""The code recognises exactly the vocabulary of docs/statuses.md."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.statuses import ALIASES, LABELS, SETTLED, STANDARD_VOCABULARY, STATUSES, Status
from tests.support.properties import MANY
from tests.support.written_law import VOCABULARY

RAW_STRINGS = [(raw, word.status) for word in VOCABULARY for raw in word.raw_strings]
# Runs of word separators, including Unicode's white space.
SEPARATORS = st.text("_- \t\n\r\u00a0\u2003\u3000", min_size=1, max_size=4)


def test_the_statuses_are_the_written_ones() -> None:
    """The code's statuses are those of the page, in its order."""
    assert list(STATUSES) == [word.status for word in VOCABULARY]
    assert len(STATUSES) == 13


def test_the_labels_are_the_written_ones() -> None:
    """Every status has the page's labels in both languages."""
    assert [(status, label["id"], label["en"]) for status, label in LABELS.items()] == [
        (word.status, word.label_id, word.label_en) for word in VOCABULARY
    ]


def test_the_aliases_are_the_written_ones() -> None:
    """Every status has the page's raw strings."""
    assert list(ALIASES.items()) == [(word.status, word.raw_strings) for word in VOCABULARY]


def test_the_settled_statuses_are_the_written_ones() -> None:
    """The settled statuses are those that the page marks as settled."""
    assert {word.status for word in VOCABULARY if word.settled} == SETTLED


def test_an_alias_belongs_to_one_status() -> None:
    """Each raw string belongs to one status only."""
    assert [raw for raw, times in Counter(raw for raw, _ in RAW_STRINGS).items() if times > 1] == []


@pytest.mark.parametrize(("raw", "status"), RAW_STRINGS)
def test_each_raw_string_is_recognised(raw: str, status: Status) -> None:
    """Every raw string of the page means its status, in lower, upper and title case."""
    assert [STANDARD_VOCABULARY.recognise(spelling) for spelling in (raw, raw.upper(), raw.title())] == [
        status
    ] * 3


@pytest.mark.parametrize("status", STATUSES)
def test_each_canonical_name_and_label_is_recognised(status: Status) -> None:
    """A status is recognised by its name and by both of its labels."""
    assert STANDARD_VOCABULARY.recognise(status) == status
    assert STANDARD_VOCABULARY.recognise(LABELS[status]["id"]) == status
    assert STANDARD_VOCABULARY.recognise(LABELS[status]["en"]) == status


@MANY
@given(data=st.data())
def test_case_and_separators_do_not_count(data: st.DataObject) -> None:
    """Case, the kind and number of separators, and surrounding separators make no difference."""
    raw, status = data.draw(st.sampled_from(RAW_STRINGS))
    spelling = "".join(
        data.draw(SEPARATORS) if letter == " " else data.draw(st.sampled_from([letter, letter.upper()]))
        for letter in raw
    )
    padding = st.one_of(st.just(""), SEPARATORS)
    assert STANDARD_VOCABULARY.recognise(data.draw(padding) + spelling + data.draw(padding)) == status


def test_case_is_folded_not_lowered() -> None:
    """Case is compared by Unicode's case folding, so the long s equals an s."""
    assert STANDARD_VOCABULARY.recognise("\u017fent") == "in_transit"


@pytest.mark.parametrize(
    "unknown",
    [
        "",
        " ",
        "dikirimm",
        "in.transit",
        "intransit",
        "returdone",
        "dikirim dikirim",
        "re turn",
        "dіkіrіm",  # noqa: RUF001 - Cyrillic look-alikes are the point
        "dikirim\u200b",
        "none",
        "null",
    ],
)
def test_anything_else_is_unrecognised(unknown: str) -> None:
    """A word that only resembles the vocabulary is unrecognised."""
    assert STANDARD_VOCABULARY.recognise(unknown) is None
