"""The pages' texts and formats in both languages, and how order numbers are written."""

import re
import string
from datetime import UTC, datetime
from typing import get_args

import pytest

from domain.statuses import STATUSES
from domain.transitions import VERDICTS
from service.database.operations import Action, Via
from service.http.times import to_rfc3339
from service.ingest.refusals import Cause
from service.pages.i18n import LOCALES, MESSAGES, Language, negotiate_language
from service.pages.render import FOLDER, choose_tone, isolate, spell_out, track_path

ID, EN = LOCALES["id"], LOCALES["en"]
# Names that the code composes from two parts.
COMPOSED_NAMES = {
    *VERDICTS,
    *(f"{verdict}_meaning" for verdict in VERDICTS),
    *(f"reason_{verdict}" for verdict in ("late", "refused", "unrecognised")),
    *(f"stage_{state}" for state in ("reached", "now", "skipped", "ahead")),
    *(f"problem_{status}" for status in (400, 403, 404, 409, 422, 503)),
    *(f"cause_{cause}" for cause in get_args(Cause)),
    *(f"operation_{action}" for action in get_args(Action)),
    *(f"via_{via}" for via in get_args(Via)),
    *(f"entry_{state}" for state in ("open", "retried", "discarded")),
}


def placeholders(text: str) -> set[str]:
    return {field for _, field, *_ in string.Formatter().parse(text) if field}


def test_both_languages_have_the_same_texts() -> None:
    """Each text exists in both languages, with the same placeholders."""
    incomplete = [name for name, texts in MESSAGES.items() if len(texts) != 2 or not all(texts)]
    assert incomplete == []
    differing = [name for name, (one, other) in MESSAGES.items() if placeholders(one) != placeholders(other)]
    assert differing == []


def test_every_text_is_used() -> None:
    """Each name appears in a template or in the code."""
    files = [*FOLDER.glob("*.py"), *FOLDER.glob("templates/*.html")]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    unused = [name for name in MESSAGES if not re.search(rf"\b{name}\b", source)]
    assert {*unused} <= COMPOSED_NAMES


@pytest.mark.parametrize(
    ("seconds", "indonesian", "english"),
    [
        (-1, "0 detik", "0 s"),
        (0.4, "0 detik", "0 s"),
        (59, "59 detik", "59 s"),
        (60, "1 menit", "1 min"),
        (3_600, "1 jam", "1 hour"),
        (3_601, "1 jam", "1 hour"),
        (9_000, "2 jam 30 menit", "2 hours 30 min"),
        (86_400, "1 hari", "1 day"),
        (86_460, "1 hari", "1 day"),
        (273_600, "3 hari 4 jam", "3 days 4 hours"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float, indonesian: str, english: str) -> None:
    """A duration has its two largest units, and the second one is left out if it is zero."""
    assert (ID.duration(seconds), EN.duration(seconds)) == (indonesian, english)


def test_times_and_numbers_follow_the_language() -> None:
    """Times are shown in Western Indonesia Time, even if they have another time zone."""
    time = datetime(2026, 8, 16, 18, 5, 9, tzinfo=UTC)
    assert (ID.time(time), EN.time(time)) == ("17 Agu 2026, 01.05 WIB", "17 Aug 2026, 01:05 WIB")
    assert (ID.clock(time), EN.clock(time)) == ("01.05", "01:05")
    assert (ID.number(12_345), EN.number(12_345)) == ("12.345", "12,345")
    assert (ID.number(1_234.5), EN.number(1_234.5)) == ("1.234,5", "1,234.5")
    assert to_rfc3339(time) == "2026-08-16T18:05:09Z"


def test_an_unknown_status_is_its_own_label() -> None:
    """A status of a later release is shown by its name; known statuses have labels and colours."""
    assert (ID.status("picked_up"), EN.status("picked_up")) == ("Dijemput", "Picked up")
    assert EN.status("teleported") == "teleported"
    assert EN.status(None) == EN.status("") == "No status yet"
    assert {choose_tone(status) for status in STATUSES} == {"go", "good", "warn", "bad", "muted"}


@pytest.mark.parametrize(
    ("verdict", "reason"),
    [
        ("refused", "“Cancelled” contradicts “In transit”, which was already reported."),
        ("late", "“Cancelled” is an earlier stage than “In transit”, which was already reported."),
        ("unrecognised", "This status word is unknown."),
        ("advanced", None),
        ("repeated", None),
    ],
)
def test_reports_that_did_not_count_have_a_reason(verdict: str, reason: str | None) -> None:
    """Late, refused and unrecognised reports have a reason in words, and the other two verdicts have none."""
    assert EN.reason(verdict, "cancelled", "in_transit") == reason


@pytest.mark.parametrize(
    ("header", "language"),
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
def test_the_language_is_negotiated(header: str, language: Language) -> None:
    """The first supported language wins; Indonesian is the default; the end of a long header is ignored."""
    assert negotiate_language(header) == language


def test_an_order_number_hides_nothing() -> None:
    """Characters beyond ASCII are escaped, outer spaces are quoted, and a path has one segment."""
    assert spell_out("KOM1") == "KOM1"
    assert spell_out("К\u202eM\U0001f600") == r"\u{41a}\u{202e}M\u{1f600}"  # noqa: RUF001 - a Cyrillic letter
    assert spell_out(" KOM1") == "“ KOM1”"
    assert track_path("a/b?#%2F..") == "/track/a%2Fb%3F%23%252F.."
    assert isolate("x") == "\u2068x\u2069"
