"""The vocabulary: the statuses, their labels, and the sender's words for each.

Every word comes from ``docs/statuses.md``; a test compares it with this module.
"""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Literal, cast, get_args

from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

if TYPE_CHECKING:
    from collections.abc import Mapping

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

_MEANINGS: Final[dict[str, Status]] = {
    alias: status for status, aliases in ALIASES.items() for alias in aliases
}
_SEPARATORS: Final = re.compile(r"[\s_-]+")

# The sender has a few dozen spellings; a larger cache would only serve an attacker.
SPELLINGS_MAX: Final = 1_024


@lru_cache(maxsize=SPELLINGS_MAX)
def recognise(reported: str) -> Status | None:
    """Return the status that a reported string means, None if the string is outside the vocabulary.

    Case, surrounding spaces and the word separator (``_``, ``-`` or any white space) make no difference.
    """
    return _MEANINGS.get(_SEPARATORS.sub(" ", reported.casefold()).strip())
