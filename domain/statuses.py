"""The vocabulary: the statuses, their labels, and the sender's words for each.

Every word comes from ``docs/statuses.md``; a test compares it with this module.
"""

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Final, Literal, TypeAlias, cast, get_args

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

Status = Literal[
    "submitted",
    "packed",
    "picked_up",
    "in_transit",
    "out_for_delivery",
    "problem",
    "delivered",
    "completed",
    "returning",
    "returned",
    "cancelled",
    "lost",
    "damaged",
]

STATUSES: Final[tuple[Status, ...]] = get_args(Status)

HAPPY_PATH: Final[tuple[Status, ...]] = (
    "submitted",
    "packed",
    "picked_up",
    "in_transit",
    "out_for_delivery",
    "delivered",
    "completed",
)

SETTLED: Final[frozenset[Status]] = frozenset(
    {"delivered", "completed", "returned", "cancelled", "lost", "damaged"}
)


class Label(TypedDict):
    """A status as people read it, in Indonesian and in English."""

    id: str
    en: str


LABELS: Final[dict[Status, Label]] = {
    "submitted": {"id": "Diajukan", "en": "Submitted"},
    "packed": {"id": "Dipacking", "en": "Packed"},
    "picked_up": {"id": "Dijemput", "en": "Picked up"},
    "in_transit": {"id": "Dikirim", "en": "In transit"},
    "out_for_delivery": {"id": "Diantar", "en": "Out for delivery"},
    "problem": {"id": "Bermasalah", "en": "Problem"},
    "delivered": {"id": "Diterima", "en": "Delivered"},
    "completed": {"id": "Selesai", "en": "Completed"},
    "returning": {"id": "Retur", "en": "Returning"},
    "returned": {"id": "Retur diterima", "en": "Returned"},
    "cancelled": {"id": "Dibatalkan", "en": "Cancelled"},
    "lost": {"id": "Hilang", "en": "Lost"},
    "damaged": {"id": "Rusak", "en": "Damaged"},
}


# A log may hold a status that this release does not have.
_LABELS: Final = cast("Mapping[str | None, Label]", LABELS)


def status_label(status: str | None) -> Label | None:
    """Return the label of a status, None if there is no status or this release does not have it."""
    return _LABELS.get(status)


ALIASES: Final[dict[Status, tuple[str, ...]]] = {
    "submitted": ("diajukan", "created", "submitted"),
    "packed": ("dipacking", "dikemas", "packing", "packed"),
    "picked_up": ("dijemput", "pickup", "pick up", "picked up"),
    "in_transit": ("dikirim", "sent", "shipped", "in transit", "process", "on process"),
    "out_for_delivery": ("diantar", "delivery", "delivering", "out for delivery"),
    "problem": ("problem", "kendala", "bermasalah"),
    "delivered": ("diterima", "received", "delivered", "terkirim"),
    "completed": ("selesai", "completed", "done"),
    # A bare "Retur" is ambiguous. It is taken to mean that the return has begun.
    "returning": ("retur", "return", "returning"),
    "returned": ("retur diterima", "return done", "returned"),
    "cancelled": ("dibatalkan", "batal", "canceled", "cancelled"),
    "lost": ("hilang", "lost"),
    "damaged": ("rusak", "damaged"),
}

_SEPARATORS: Final = re.compile(r"[\s_-]+")

# The sender has a few dozen spellings; a larger cache would only serve an attacker.
SPELLINGS_MAX: Final = 1_024

# Returns the status that a reported string means, None if it is outside the vocabulary.
Recognise: TypeAlias = Callable[[str], Status | None]


def normalise(word: str) -> str:
    """Return a word without the differences that have no meaning.

    Case, surrounding spaces and the word separator (``_``, ``-`` or any white space) make no difference.
    """
    return _SEPARATORS.sub(" ", word.casefold()).strip()


class Vocabulary:
    """The sender's words and their meanings: those of this release, and further ones.

    Args:
        own_words: further words and their meanings.

    Attributes:
        own_words: the further words, normalised.

    Raises:
        ValueError: a further word is blank, or has two meanings. ``str()`` names it.
    """

    def __init__(self, own_words: Mapping[str, Status] | None = None) -> None:
        meanings: dict[str, Status] = {alias: status for status, words in ALIASES.items() for alias in words}
        self.own_words: dict[str, Status] = {}
        for spelling, status in (own_words or {}).items():
            word = normalise(spelling)
            if not word:
                raise ValueError(f"{spelling!r} is blank: expected a status word of the sender")
            if meanings.setdefault(word, status) != status:
                raise ValueError(f"{spelling!r} already means {meanings[word]}, so it cannot mean {status}")
            if word not in ALIASES[status]:
                self.own_words[word] = status

        @lru_cache(maxsize=SPELLINGS_MAX)
        def recognise(reported: str) -> Status | None:
            return meanings.get(normalise(reported))

        self.recognise: Recognise = recognise

    def words(self, status: Status) -> list[str]:
        """Return all words that mean a status, this release's first."""
        return [*ALIASES[status], *(word for word, meaning in self.own_words.items() if meaning == status)]


# The words of this release alone.
STANDARD_VOCABULARY: Final = Vocabulary()
