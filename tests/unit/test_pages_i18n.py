"""What the page says: the same in both languages, by the word and by the number."""

import re
import string
from datetime import UTC, datetime
from pathlib import Path

import pytest

from domain.statuses import STATUSES
from domain.transitions import VERDICTS
from service.pages import i18n as words
from service.pages.i18n import IN_ALL, WORDS, Language, iso, preferred
from service.pages.render import FOLDER, isolated, kind_of, track_path, written

ID, EN = IN_ALL["id"], IN_ALL["en"]
# Words that are looked up by a name made of two.
MADE = {f"{verdict}_means" for verdict in VERDICTS} | {
    *("why_late", "why_refused", "why_unrecognised"),
    *(f"stage_{state}" for state in ("reached", "now", "skipped", "ahead")),
    *(f"problem_{status}" for status in (400, 403, 404, 503)),
    *(f"entry_{state}" for state in ("open", "retried", "discarded")),
}


def fields_of(text: str) -> set[str]:
    return {field for _, field, *_ in string.Formatter().parse(text) if field}


def test_both_languages_say_the_same() -> None:
    """Neither leaves a word out, and both have the same fields to fill in."""
    incomplete = [name for name, texts in WORDS.items() if not all(texts)]
    differing = [name for name, (one, other) in WORDS.items() if fields_of(one) != fields_of(other)]
    assert (incomplete, differing) == ([], [])


def test_no_word_is_there_in_vain() -> None:
    """Each is named in a template or in the code."""
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("templates/*.html")]
    text = "".join(file.read_text(encoding="utf-8") for file in files) + " ".join([*MADE, *VERDICTS])
    assert [name for name in WORDS if not re.search(rf"\b{name}\b", text)] == []
    assert Path(words.__file__).parent == FOLDER


@pytest.mark.parametrize(
    ("seconds", "id_", "en"),
    [
        (-1, "0 detik", "0 s"),
        (0.4, "0 detik", "0 s"),
        (59, "59 detik", "59 s"),
        (60, "1 menit", "1 min"),
        (3_600, "1 jam", "1 hour"),
        (3_601, "1 jam", "1 hour"),
        (9_000, "2 jam 30 menit", "2 hours 30 min"),
        (86_400, "1 hari", "1 day"),
        (273_600, "3 hari 4 jam", "3 days 4 hours"),
    ],
)
def test_a_length_of_time_has_its_two_largest_units(seconds: float, id_: str, en: str) -> None:
    assert (ID.span(seconds), EN.span(seconds)) == (id_, en)


def test_times_and_numbers_are_written_by_the_language() -> None:
    """In Western Indonesia Time, whatever zone they came in."""
    time = datetime(2026, 8, 16, 18, 5, 9, tzinfo=UTC)
    assert (ID.time(time), EN.time(time)) == ("17 Agu 2026, 01.05 WIB", "17 Aug 2026, 01:05 WIB")
    assert (ID.clock(time), EN.clock(time)) == ("01.05", "01:05")
    assert (ID.number(12_345), EN.number(12_345)) == ("12.345", "12,345")
    assert (ID.number(1_234.5), EN.number(1_234.5)) == ("1.234,5", "1,234.5")
    assert iso(time) == "2026-08-16T18:05:09Z"


def test_a_status_has_its_label_and_an_unknown_one_itself() -> None:
    """What a later release has recorded is shown, not hidden."""
    assert (ID.status("picked_up"), EN.status("picked_up")) == ("Dijemput", "Picked up")
    assert EN.status("teleported") == "teleported"
    assert EN.status(None) == EN.status("") == "No status yet"
    assert {kind_of(status) for status in STATUSES} == {"go", "good", "warn", "bad", "rest"}


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        ("refused", "“Cancelled” contradicts “In transit”, which was reported before it."),
        ("late", "“Cancelled” is an earlier stage than “In transit”, which was reported before it."),
        ("unrecognised", "This status word is not in the vocabulary."),
        ("advanced", None),
        ("repeated", None),
    ],
)
def test_why_a_report_changed_nothing(verdict: str, why: str | None) -> None:
    assert EN.why(verdict, "cancelled", "in_transit") == why


@pytest.mark.parametrize(
    ("asked", "language"),
    [
        ("", "id"),
        ("de", "id"),
        ("en-GB,en;q=0.9", "en"),
        ("de-DE, EN;q=0.5", "en"),
        ("id-ID,en;q=0.5", "id"),
        (", ;q=1,*", "id"),
        ("de," * 100 + "en", "id"),
    ],
)
def test_the_language_of_a_browser(asked: str, language: Language) -> None:
    assert preferred(asked) == language


def test_an_order_number_is_written_so_that_nothing_hides_in_it() -> None:
    """All but ASCII is spelled out, spaces at an end are seen, and a path has one segment."""
    assert written("KOM1") == "KOM1"
    assert written("К\u202eM\U0001f600") == r"\u{41a}\u{202e}M\u{1f600}"  # noqa: RUF001 - a Cyrillic letter
    assert written(" KOM1") == "“ KOM1”"
    assert track_path("a/b?#%2F..") == "/track/a%2Fb%3F%23%252F.."
    assert isolated("x") == "\u2068x\u2069"
