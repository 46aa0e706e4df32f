"""The vocabulary: what the sender's many words for a status mean.

Source of every word: ``docs/statuses.md``, which a test holds against this module.
"""

import re
from functools import lru_cache
from typing import Final, Literal, NamedTuple, get_args

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


class Label(NamedTuple):
    """What a person reads, in Indonesian and in English."""

    id: str
    en: str


LABELS: Final[dict[Status, Label]] = {
    "submitted": Label("Diajukan", "Submitted"),
    "packed": Label("Dipacking", "Packed"),
    "picked_up": Label("Dijemput", "Picked up"),
    "in_transit": Label("Dikirim", "In transit"),
    "out_for_delivery": Label("Diantar", "Out for delivery"),
    "problem": Label("Bermasalah", "Problem"),
    "delivered": Label("Diterima", "Delivered"),
    "completed": Label("Selesai", "Completed"),
    "returning": Label("Retur", "Returning"),
    "returned": Label("Retur diterima", "Returned"),
    "cancelled": Label("Dibatalkan", "Cancelled"),
    "lost": Label("Hilang", "Lost"),
    "damaged": Label("Rusak", "Damaged"),
}

ALIASES: Final[dict[Status, tuple[str, ...]]] = {
    "submitted": ("diajukan", "created", "submitted"),
    "packed": ("dipacking", "dikemas", "packing", "packed"),
    "picked_up": ("dijemput", "pickup", "pick up", "picked up"),
    "in_transit": ("dikirim", "sent", "shipped", "in transit", "process", "on process"),
    "out_for_delivery": ("diantar", "delivery", "delivering", "out for delivery"),
    "problem": ("problem", "kendala", "bermasalah"),
    "delivered": ("diterima", "received", "delivered", "terkirim"),
    "completed": ("selesai", "completed", "done"),
    # A bare "Retur" is ambiguous; it is read as "on its way back".
    "returning": ("retur", "return", "returning"),
    "returned": ("retur diterima", "return done", "returned"),
    "cancelled": ("dibatalkan", "batal", "canceled", "cancelled"),
    "lost": ("hilang", "lost"),
    "damaged": ("rusak", "damaged"),
}

_MEANINGS: Final[dict[str, Status]] = {
    alias: status for status, aliases in ALIASES.items() for alias in aliases
}
_SEPARATORS: Final = re.compile(r"[\s_-]+")

# Spellings seen lately; the sender has a few dozen, so more would only serve an attacker.
SPELLINGS_MAX: Final = 1_024


@lru_cache(maxsize=SPELLINGS_MAX)
def recognise(reported: str) -> Status | None:
    """Return the status that a reported string means, or None outside the vocabulary.

    Case, surrounding space, and how words are separated (``_``, ``-``, any white space) do not count.
    """
    return _MEANINGS.get(_SEPARATORS.sub(" ", reported.casefold()).strip())
