"""The transition table, and the judgement of a report by it.

Every rule comes from ``docs/statuses.md``; a test compares it with this module cell by cell.
"""

from typing import Final, Literal, NamedTuple, get_args

from domain.statuses import HAPPY_PATH, STATUSES, Status

Verdict = Literal["advanced", "repeated", "late", "refused", "unrecognised"]
VERDICTS: Final[tuple[Verdict, ...]] = get_args(Verdict)

# A problem keeps the leg of the journey on which it arose: the leg decides which statuses may follow.
Leg = Literal["before_transit", "on_the_way_out", "on_the_way_back"]

# A row of the table: a status, a problem with its leg, or no status yet.
Origin = tuple[Status | None, Leg | None]

# Columns are in the order of STATUSES; "S" is advanced with skipped stages. _VERDICTS explains each cell.
TABLE: Final[dict[Origin, str]] = {
    #                                sub pack pick trans ofd prob deliv compl retg retd canc lost dmg
    (None, None):                   "A   A    A    A     A   A    A     A     A    A    A    A    A",
    ("submitted", None):            "=   A    A    S     S   A    S     S     S    S    A    S    S",
    ("packed", None):               "L   =    A    A     S   A    S     S     S    S    A    A    A",
    ("picked_up", None):            "L   L    =    A     A   A    S     S     A    S    A    A    A",
    ("in_transit", None):           "L   L    L    =     A   A    A     S     A    S    R    A    A",
    ("out_for_delivery", None):     "L   L    L    A     =   A    A     S     A    S    R    A    A",
    ("problem", "before_transit"):  "L   A    A    A     A   =    A     S     A    S    A    A    A",
    ("problem", "on_the_way_out"):  "L   L    A    A     A   =    A     S     A    S    R    A    A",
    ("problem", "on_the_way_back"): "L   L    L    L     L   =    R     R     A    S    R    A    A",
    ("delivered", None):            "L   L    L    L     L   L    =     A     A    S    R    R    R",
    ("completed", None):            "L   L    L    L     L   L    L     =     A    S    R    R    R",
    ("returning", None):            "L   L    L    L     L   A    R     R     =    A    R    A    A",
    ("returned", None):             "L   L    L    L     L   L    R     R     L    =    R    R    R",
    ("cancelled", None):            "L   L    R    R     R   R    R     R     R    R    =    R    R",
    ("lost", None):                 "L   L    L    A     A   L    A     S     A    S    R    =    A",
    ("damaged", None):              "L   L    L    L     L   L    A     S     A    S    R    R    =",
}  # fmt: skip

_VERDICTS: Final[dict[str, Verdict]] = {
    "A": "advanced",
    "S": "advanced",
    "=": "repeated",
    "L": "late",
    "R": "refused",
}

_BEFORE_TRANSIT: Final = frozenset({None, "submitted", "packed", "picked_up"})

# The rank of a status that is not on the happy path.
_RANK_OFF_PATH: Final = HAPPY_PATH.index("out_for_delivery")


class Judgement(NamedTuple):
    """The table's judgement of one report.

    Attributes:
        verdict: the verdict.
        leg: the order's leg after the report.
        skipped: stages of the happy path that were passed without a report.
        reason: why the report changed nothing, None if the verdict is advanced or repeated.
    """

    verdict: Verdict
    leg: Leg | None
    skipped: tuple[Status, ...]
    reason: str | None


def _leg_after(origin: Origin, reported: Status) -> Leg | None:
    status, _ = origin
    if reported != "problem":
        return None
    if status == "returning":
        return "on_the_way_back"
    return "before_transit" if status in _BEFORE_TRANSIT else "on_the_way_out"


def _skipped(status: Status, reported: Status) -> tuple[Status, ...]:
    rank = HAPPY_PATH.index(status) if status in HAPPY_PATH else _RANK_OFF_PATH
    if reported in HAPPY_PATH:
        return HAPPY_PATH[rank + 1 : HAPPY_PATH.index(reported)]
    up_to_transit = HAPPY_PATH[rank + 1 : HAPPY_PATH.index("in_transit") + 1]
    return (*up_to_transit, "returning") if reported == "returned" else up_to_transit


def _judgement(origin: Origin, reported: Status, cell: str) -> Judgement:
    status, leg = origin
    verdict = _VERDICTS[cell]
    if verdict == "advanced":
        skipped = _skipped(status, reported) if cell == "S" and status is not None else ()
        return Judgement(verdict, _leg_after(origin, reported), skipped, None)
    reason = {
        "repeated": None,
        "late": f"{reported} is an earlier stage than {status}, which was reported before it",
        "refused": f"{reported} contradicts {status}, which was reported before it",
    }[verdict]
    return Judgement(verdict, leg, (), reason)


_JUDGEMENTS: Final[dict[tuple[Status | None, Leg | None, Status], Judgement]] = {
    (*origin, reported): _judgement(origin, reported, cell)
    for origin, row in TABLE.items()
    for reported, cell in zip(STATUSES, row.split(), strict=True)
}
_UNRECOGNISED: Final = {
    leg: Judgement("unrecognised", leg, (), "the status string is outside the vocabulary")
    for leg in (None, "before_transit", "on_the_way_out", "on_the_way_back")
}


def judge(status: Status | None, leg: Leg | None, reported: Status | None) -> Judgement:
    """Judge a report by the order's status.

    Args:
        status: the order's status, None before it has one.
        leg: the leg of the order's problem, None unless its status is problem.
        reported: the report's recognised status, None if the string is outside the vocabulary.
    """
    if reported is None:
        return _UNRECOGNISED[leg]
    return _JUDGEMENTS[status, leg, reported]
