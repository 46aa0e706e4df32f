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


FAILOVER = Disturbances(cuts=1, failovers=1, restores=0, refusals=0, erasures=0)
RESTORE = Disturbances(cuts=1, failovers=0, restores=1, refusals=0, erasures=0)


@pytest.mark.parametrize(
    ("left", "keyed"),
    [
        pytest.param(FAILOVER, False, id="a failover"),
        pytest.param(RESTORE, False, id="a restore"),
        pytest.param(Disturbances(0, 0, 0, refusals=2, erasures=1), True, id="refusals"),
        pytest.param(FAILOVER, True, id="a failover, with keys", marks=pytest.mark.long),
        pytest.param(RESTORE, True, id="a restore, with keys", marks=pytest.mark.long),
        # 8.8 million states, in about eight minutes and 5 GB.
        pytest.param(
            *(Disturbances(), True),
            id="all disturbances, with keys",
            marks=[pytest.mark.long, pytest.mark.timeout(3_600)],
        ),
    ],
)
def test_no_interleaving_breaks_an_invariant(left: Disturbances, *, keyed: bool) -> None:
    """Two processes, two orders and three reports: every state that can be reached is sound."""
    exploration = explore(Rules(), REPORTS, left, keyed=keyed)
    print(f"{exploration.states:,} states in {exploration.seconds:.0f} s")  # noqa: T201 - a figure of the docs
    assert exploration.violations == []


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        pytest.param(Rules(keeps_proof=False), RESTORE, id="a later proof"),
        pytest.param(Rules(moves_forward=False), RESTORE, id="an earlier commit"),
        pytest.param(Rules(tells_apart=False), FAILOVER, id="the report again", marks=pytest.mark.long),
    ],
)
def test_each_further_rule_is_needed(rules: Rules, left: Disturbances) -> None:
    """Without one of the rules that reports with keys and late statements call for, the model finds a fault."""
    assert explore(rules, REPORTS, left).violations


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
    exploration = explore(rules, reports, left, keyed=False)
    print(*exploration.trace, *exploration.violations, sep="\n")  # noqa: T201 - the shortest trace, for its reader
    assert exploration.violations
    assert await replay(exploration, server, dsn, monkeypatch, rules) == exploration.violations


@pytest.mark.parametrize("name", LEFT_OUT)
async def test_the_same_steps_do_no_harm_with_the_fix(
    server: TestServer, dsn: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The real recorder as it is keeps the invariants in the steps that break them without the fix."""
    rules, left, reports = LEFT_OUT[name]
    exploration = explore(rules, reports, left, keyed=False)
    assert await replay(exploration, server, dsn, monkeypatch, Rules()) == []
