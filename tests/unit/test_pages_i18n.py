"""The pages' texts and formats in both languages, and how order numbers are written."""

import ast
import re
import string
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import cast, get_args
from zoneinfo import ZoneInfo

import pytest

from domain.order import OVERTAKEN
from domain.statuses import STATUSES
from domain.transitions import VERDICTS
from service.database.api_keys import SCOPES
from service.database.operations import Action, Via
from service.features.pages.i18n import MESSAGES, UNREADABLE, Language, negotiate_language
from service.features.pages.render import FOLDER, choose_tone, isolate, spell_out, track_path
from service.features.subscriptions.subscription import SubscriptionReason, SubscriptionState
from service.http.times import to_rfc3339
from service.ingest import parser, webhook
from service.ingest.refusals import Cause
from tests.support.examples import LOCALES

ID, EN = LOCALES["id"], LOCALES["en"]
# Of the pages, and of the features that have pages.
FILES = [*FOLDER.parent.glob(f"*/{MESSAGES}")]
TEXTS = {name: texts for file in FILES for name, texts in tomllib.loads(file.read_text("utf-8")).items()}
# Names that the code composes from two parts.
COMPOSED_NAMES = {
    *VERDICTS,
    *(f"{verdict}_meaning" for verdict in VERDICTS),
    *(f"reason_{verdict}" for verdict in ("late", "overtaken", "refused", "unrecognised")),
    *(f"stage_{state}" for state in ("reached", "now", "skipped", "ahead")),
    *(f"problem_{status}" for status in (400, 403, 404, 409, 422, 503)),
    *(f"share_status_{status}" for status in (*STATUSES, "none")),
    *(f"share_{part}_{kind}" for part in ("problem", "hint") for kind in ("403", "404", "503", "other")),
    *(f"cause_{cause}" for cause in get_args(Cause)),
    *(f"operation_{action}" for action in get_args(Action)),
    *(f"via_{via}" for via in get_args(Via)),
    *(f"entry_{state}" for state in ("open", "retried", "discarded")),
    *(f"unreadable_{name}" for name in UNREADABLE),
    *(f"key_scope_{scope}" for scope in SCOPES),
    *(f"subscription_{state}" for state in get_args(SubscriptionState.__value__)),
    *(f"subscription_reason_{reason}" for reason in get_args(SubscriptionReason.__value__)),
}


def placeholders(text: str) -> set[str]:
    return {field for _, field, *_ in string.Formatter().parse(text) if field}


def test_both_languages_have_the_same_texts() -> None:
    """Each text exists in both languages, with the same placeholders."""
    incomplete = [name for name, texts in TEXTS.items() if len(texts) != 2 or not all(texts)]
    assert incomplete == []
    differing = [name for name, (one, other) in TEXTS.items() if placeholders(one) != placeholders(other)]
    assert differing == []


def test_every_text_is_used() -> None:
    """Each name appears in a template or in the code, and each scope of a key has a text."""
    folders = {file.parent for file in FILES}
    files = [file for one in folders for name in ("*.py", "templates/*.html") for file in one.glob(name)]
    source = "".join(file.read_text(encoding="utf-8") for file in files)
    assert {f"key_scope_{scope}" for scope in SCOPES} <= {*TEXTS}
    unused = [name for name in TEXTS if not re.search(rf"\b{name}\b", source)]
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


TIME = datetime(2026, 8, 16, 18, 5, 9, tzinfo=UTC)


def test_times_follow_the_language() -> None:
    """Times are shown in the locale's time zone, in full, short or exact to the second."""
    jakarta = ZoneInfo("Asia/Jakarta")
    id_, en = ID._replace(zone=jakarta), EN._replace(zone=jakarta)
    assert (id_.time(TIME), en.time(TIME)) == ("17 Agu 2026, 01.05 WIB", "17 Aug 2026, 01:05 WIB")
    assert (id_.short_time(TIME), en.short_time(TIME)) == ("17 Agu, 01.05", "17 Aug, 01:05")
    assert id_.exact_time(TIME) == "17 Agu 2026, 01.05.09 WIB (UTC+7)"
    assert en.exact_time(TIME) == "17 Aug 2026, 01:05:09 WIB (UTC+7)"
    assert (id_.clock(TIME), en.clock(TIME)) == ("01.05", "01:05")


@pytest.mark.parametrize(
    ("zone", "time", "name"),
    [
        ("Asia/Jayapura", "17 Aug 2026, 03:05 WIT", "Asia/Jayapura, WIT (UTC+9)"),
        ("Asia/Singapore", "17 Aug 2026, 02:05 UTC+8", "Asia/Singapore, UTC+8"),
        ("America/Sao_Paulo", "16 Aug 2026, 15:05 UTC-3", "America/Sao_Paulo, UTC-3"),
        ("Europe/London", "16 Aug 2026, 19:05 BST", "Europe/London, BST (UTC+1)"),
        ("UTC", "16 Aug 2026, 18:05 UTC", "UTC"),
    ],
)
def test_a_time_names_its_zone(zone: str, time: str, name: str) -> None:
    """A zone without an abbreviation is named by its difference from UTC, and nothing is named twice."""
    locale = EN._replace(zone=ZoneInfo(zone))
    assert (locale.time(TIME), locale.zone_name(TIME)) == (time, name)


def test_numbers_follow_the_language() -> None:
    """Numbers have the separators of the language, also in durations."""
    assert (ID.duration(1_234 * 86_400), EN.duration(1_234 * 86_400)) == ("1.234 hari", "1,234 days")
    assert (ID.number(12_345), EN.number(12_345)) == ("12.345", "12,345")
    assert (ID.number(1_234.5), EN.number(1_234.5)) == ("1.234,5", "1,234.5")
    assert to_rfc3339(TIME) == "2026-08-16T18:05:09Z"


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


def test_an_overtaken_rejudgement_has_a_reason_of_its_own() -> None:
    """The table would let the report advance the order, so the table's reason would be wrong."""
    recorded = OVERTAKEN.format(reported="returning", status="delivered")
    reason = "“Returning” was reported before “Delivered”, which the order has reached since."
    assert EN.reason("late", "returning", "delivered", recorded) == reason


def reasons() -> Iterator[str]:
    """Yield every reason of the modules that quarantine a body, with 1 in place of each computed part."""
    for module in (parser, webhook):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        for call in ast.walk(tree):
            name = call.func if isinstance(call, ast.Call) else None
            if isinstance(name, ast.Name) and name.id == "UnreadableError":
                yield from texts_of(cast("ast.Call", call).args[0])
            elif isinstance(name, ast.Attribute) and name.attr == "_quarantine_body":
                yield from texts_of(cast("ast.Call", call).args[2])


def texts_of(expression: ast.expr) -> Iterator[str]:
    match expression:
        case ast.Constant(str(text)):
            yield text
        case ast.JoinedStr(parts):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "1" for part in parts)
        case ast.IfExp(_, one, other):
            yield from (*texts_of(one), *texts_of(other))


def test_every_reason_of_the_quarantine_is_translated() -> None:
    """Each reason that the code has is shown in both languages; another one is left to the caller."""
    found = [*reasons()]
    assert {"status is missing", "order_no has more than 1 characters", "the report cannot be recorded"} <= {
        *found
    }
    assert [reason for reason in found if ID.unreadable(reason) is None] == []
    # The English texts begin with a capital letter.
    assert [reason for reason in found if (EN.unreadable(reason) or "").casefold() != normal(reason)] == []
    assert ID.unreadable("order_no has more than 128 characters") == "order_no lebih dari 128 karakter"
    assert ID.unreadable("not JSON: {x}\nat 1") == "Bukan JSON: {x}\nat 1"
    assert ID.unreadable("a reason of a later release") is None


def normal(reason: str) -> str:
    return reason.casefold().replace("a nul character", "control characters")


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
