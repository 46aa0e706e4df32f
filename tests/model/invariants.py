"""The invariants of recording, for the model's logs and for real ones. docs/architecture.md states them."""

from collections import Counter
from collections.abc import Collection, Hashable, Sequence
from typing import Final, NamedTuple

# What an order's first event is judged from.
NOTHING: Final = None


class Fact(NamedTuple):
    """A recorded event, reduced to what the invariants are about.

    Attributes:
        order: the order.
        version: the event's number among the order's events.
        report: the id of the report.
        judged_from: the state that the report was judged from.
        leaves: the state of the order after the event.
    """

    order: Hashable
    version: int
    report: Hashable
    judged_from: Hashable
    leaves: Hashable


def violations(
    log: Sequence[Fact], acknowledged: Collection[Hashable], lost: Collection[Hashable]
) -> list[str]:
    """Return which invariants a log breaks, and where.

    Args:
        log: the events, in the order of their positions.
        acknowledged: the reports whose senders got 200.
        lost: the reports that the log had, and that a failover or a restore took from it.
    """
    broken = []
    times = Counter(fact.report for fact in log)
    broken += [
        f"the report {report} is in the log {count} times" for report, count in times.items() if count > 1
    ]
    broken += [
        f"the report {report} is acknowledged, but neither in the log nor lost with it"
        for report in acknowledged
        if report not in times and report not in lost
    ]
    last: dict[Hashable, Fact] = {}
    for fact in log:
        before = last.get(fact.order)
        version, state = (0, NOTHING) if before is None else (before.version, before.leaves)
        if fact.version != version + 1:
            broken.append(f"version {fact.version} of the order {fact.order} follows version {version}")
        elif fact.judged_from != state:
            broken.append(
                f"version {fact.version} of the order {fact.order} was not judged from version {version}"
            )
        last[fact.order] = fact
    return broken
