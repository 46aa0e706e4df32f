"""Large logs with skewed data, written by COPY: the domain decides on stories, and many orders repeat them."""

import random
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple
from uuid import UUID

import psycopg

from domain.order import NEW_ORDER, Arrival, Order, Report, decide, evolve
from service.event_log.codec import encode_event

COPY_EVENTS: Final = """
    COPY order_events (originator_id, originator_version, topic, state) FROM STDIN (FORMAT BINARY)
"""
DAYS: Final = 400
# Half of the orders come on these days, and none in the quiet ones.
SALE_DAYS: Final = range(300, 320)
QUIET_DAYS: Final = range(100, 130)
# In the middle of the log is a part whose times lie before all others.
EARLIER_SHARE: Final = 0.02
EARLIER_DAYS: Final = 300
EARLIER_AT_HOUR: Final = DAYS * 12
# The airway bill of orders without one.
NO_CNOTE: Final = "-"
NO_CNOTE_SHARE: Final = 0.05
# One order in this number waits for weeks between two reports.
SLOW_ORDERS: Final = 30

# What is reported of an order, and of how many orders in a thousand.
STORIES: Final[dict[tuple[str, ...], int]] = {
    ("Diajukan", "Dikemas", "Dijemput", "Dikirim", "Diterima", "Selesai"): 820,
    ("Diajukan", "Dikemas", "Dikirim", "Dikirim", "Diterima", "Selesai"): 60,
    ("Diajukan", "Dikemas", "Dijemput", "Dikirim"): 50,
    ("Diajukan",): 30,
    ("Diajukan", "Dikirim", "Bermasalah", "Retur", "Retur diterima"): 20,
    ("Diajukan", "Dikirim", "Dijemput", "Diterima", "Selesai"): 10,
    ("Diajukan", "Dibatalkan"): 5,
    ("Diajukan", "Dikirim", "Selesai", "Dibatalkan"): 2,
    ("Diajukan", "Entah di mana", "Dikirim"): 2,
    ("Diajukan", "Dikirim", "Hilang"): 1,
}
TOPIC: Final = Order.StatusReported.TOPIC


class _Row(NamedTuple):
    order_no: str
    version: int
    topic: str
    state: bytes


class _Story:
    """The encoded events of an order, with gaps for its number, its airway bill, their ids and their times."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self.templates: list[bytes] = []
        state = NEW_ORDER
        for step, word in enumerate(words):
            arrival = Arrival("<report_id>", datetime(1_000 + step, 1, 1, tzinfo=UTC), "127.0.0.1")
            body = f'{{"order_no": "<order_no>", "cnote": "<cnote>", "status": "{word}"}}'
            event = decide(state, Report(arrival, "<order_no>", word, "<cnote>", body))
            state = evolve(state, event)
            template = encode_event(event).replace(b"%", b"%%")
            for name in (b"report_id", b"order_no", b"cnote"):
                template = template.replace(b"<%s>" % name, b"%%(%s)s" % name)
            for earlier in range(step + 1):
                time = datetime(1_000 + earlier, 1, 1, tzinfo=UTC).isoformat().encode()
                template = template.replace(time, b"%%(%d)s" % earlier)
            self.templates.append(template)


class _Orders:
    """Orders whose reports are being written."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._stories = [_Story(words) for words in STORIES]
        self._weights = [*STORIES.values()]
        self._values: dict[int, dict[bytes, bytes]] = {}
        self._story_of: dict[int, _Story] = {}

    def steps(self, order: int) -> int:
        """Begin an order, and return the number of its reports."""
        (story,) = self._chance.choices(self._stories, self._weights)
        cnote = NO_CNOTE if self._chance.random() < NO_CNOTE_SHARE else f"AWB{order}"
        self._story_of[order] = story
        self._values[order] = {b"order_no": b"KOM%d" % order, b"cnote": cnote.encode()}
        return len(story.templates)

    def row(self, order: int, step: int, time: datetime) -> _Row:
        """Return an order's next event."""
        values, story = self._values[order], self._story_of[order]
        values[b"report_id"] = str(UUID(int=self._chance.getrandbits(128), version=4)).encode()
        values[b"%d" % step] = time.isoformat().encode()
        state = story.templates[step] % values
        if step + 1 == len(story.templates):
            del self._values[order], self._story_of[order]
        return _Row(f"KOM{order}", step + 1, TOPIC, state)


def events(orders: int, seed: int, end: datetime) -> Iterator[_Row]:
    """Yield the events of many orders in the order of a log that ends at a time.

    On average, an order has a little fewer than six events. Orders that began late are unfinished.
    """
    chance = random.Random(seed)
    begun = _Orders(chance)
    start = end - timedelta(days=DAYS)
    earlier = range(orders, orders + int(orders * EARLIER_SHARE))
    # The reports of each hour of the log: the second, the order, and which of its reports it is.
    reports: defaultdict[int, list[tuple[float, int, int]]] = defaultdict(list)
    for order, hour in enumerate(sorted(_hours(orders, chance))):
        reports[hour].append((chance.uniform(0, 3_600), order, -1))
    for hour in range(DAYS * 24):
        if hour == EARLIER_AT_HOUR:
            for order in earlier:
                at = start - timedelta(days=chance.uniform(1, EARLIER_DAYS))
                for step in range(begun.steps(order)):
                    yield begun.row(order, step, at + step * timedelta(hours=9))
        for second, order, step in sorted(reports.pop(hour, ())):
            if step == -1:
                pause = 24 * 20 if order % SLOW_ORDERS == 0 else 24
                due = hour
                for later in range(1, begun.steps(order)):
                    due += chance.randrange(1, pause)
                    reports[due].append((chance.uniform(0, 3_600), order, later))
            yield begun.row(order, max(0, step), start + timedelta(hours=hour, seconds=second))


def _hours(orders: int, chance: random.Random) -> Iterator[int]:
    """Yield the hour at which each order begins."""
    usual = [day for day in range(DAYS) if day not in QUIET_DAYS]
    for _ in range(orders):
        day = chance.choice(SALE_DAYS if chance.random() < 0.5 else usual)
        yield day * 24 + chance.randrange(24)


def fill_log(dsn: str, orders: int, seed: int = 0) -> int:
    """Append the events of many orders to an empty log, and return their number. The views are left behind."""
    number = 0
    with psycopg.connect(dsn, autocommit=True) as connection:
        with connection.cursor().copy(COPY_EVENTS) as copy:
            copy.set_types(["text", "bigint", "text", "bytea"])
            for row in events(orders, seed, datetime.now(UTC)):
                copy.write_row(row)
                number += 1
        # Do what autovacuum does.
        connection.execute("VACUUM (ANALYZE) order_events")
    return number


def long_order(connection: psycopg.Connection, order_no: str, events: int) -> None:
    """Append one order that is reported again and again, as a sender that repeats itself would do."""
    state, began = NEW_ORDER, datetime.now(UTC) - timedelta(days=1)
    with connection.cursor().copy(COPY_EVENTS) as copy:
        copy.set_types(["text", "bigint", "text", "bytea"])
        for number in range(events):
            arrival = Arrival(str(UUID(int=number)), began + timedelta(seconds=number))
            word = ("Dikirim", "Bermasalah")[number % 2]
            event = decide(state, Report(arrival, order_no, word, None, "{}"))
            state = evolve(state, event)
            copy.write_row((order_no, event.originator_version, TOPIC, encode_event(event)))
