"""The window of a subscription: order within each order, and the place up to which everything is done."""

import random
from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from service.event_log.follow import Place
from service.features.subscriptions.window import EVENTS_MAX, Entry, Message, Window


def message(order_no: str, version: int) -> Message:
    """Return a message of an order."""
    return Message(order_no, version, f"msg_{order_no}_{version}", b"{}", None)


def test_an_order_has_one_event_in_flight() -> None:
    """The next event of an order can start only when its previous one is done; other orders go on."""
    window = Window(Place(10, "r10"))
    for position, order_no, version in ((11, "A", 1), (12, "A", 2), (13, "B", 1)):
        window.add(Place(position, f"r{position}"), message(order_no, version))
    window.pass_over(Place(14, "r14"))
    first, other = window.start(), window.start()
    assert first is not None
    assert other is not None
    assert (first.message.order_no, other.message.order_no, window.start()) == ("A", "B", None)
    assert window.finish(other) == 0
    assert window.done == Place(10, "r10")
    assert window.finish(first) == 1
    assert window.done == Place(11, "r11")
    second = window.start()
    assert second is not None
    assert window.finish(second) == 2
    assert window.done == Place(14, "r14")
    assert window.first is None


def test_a_held_order_leaves_the_window() -> None:
    """All of its events count as done, since the held order stands for them."""
    window = Window(Place(0, None))
    for version in (1, 2, 3):
        window.add(Place(version, "r"), message("A", version))
    started = window.start()
    assert started is not None
    assert window.release("A") == 1
    assert window.done.position == 3
    assert window.start() is None
    assert window.release("A") == 0


def test_a_postponed_event_waits_for_its_order() -> None:
    """It can be started again once its order is ready."""
    window = Window(Place(0, None))
    window.add(Place(1, "r"), message("A", 1))
    entry = window.start()
    assert entry is not None
    window.postpone(entry)
    assert window.start() is None
    window.resume("B")
    window.resume("A")
    assert window.start() is entry


def test_the_window_is_limited() -> None:
    """It is full at its maximum of events, and of bytes."""
    window = Window(Place(0, None))
    for number in range(EVENTS_MAX):
        assert not window.is_full
        window.add(Place(number + 1, "r"), message(f"A{number}", 1))
    assert window.is_full
    large = Window(Place(0, None))
    large.add(Place(1, "r"), message("A", 1)._replace(body=bytes(4 * 1024 * 1024)))
    assert large.is_full


@given(st.lists(st.sampled_from("ABCD"), max_size=60), st.integers(0, 2**32))
def test_any_interleaving(orders: list[str], seed: int) -> None:
    """In any interleaving, each order's events start in order and alone, and nothing that is open is passed."""
    chance = random.Random(seed)
    window = Window(Place(0, None))
    versions: defaultdict[str, int] = defaultdict(int)
    open_positions: dict[int, str] = {}
    in_flight: list[Entry] = []
    last: defaultdict[str, int] = defaultdict(int)
    position = 0
    waiting = [*orders]
    while waiting or in_flight or open_positions:
        action = chance.randrange(4)
        if action == 0 and waiting:
            position += 1
            order_no = waiting.pop(0)
            versions[order_no] += 1
            if chance.random() < 0.2:
                window.pass_over(Place(position, "r"))
                versions[order_no] -= 1
                continue
            window.add(Place(position, "r"), message(order_no, versions[order_no]))
            open_positions[position] = order_no
        elif action == 1 and (entry := window.start()) is not None:
            assert entry.message.order_no not in {one.message.order_no for one in in_flight}
            assert entry.message.version == last[entry.message.order_no] + 1
            in_flight.append(entry)
        elif action == 2 and in_flight:
            entry = in_flight.pop(chance.randrange(len(in_flight)))
            window.finish(entry)
            last[entry.message.order_no] = entry.message.version
            del open_positions[entry.place.position]
        elif action == 3 and in_flight and chance.random() < 0.1:
            entry = in_flight.pop()
            order_no = entry.message.order_no
            window.release(order_no)
            open_positions = {at: name for at, name in open_positions.items() if name != order_no}
            last[order_no] = versions[order_no]
        assert window.done.position < min(open_positions, default=position + 1)
    assert window.done.position == position
