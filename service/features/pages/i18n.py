"""Locales: the pages' texts, numbers, times and durations in Indonesian and in English."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, tzinfo
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from domain.order import OVERTAKEN
from domain.statuses import status_label

Language = Literal["id", "en"]
LANGUAGES: Final[tuple[Language, ...]] = get_args(Language)

MESSAGES: Final = "messages.toml"

_MONTHS: Final = {
    "id": ("Jan", "Feb", "Mar", "Apr", "Mei", "Jun", "Jul", "Agu", "Sep", "Okt", "Nov", "Des"),
    "en": ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
}
# Seconds of a unit, and its singular and plural by language.
_UNITS: Final = (
    (86_400, {"id": ("hari", "hari"), "en": ("day", "days")}),
    (3_600, {"id": ("jam", "jam"), "en": ("hour", "hours")}),
    (60, {"id": ("menit", "menit"), "en": ("min", "min")}),
    (1, {"id": ("detik", "detik"), "en": ("s", "s")}),
)
# The reasons of ``service.ingest``, by the names of their texts. They are stored as API clients read them.
UNREADABLE: Final = {
    name: re.compile(pattern, re.DOTALL)
    for name, pattern in {
        "not_json": r"not JSON: (?P<error>.*)",
        "not_object": r"not a JSON object",
        "not_checked": r"the JSON cannot be checked for duplicate keys: (?P<error>.*)",
        "twice": r"(?P<member>\w+) occurs twice",
        "digits": r"(?P<member>\w+) is negative or has more than (?P<digits>\d+) digits",
        "missing": r"(?P<member>\w+) is missing",
        "not_text": r"(?P<member>\w+) is not text",
        "blank": r"(?P<member>\w+) is blank",
        "long": r"(?P<member>\w+) has more than (?P<characters>\d+) characters",
        "control": r"(?P<member>\w+) has (?:control characters|a NUL character)",
        "segment": r"(?P<member>\w+) is a path segment that clients remove",
        "unrecordable": r"the report cannot be recorded",
    }.items()
}
# A browser lists its preferred languages first; the rest of a longer list is ignored.
_LANGUAGE_RANGES_MAX: Final = 10


class Locale(NamedTuple):
    """One language: its texts by name, and its formats for values. Times are shown in ``zone``."""

    language: Language
    texts: Mapping[str, str]
    zone: tzinfo = UTC

    def status(self, status: str | None) -> str:
        """Return the label of a status; a status that only a newer release has is its own label."""
        if not status:
            return self.texts["no_status"]
        label = status_label(status)
        return status if label is None else label[self.language]

    def number(self, number: float) -> str:
        """Return a number with thousands separators; a float gets one decimal place."""
        text = f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"
        return text if self.language == "en" else text.translate(str.maketrans(",.", ".,"))

    def time(self, time: datetime) -> str:
        """Return a time to the minute, with its time zone."""
        local = time.astimezone(self.zone)
        return f"{self.full_day(local)}, {self.clock(local)} {_abbreviate(local)}"

    def short_time(self, time: datetime) -> str:
        """Return a time to the minute, without its year and its time zone."""
        return f"{self.day(time.astimezone(self.zone))}, {self.clock(time)}"

    def exact_time(self, time: datetime) -> str:
        """Return a time to the second, with its time zone and the difference from UTC."""
        local = time.astimezone(self.zone)
        return f"{self.full_day(local)}, {self.clock(local, seconds=True)} {_describe_zone(local)}"

    def clock(self, time: datetime, *, seconds: bool = False) -> str:
        """Return the time of day, to the minute or to the second."""
        text = time.astimezone(self.zone).strftime("%H:%M:%S" if seconds else "%H:%M")
        return text if self.language == "en" else text.replace(":", ".")

    def full_day(self, day: date) -> str:
        """Return the day, the month and the year of a date, in the date's own time zone."""
        return f"{self.day(day)} {day.year}"

    def day(self, day: date) -> str:
        """Return the day and the month of a date, in the date's own time zone."""
        return f"{day.day} {_MONTHS[self.language][day.month - 1]}"

    def zone_name(self, now: datetime) -> str:
        """Return the name of the time zone, its abbreviation and its difference from UTC, each once."""
        name, description = str(self.zone), _describe_zone(now.astimezone(self.zone))
        return name if name == description else f"{name}, {description}"

    def duration(self, seconds: float) -> str:
        """Return a duration in its two largest units."""
        left = max(0, int(seconds))
        parts: list[tuple[int, str]] = []
        for size, names in _UNITS:
            count, left = divmod(left, size)
            if parts or count or size == 1:
                parts.append((count, names[self.language][count != 1]))
        shown = [f"{self.number(count)} {name}" for count, name in parts[:2] if count]
        return " ".join(shown) or f"0 {parts[0][1]}"

    def reason(
        self, verdict: str, recognised: str | None, previous_status: str | None, recorded: str | None = None
    ) -> str | None:
        """Explain why a report left its order's status unchanged; return None for other verdicts."""
        if recorded == OVERTAKEN.format(reported=recognised, status=previous_status):
            verdict = "overtaken"
        text = self.texts.get(f"reason_{verdict}")
        return text and text.format(reported=self.status(recognised), status=self.status(previous_status))

    def unreadable(self, reason: str) -> str | None:
        """Return why a body could not be read, in this language; None for a reason that this release lacks."""
        for name, pattern in UNREADABLE.items():
            if match := pattern.fullmatch(reason):
                return self.texts[f"unreadable_{name}"].format(**match.groupdict())
        return None


def _describe_zone(local: datetime) -> str:
    """Return the abbreviation of a local time's zone and its difference from UTC, such as WIB (UTC+7)."""
    offset = local.strftime("%z")
    hours = f"UTC{offset[0]}{int(offset[1:3])}" if int(offset[1:3]) else "UTC"
    abbreviation = _abbreviate(local)
    return hours if abbreviation == hours else f"{abbreviation} ({hours})"


def _abbreviate(local: datetime) -> str:
    """Return the abbreviation of a local time's zone. Zones without one are named by numbers, such as +08."""
    name = local.strftime("%Z")
    return f"UTC{name[0]}{int(name[1:3])}" if name.startswith(("+", "-")) else name


def read_locales(folders: Iterable[Path], zone: tzinfo = UTC) -> dict[Language, Locale]:
    """Return the locales with the texts of some folders.

    Args:
        folders: the folders of features, each with a file of texts: by name, in the order of LANGUAGES.
        zone: the time zone of the times that they show.
    """
    messages: dict[str, list[str]] = {}
    for folder in folders:
        messages |= tomllib.loads((folder / MESSAGES).read_text(encoding="utf-8"))
    return {
        language: Locale(language, {name: texts[index] for name, texts in messages.items()}, zone)
        for index, language in enumerate(LANGUAGES)
    }


def negotiate_language(accept_language: str) -> Language:
    """Return the first supported language of an Accept-Language header, or Indonesian if it has none."""
    for language_range in accept_language.split(",")[:_LANGUAGE_RANGES_MAX]:
        language = language_range.partition(";")[0].strip().lower().partition("-")[0]
        for supported in LANGUAGES:
            if language == supported:
                return supported
    return "id"
