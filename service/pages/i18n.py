"""What the page says, in Indonesian and in English: words, numbers, times and lengths of time."""

import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Final, Literal, NamedTuple

from domain.statuses import LABELS, Label

Language = Literal["id", "en"]
LANGUAGES: Final[tuple[Language, ...]] = ("id", "en")

# Western Indonesia Time, shown where no script makes it the reader's own.
WIB: Final = timezone(timedelta(hours=7), "WIB")

# The words by their names: Indonesian, English.
WORDS: Final[dict[str, tuple[str, str]]] = {
    name: (words[0], words[1])
    for name, words in tomllib.loads(
        Path(__file__).with_name("messages.toml").read_text(encoding="utf-8")
    ).items()
}

# By any text: one that this release does not know may stand in the log.
_LABELS: Final[Mapping[str, Label]] = {str(status): label for status, label in LABELS.items()}
_MONTHS: Final = {
    "id": ("Jan", "Feb", "Mar", "Apr", "Mei", "Jun", "Jul", "Agu", "Sep", "Okt", "Nov", "Des"),
    "en": ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"),
}
_UNITS: Final = (
    (86_400, ("hari", "hari"), ("day", "days")),
    (3_600, ("jam", "jam"), ("hour", "hours")),
    (60, ("menit", "menit"), ("min", "min")),
    (1, ("detik", "detik"), ("s", "s")),
)
# Of the languages that a browser asks for, the one it likes best first.
_RANGES_MAX: Final = 10


class Words(NamedTuple):
    """One language's words, and its ways to write what is no word."""

    language: Language
    t: Mapping[str, str]

    def status(self, status: str | None) -> str:
        """Return what people read for a status; one that this release does not know stays as it is."""
        if status is None or status == "":
            return self.t["no_status"]
        label: Label | None = _LABELS.get(status)
        if label is None:
            return status
        return label.id if self.language == "id" else label.en

    def number(self, number: float) -> str:
        """Return a number with separators between thousands."""
        text = f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"
        return text if self.language == "en" else text.translate(str.maketrans(",.", ".,"))

    def time(self, time: datetime) -> str:
        """Return a time in WIB, to the minute."""
        local = time.astimezone(WIB)
        day = f"{local.day} {_MONTHS[self.language][local.month - 1]} {local.year}"
        return f"{day}, {local:%H.%M} WIB" if self.language == "id" else f"{day}, {local:%H:%M} WIB"

    def clock(self, time: datetime) -> str:
        """Return the time of day in WIB."""
        return f"{time.astimezone(WIB):%H.%M}" if self.language == "id" else f"{time.astimezone(WIB):%H:%M}"

    def day(self, day: datetime) -> str:
        """Return day and month of a time in UTC."""
        return f"{day.day} {_MONTHS[self.language][day.month - 1]}"

    def span(self, seconds: float) -> str:
        """Return a length of time by its two largest units."""
        left = max(0, int(seconds))
        parts: list[tuple[int, str]] = []
        for size, *names in _UNITS:
            count, left = divmod(left, size)
            if parts or count or size == 1:
                one, many = names[LANGUAGES.index(self.language)]
                parts.append((count, one if count == 1 else many))
            if len(parts) == 2 or (parts and size == 1):  # noqa: PLR2004 - a third unit tells nobody more
                break
        return " ".join(f"{count} {name}" for count, name in parts if count) or f"0 {parts[0][1]}"

    def why(self, verdict: str, recognised: str | None, before: str | None) -> str | None:
        """Return in words why a report changed nothing, None where it did or where there is nothing to say."""
        if verdict not in ("late", "refused", "unrecognised"):
            return None
        names = {"reported": self.status(recognised), "status": self.status(before)}
        return self.t[f"why_{verdict}"].format(**names)


IN_ALL: Final[dict[Language, Words]] = {
    language: Words(language, {name: words[index] for name, words in WORDS.items()})
    for index, language in enumerate(LANGUAGES)
}


def preferred(accept_language: str) -> Language:
    """Return the first language of ours that a browser names, Indonesian where it names none."""
    for part in accept_language.split(",")[:_RANGES_MAX]:
        tag = part.partition(";")[0].strip().lower().partition("-")[0]
        if tag in IN_ALL:
            return IN_ALL[tag].language
    return "id"


def iso(time: datetime) -> str:
    """Return a time by RFC 3339 in UTC, as machines read it."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
