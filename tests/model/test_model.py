"""The protocol of recording keeps its invariants in every interleaving, and needs each of its rules."""

import pytest

from tests.model.explore import explore
from tests.model.protocol import Disturbances, Rules
from tests.model.replay import replay
from tests.support.databases import TestServer

REPORTS = 3
# Each fix, the disturbances that show its lack soonest, and how many reports they need.
LEFT_OUT = {
    "the proof of what was seen": (Rules(proves=False), Disturbances(0, 0, 1, 0, 0), 2),
    "forgetting what was lost": (Rules(forgets=False), Disturbances(0, 1, 0, 0, 0), 3),
    "the search at each attempt": (Rules(searches_again=False), Disturbances(1, 0, 0, 0, 0), 1),
}


@pytest.mark.parametrize(
    "left",
    [
        Disturbances(cuts=1, failovers=1, restores=0, refusals=0, erasures=0),
        Disturbances(cuts=1, failovers=0, restores=1, refusals=0, erasures=0),
        Disturbances(cuts=0, failovers=0, restores=0, refusals=2, erasures=1),
    ],
    ids=["a failover", "a restore", "refusals"],
)
def test_no_interleaving_breaks_an_invariant(left: Disturbances) -> None:
    """Two processes, two orders and three reports: every state that one kind of loss can lead to is sound."""
    exploration = explore(Rules(), REPORTS, left)
    assert exploration.violations == []


@pytest.mark.long
def test_no_interleaving_of_all_disturbances_breaks_an_invariant() -> None:
    """The same with a cut connection, a failover, a restore, a refusal and an erasure, in any sequence."""
    exploration = explore(Rules(), REPORTS)
    print(f"{exploration.states:,} states in {exploration.seconds:.0f} s")  # noqa: T201 - a figure of the docs
    assert exploration.violations == []


def test_a_report_is_begun_late_without_its_rule() -> None:
    """Without the rule that leaves answered reports out, the model begins one."""
    exploration = explore(Rules(leaves_out=False), 1)
    assert exploration.violations == ["the report 0 was begun after its caller had been answered"]


@pytest.mark.parametrize("name", LEFT_OUT)
async def test_each_fix_is_needed(
    server: TestServer, dsn: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without a fix, the model finds a fault, and the same steps break the same invariant for real."""
    rules, left, reports = LEFT_OUT[name]
    exploration = explore(rules, reports, left)
    print(*exploration.trace, *exploration.violations, sep="\n")  # noqa: T201 - the shortest trace, for its reader
    assert exploration.violations
    assert await replay(exploration, server, dsn, monkeypatch, rules) == exploration.violations


@pytest.mark.parametrize("name", LEFT_OUT)
async def test_the_same_steps_do_no_harm_with_the_fix(
    server: TestServer, dsn: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The real recorder as it is keeps the invariants in the steps that break them without the fix."""
    rules, left, reports = LEFT_OUT[name]
    exploration = explore(rules, reports, left)
    assert await replay(exploration, server, dsn, monkeypatch, Rules()) == []
