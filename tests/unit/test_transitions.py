"""Every cell of the table in docs/statuses.md against the code's verdict."""

from typing import get_args

import pytest

from domain.statuses import HAPPY_PATH, STATUSES, Status
from domain.transitions import TABLE, Leg, Verdict, judge
from service.api.audit import make_rules
from service.vocabulary import VocabularyFile
from tests.support import written_law
from tests.support.examples import history
from tests.support.written_law import CELLS, Cell

VERDICT_OF = {"A": "advanced", "S": "advanced", "=": "repeated", "L": "late", "R": "refused"}
ORIGINS = list(dict.fromkeys((cell.status, cell.leg) for cell in CELLS))


def skipped_by_the_written_rule(cell: Cell) -> list[Status]:
    """Compute the skipped stages by the rule under "Skipped stages", in another way than the code's."""
    if cell.letter != "S":
        return []
    ranks = {status: rank for rank, status in enumerate(written_law.HAPPY_PATH)}
    beside_the_path = {"problem", "lost", "damaged", "returning"}
    assert cell.status is not None
    stands_at = ranks["out_for_delivery" if cell.status in beside_the_path else cell.status]
    if cell.reported in ranks:
        return [stage for stage, rank in ranks.items() if stands_at < rank < ranks[cell.reported]]
    assert cell.reported in {"returning", "lost", "damaged", "returned"}
    skipped = [stage for stage, rank in ranks.items() if stands_at < rank <= ranks["in_transit"]]
    return [*skipped, "returning"] if cell.reported == "returned" else skipped


def test_the_page_has_every_cell() -> None:
    """The page's table is complete: 16 rows of 13 statuses, each combination once."""
    assert len(CELLS) == 16 * 13
    assert len({(cell.status, cell.leg, cell.reported) for cell in CELLS}) == 16 * 13
    assert {cell.letter for cell in CELLS} == set("AS=LR")


def test_the_code_has_no_other_rows() -> None:
    """The code's table has exactly the rows of the page, in the page's order."""
    assert list(TABLE) == ORIGINS


def test_the_happy_path_is_the_written_one() -> None:
    """The code's happy path has the stages of the page, in its order."""
    assert list(HAPPY_PATH) == written_law.HAPPY_PATH


def test_the_verdicts_are_the_written_ones() -> None:
    """The code has the verdicts of the page, in its order."""
    assert list(get_args(Verdict)) == written_law.VERDICTS


def leg_by_the_written_rule(cell: Cell) -> Leg | None:
    """Compute the leg: a problem has the leg of the status before it, and a report that does not advance keeps
    the leg.
    """
    if VERDICT_OF[cell.letter] != "advanced":
        return cell.leg
    return written_law.LEG_AFTER[cell.status] if cell.reported == "problem" else None


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_a_cell_is_judged_as_it_is_written(cell: Cell) -> None:
    """Verdict, skipped stages, leg and reason agree with the page; the reason names both statuses."""
    judgement = judge(cell.status, cell.leg, cell.reported)
    assert judgement.verdict == VERDICT_OF[cell.letter]
    assert list(judgement.skipped) == skipped_by_the_written_rule(cell)
    assert bool(judgement.skipped) == (cell.letter == "S")
    assert judgement.leg == leg_by_the_written_rule(cell)
    if cell.letter in "LR":
        assert judgement.reason is not None
        assert cell.reported in judgement.reason
        assert str(cell.status) in judgement.reason
    else:
        assert judgement.reason is None


@pytest.mark.parametrize(("status", "leg"), ORIGINS)
def test_a_string_outside_the_vocabulary_is_unrecognised_everywhere(
    status: Status | None, leg: Leg | None
) -> None:
    """An unrecognised report has a reason, skips no stage, and never changes the status or the leg."""
    verdict, leg_after, skipped, reason = judge(status, leg, None)
    assert verdict == "unrecognised"
    assert leg_after == leg
    assert skipped == ()
    assert reason


@pytest.mark.parametrize(
    ("skipping", "skipped"),
    [
        (("lost", "completed"), ["delivered"]),
        (("submitted", "returned"), ["packed", "picked_up", "in_transit", "returning"]),
        (("submitted", "lost"), ["packed", "picked_up", "in_transit"]),
        (("delivered", "returned"), ["returning"]),
        (("in_transit", "completed"), ["out_for_delivery", "delivered"]),
        (("picked_up", "returning"), []),
    ],
)
def test_examples_of_skipped_stages(skipping: tuple[Status, Status], skipped: list[str]) -> None:
    """The page's own examples, and further ones computed by hand, skip the expected stages."""
    status, reported = skipping
    assert list(judge(status, None, reported).skipped) == skipped


@pytest.mark.parametrize(
    ("reports", "verdict"),
    [
        (("Delivering", "Sent", "Delivering"), "advanced"),
        (("Packed", "Sent", "Packed"), "late"),
        (("Cancelled", "Sent", "Cancelled"), "repeated"),
    ],
    ids=["both advanced", "the second advanced", "the second was refused"],
)
def test_a_b_a_is_judged_by_the_table(reports: tuple[str, ...], verdict: str) -> None:
    """A status that is reported again is a repeat only if the report between did not advance."""
    assert history(*reports)[-1].verdict == verdict


def test_the_served_rules_are_the_written_ones() -> None:
    """GET /transitions returns the verdict and the skipped stages of each cell of the page's table."""
    served = {
        (row["from"], row["leg"], reported): (cell["verdict"], list(cell["skipped"]))
        for row in make_rules(VocabularyFile())["table"]
        for reported, cell in row["to"].items()
    }
    assert served == {
        (cell.status, cell.leg, cell.reported): (VERDICT_OF[cell.letter], skipped_by_the_written_rule(cell))
        for cell in CELLS
    }


def test_the_served_statuses_are_the_written_ones() -> None:
    """GET /transitions returns the page's vocabulary, with the rank of each status on the happy path."""
    assert [
        (
            served["status"],
            served["label"]["id"],
            served["label"]["en"],
            tuple(served["aliases"]),
            served["settled"],
            served["rank"],
        )
        for served in make_rules(VocabularyFile())["statuses"]
    ] == [
        (*word, written_law.HAPPY_PATH.index(word.status) if word.status in written_law.HAPPY_PATH else None)
        for word in written_law.VOCABULARY
    ]


def test_the_columns_are_the_statuses() -> None:
    """The page's columns are in the order of the vocabulary."""
    assert list(written_law.COLUMNS.values()) == list(STATUSES)
    assert [cell.reported for cell in CELLS[: len(STATUSES)]] == list(STATUSES)
