"""Locales: the pages' texts, numbers, times and durations in Indonesian and in English."""

import tomllib
from collections.abc import Mapping
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from domain.statuses import status_label

Language = Literal["id", "en"]
LANGUAGES: Final[tuple[Language, ...]] = get_args(Language)

# Western Indonesia Time. A browser that runs scripts shows the reader's own time zone instead.
WIB: Final = timezone(timedelta(hours=7), "WIB")

# Each text by its name, in the order of LANGUAGES.
MESSAGES: Final[dict[str, list[str]]] = tomllib.loads(
    Path(__file__).with_name("messages.toml").read_text(encoding="utf-8")
)

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
# A browser lists its preferred languages first; the rest of a longer list is ignored.
_LANGUAGE_RANGES_MAX: Final = 10


class Locale(NamedTuple):
    """One language: its texts by name, and its formats for values."""

    language: Language
    texts: Mapping[str, str]

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
        """Return a time in WIB, to the minute."""
        local = time.astimezone(WIB)
        return f"{self.day(local)} {local.year}, {self.clock(local)} WIB"

    def clock(self, time: datetime) -> str:
        """Return the time of day in WIB, to the minute."""
        return time.astimezone(WIB).strftime("%H.%M" if self.language == "id" else "%H:%M")

    def day(self, day: date) -> str:
        """Return the day and the month of a date, in the date's own time zone."""
        return f"{day.day} {_MONTHS[self.language][day.month - 1]}"

    def duration(self, seconds: float) -> str:
        """Return a duration in its two largest units."""
        left = max(0, int(seconds))
        parts: list[tuple[int, str]] = []
        for size, names in _UNITS:
            count, left = divmod(left, size)
            if parts or count or size == 1:
                parts.append((count, names[self.language][count != 1]))
        return " ".join(f"{count} {name}" for count, name in parts[:2] if count) or f"0 {parts[0][1]}"

    def reason(self, verdict: str, recognised: str | None, previous_status: str | None) -> str | None:
        """Explain why a report left its order's status unchanged; return None for other verdicts."""
        text = self.texts.get(f"reason_{verdict}")
        return text and text.format(reported=self.status(recognised), status=self.status(previous_status))


LOCALES: Final[dict[Language, Locale]] = {
    language: Locale(language, {name: texts[index] for name, texts in MESSAGES.items()})
    for index, language in enumerate(LANGUAGES)
}


def negotiate_language(accept_language: str) -> Language:
    """Return the first supported language of an Accept-Language header, or Indonesian if it has none."""
    for language_range in accept_language.split(",")[:_LANGUAGE_RANGES_MAX]:
        language = language_range.partition(";")[0].strip().lower().partition("-")[0]
        if language in LOCALES:
            return LOCALES[language].language
    return "id"
