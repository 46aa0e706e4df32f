"""What a simulated Komerce has to tell: seeded lives of orders, and what goes wrong with them, as plain data.

Where an order may go from where it stands, and the words for it, are chances written down here. That every move
is a legal one is left to the tests, which judge each by the transition table.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from random import Random
from typing import Final, Literal, NamedTuple

from domain.statuses import Status
from domain.transitions import Leg, Origin, judge

Method = Literal["PUT", "POST"]
# The sender documents PUT in its samples and POST in its tips.
METHODS: Final[tuple[Method, ...]] = ("PUT", "POST")

# Out of how many orders how many go which way; what is missing from 100 ends there. Couriers leave stages out.
NEXT: Final[dict[Origin, dict[Status, int]]] = {
    (None, None): {"submitted": 96, "packed": 3, "in_transit": 1},
    ("submitted", None): {"packed": 60, "picked_up": 25, "in_transit": 5, "cancelled": 10},
    ("packed", None): {"picked_up": 85, "in_transit": 8, "problem": 3, "cancelled": 4},
    ("picked_up", None): {"in_transit": 97, "problem": 2, "cancelled": 1},
    ("in_transit", None): {"out_for_delivery": 82, "delivered": 8, "problem": 6, "lost": 2, "damaged": 1},
    ("out_for_delivery", None): {"delivered": 84, "in_transit": 4, "problem": 12},
    ("problem", "before_transit"): {"picked_up": 60, "in_transit": 20, "cancelled": 20},
    ("problem", "on_the_way_out"): {"out_for_delivery": 55, "delivered": 10, "returning": 30, "lost": 3},
    ("problem", "on_the_way_back"): {"returning": 80, "lost": 10},
    ("delivered", None): {"completed": 88, "returning": 3},
    ("completed", None): {"returning": 2},
    ("returning", None): {"returned": 88, "problem": 6, "lost": 2},
    ("lost", None): {"in_transit": 20},
    ("damaged", None): {"returning": 50},
}
# Loops, such as one delivery attempt after another, come to an end.
STEPS_MAX: Final = 20

# An order is mostly told in one language, and in any of its words.
WORDS: Final[dict[Status, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "submitted": (("Diajukan",), ("Created", "Submitted")),
    "packed": (("Dipacking", "Dikemas"), ("Packed", "Packing")),
    "picked_up": (("Dijemput",), ("Pickup", "Picked Up", "PICK_UP")),
    "in_transit": (("Dikirim",), ("Sent", "Shipped", "In Transit", "ON_PROCESS")),
    "out_for_delivery": (("Diantar",), ("Delivery", "Out for Delivery")),
    "problem": (("Kendala", "Bermasalah"), ("Problem",)),
    "delivered": (("Diterima", "Terkirim"), ("Received", "Delivered")),
    "completed": (("Selesai",), ("Completed", "Done")),
    "returning": (("Retur",), ("Return", "Returning")),
    "returned": (("Retur Diterima",), ("Return Done", "Returned")),
    "cancelled": (("Dibatalkan", "Batal"), ("Canceled", "Cancelled")),
    "lost": (("Hilang",), ("Lost",)),
    "damaged": (("Rusak",), ("Damaged",)),
}
# "etc." stands at the end of the documented list.
UNKNOWN_WORDS: Final = ("Antar Ulang", "Menunggu Kurir", "On Hold")
OTHER_LANGUAGE_SHARE: Final = 0.05

STEP_HOURS: Final = (1.0, 30.0)
LAST_STEP_HOURS_AGO: Final = 48.0
# By how many of its order's reports one is overtaken.
REORDERED_BY: Final = 1.5
DELAYED_BY: Final = (2.0, 6.0)
# How soon a hasty attempt is hung up: before, while or after the service commits.
PATIENCE_SECONDS: Final = (0.0, 0.02)
# Western Indonesia Time.
WIB: Final = timezone(timedelta(hours=7))


@dataclass(frozen=True)
class Troubles:
    """What goes wrong on the way, each as a share of the reports, from 0 to 1.

    Attributes:
        lost: never sent.
        doubled: sent twice, both at once or the copy after the next report.
        delayed: sent after several of the reports that should follow it.
        reordered: sent after the one that should follow it.
        hung_up: the connection is cut before the answer can come, and the report is sent again.
        unknown: a word outside the vocabulary.
    """

    lost: float = 0.0
    doubled: float = 0.0
    delayed: float = 0.0
    reordered: float = 0.0
    hung_up: float = 0.0
    unknown: float = 0.0


class Push(NamedTuple):
    """One report that is to be sent until it is acknowledged. The body tells it from all others.

    ``patience_seconds``: after how long the first attempt is hung up; None where its answer is waited for.
    """

    body: str
    method: Method
    patience_seconds: float | None = None


class Journey(NamedTuple):
    """One order: its pushes, those of a turn at once, a turn after the other; and how many are never sent."""

    order_no: str
    turns: tuple[tuple[Push, ...], ...]
    withheld: int


@dataclass(frozen=True)
class Plan:
    """A run of the simulator: a number's journey is the same for a seed, whatever the other numbers are.

    Args:
        seed: of every chance.
        started: when the run began. It names the orders, so that no two runs tell of the same.
        methods: to push with, any of them.
        troubles: what goes wrong.
    """

    seed: int
    started: datetime
    methods: tuple[Method, ...] = METHODS
    troubles: Troubles = Troubles()

    @property
    def prefix(self) -> str:
        """What the numbers of this run's orders begin with, and no others."""
        return f"KOM{self.started.astimezone(UTC):%y%m%d%H%M%S%f}-"

    def journeys(self, orders: int) -> Iterator[Journey]:
        """Yield as many journeys as there are orders."""
        for number in range(1, orders + 1):
            yield self._journey(number, Random(f"{self.seed}/{number}"))  # noqa: S311 - chances, no secrets  # nosec B311

    def _journey(self, number: int, chance: Random) -> Journey:
        troubles = self.troubles
        order_no = f"{self.prefix}{number:06}"
        # Its life comes first: no trouble changes it.
        bodies = list(self._bodies(order_no, chance))
        places: defaultdict[float, list[Push]] = defaultdict(list)
        withheld = 0
        for place, body in enumerate(bodies):
            push = Push(body, chance.choice(self.methods))
            if chance.random() < troubles.lost:
                withheld += 1
                continue
            if chance.random() < troubles.doubled:
                places[place + chance.choice((0, REORDERED_BY))].append(push)
            late = REORDERED_BY if chance.random() < troubles.reordered else 0
            late += chance.uniform(*DELAYED_BY) if chance.random() < troubles.delayed else 0
            patience = chance.uniform(*PATIENCE_SECONDS) if chance.random() < troubles.hung_up else None
            places[place + late].append(push._replace(patience_seconds=patience))
        return Journey(order_no, tuple(tuple(places[place]) for place in sorted(places)), withheld)

    def _bodies(self, order_no: str, chance: Random) -> Iterator[str]:
        statuses = list(life(chance))
        now = self.started - timedelta(hours=chance.uniform(0, LAST_STEP_HOURS_AGO))
        now -= timedelta(hours=STEP_HOURS[1] * len(statuses))
        language = chance.randrange(2)
        cnote = ""
        for step, status in enumerate(statuses, 1):
            now += timedelta(hours=chance.uniform(*STEP_HOURS))
            # The airway bill comes with the courier, and a return may get one of its own.
            is_new = status == "returning" and chance.random() < 0.5  # noqa: PLR2004 - half of them
            if is_new or (not cnote and status not in ("submitted", "packed", "cancelled")):
                cnote = f"JX{chance.randrange(10**10):010}"
            spoken = 1 - language if chance.random() < OTHER_LANGUAGE_SHARE else language
            is_unknown = chance.random() < self.troubles.unknown
            word = chance.choice(UNKNOWN_WORDS if is_unknown else WORDS[status][spoken])
            timestamp = now.astimezone(WIB).isoformat(timespec="seconds")
            told = {"order_no": order_no, "cnote": cnote, "status": word, "timestamp": timestamp}
            yield json.dumps({**told, "mark": f"{order_no}/{step}"})


def life(chance: Random) -> Iterator[Status]:
    """Yield the statuses that an order goes through, each another than the one before it."""
    status: Status | None = None
    leg: Leg | None = None
    for _ in range(STEPS_MAX):
        ways = NEXT.get((status, leg), {})
        stays = 100 - sum(ways.values())
        (reported,) = chance.choices([*ways, None], [*ways.values(), stays])
        if reported is None:
            return
        leg = judge(status, leg, reported).leg
        status = reported
        yield status
