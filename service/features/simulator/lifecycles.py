"""The reports of simulated orders: seeded random lives, and the troubles on the reports' way, as plain data.

NEXT and WORDS define the probability of each next status and the words for it. Tests judge every move by the
transition table, so that all of them stay legal.
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
# Komerce documents PUT in its samples and POST in its tips.
METHODS: Final[tuple[Method, ...]] = ("PUT", "POST")

# Of 100 orders in a status, how many move to each next one. The others end there. Couriers skip stages.
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
# Limits loops, such as repeated delivery attempts.
STEPS_MAX: Final = 20

# The Indonesian and the English words of each status. The reports of an order are mostly in one language.
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
# The documented list of words ends with "etc.".
UNKNOWN_WORDS: Final = ("Antar Ulang", "Menunggu Kurir", "On Hold")
OTHER_LANGUAGE_SHARE: Final = 0.05

STEP_HOURS: Final = (1.0, 30.0)
LAST_STEP_HOURS_AGO: Final = 48.0
# How many places a reordered or a delayed report moves back among its order's reports.
REORDERED_BY: Final = 1.5
DELAYED_BY: Final = (2.0, 6.0)
# How soon an attempt is cut off: before, during or after the service's commit.
PATIENCE_SECONDS: Final = (0.0, 0.02)
# Western Indonesia Time.
WIB: Final = timezone(timedelta(hours=7))


@dataclass(frozen=True)
class Troubles:
    """The troubles on the way, each as a share of the reports, from 0 to 1.

    Attributes:
        lost: never sent.
        doubled: sent twice, at the same time or with the next report in between.
        delayed: sent after several of the reports that should follow.
        reordered: sent after the report that should follow.
        hung_up: cut off before the response, then sent again.
        unknown: sent with a word outside the vocabulary.
    """

    lost: float = 0.0
    doubled: float = 0.0
    delayed: float = 0.0
    reordered: float = 0.0
    hung_up: float = 0.0
    unknown: float = 0.0


class Push(NamedTuple):
    """A report, identified by its body. ``patience_seconds`` limits its first attempt; None for no limit."""

    body: str
    method: Method
    patience_seconds: float | None = None


class Journey(NamedTuple):
    """The pushes of an order, turn by turn; those of one turn are sent at the same time."""

    order_no: str
    turns: tuple[tuple[Push, ...], ...]
    reports_withheld: int


@dataclass(frozen=True)
class Plan:
    """A run of the simulator. The n-th journey of a seed is always the same, whatever the number of orders.

    Args:
        seed: the random seed.
        started: when the run began. The order numbers contain it, so that two runs never share an order.
        methods: the HTTP methods; each push takes one of them at random.
        troubles: the troubles on the way.
    """

    seed: int
    started: datetime
    methods: tuple[Method, ...] = METHODS
    troubles: Troubles = Troubles()

    @property
    def prefix(self) -> str:
        """The beginning of this run's order numbers, and of no other run's."""
        return f"KOM{self.started.astimezone(UTC):%y%m%d%H%M%S%f}-"

    def journeys(self, orders: int) -> Iterator[Journey]:
        """Yield one journey for each order."""
        for number in range(1, orders + 1):
            yield self._journey(number, Random(f"{self.seed}/{number}"))  # noqa: S311 - not a secret  # nosec B311

    def _journey(self, number: int, chance: Random) -> Journey:
        troubles = self.troubles
        order_no = f"{self.prefix}{number:06}"
        # Drawn before any trouble, so that the troubles do not change an order's life.
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
            delay = REORDERED_BY if chance.random() < troubles.reordered else 0
            delay += chance.uniform(*DELAYED_BY) if chance.random() < troubles.delayed else 0
            patience = chance.uniform(*PATIENCE_SECONDS) if chance.random() < troubles.hung_up else None
            places[place + delay].append(push._replace(patience_seconds=patience))
        return Journey(order_no, tuple(tuple(places[place]) for place in sorted(places)), withheld)

    def _bodies(self, order_no: str, chance: Random) -> Iterator[str]:
        statuses = list(life(chance))
        now = self.started - timedelta(hours=chance.uniform(0, LAST_STEP_HOURS_AGO))
        now -= timedelta(hours=STEP_HOURS[1] * len(statuses))
        main_language = chance.randrange(2)
        cnote = ""
        for step, status in enumerate(statuses, 1):
            now += timedelta(hours=chance.uniform(*STEP_HOURS))
            # The courier assigns the airway bill, and a return may get a new one.
            is_new = status == "returning" and chance.random() < 0.5  # noqa: PLR2004 - half of them
            if is_new or (not cnote and status not in ("submitted", "packed", "cancelled")):
                cnote = f"JX{chance.randrange(10**10):010}"
            is_other = chance.random() < OTHER_LANGUAGE_SHARE
            language = 1 - main_language if is_other else main_language
            is_unknown = chance.random() < self.troubles.unknown
            word = chance.choice(UNKNOWN_WORDS if is_unknown else WORDS[status][language])
            timestamp = now.astimezone(WIB).isoformat(timespec="seconds")
            report = {"order_no": order_no, "cnote": cnote, "status": word, "timestamp": timestamp}
            yield json.dumps({**report, "mark": f"{order_no}/{step}"})


def life(chance: Random) -> Iterator[Status]:
    """Yield the statuses of an order's life; each differs from the one before."""
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
