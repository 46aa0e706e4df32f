"""The tables of ``docs/statuses.md`` as data, so that tests can compare the code with the documentation."""

import re
from pathlib import Path
from typing import Final, NamedTuple, get_args

from domain.statuses import Status
from domain.transitions import Leg, Origin, Verdict

PAGE: Final = (Path(__file__).parents[2] / "docs" / "statuses.md").read_text(encoding="utf-8")

# The page's abbreviations of its columns, and the names of the rows that are not just a status.
COLUMNS: Final[dict[str, Status]] = {
    "sub": "submitted",
    "pack": "packed",
    "pick": "picked_up",
    "trans": "in_transit",
    "ofd": "out_for_delivery",
    "prob": "problem",
    "deliv": "delivered",
    "compl": "completed",
    "retg": "returning",
    "retd": "returned",
    "canc": "cancelled",
    "lost": "lost",
    "dmg": "damaged",
}
LEGS: Final[dict[str, Leg]] = {
    "before transit": "before_transit",
    "on the way out": "on_the_way_out",
    "on the way back": "on_the_way_back",
}
_VERDICT_BY_NAME: Final[dict[str, Verdict]] = {verdict: verdict for verdict in get_args(Verdict)}
_STATUS_BY_NAME: Final[dict[str, Status]] = {status: status for status in COLUMNS.values()}


class Word(NamedTuple):
    """A row of the vocabulary."""

    status: Status
    label_id: str
    label_en: str
    raw_strings: tuple[str, ...]
    settled: bool


class Cell(NamedTuple):
    """A cell of the transition table."""

    status: Status | None
    leg: Leg | None
    reported: Status
    letter: str

    def __str__(self) -> str:
        return f"{self.leg or ''} {self.status or 'none yet'} to {self.reported}".strip().replace(" ", "-")


def _tables() -> list[list[list[str]]]:
    """Return the page's tables, each as a list of rows of cells, headings first."""
    tables: list[list[list[str]]] = []
    inside = False
    for line in PAGE.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            tables.append([])
            inside = True
        if not set(line) <= set("|-"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return tables


def _table(first_heading: str) -> list[list[str]]:
    (table,) = [table for table in _tables() if table[0][0] == first_heading]
    return table


def _named(text: str) -> list[Status]:
    return [_STATUS_BY_NAME[name] for name in re.findall(r"`(\w+)`", text)]


def _vocabulary() -> list[Word]:
    return [
        Word(_named(name)[0], label_id, label_en, tuple(raw.split(", ")), settled == "yes")
        for name, label_id, label_en, raw, settled in _table("status")[1:]
    ]


def _origin(name: str) -> Origin:
    if name == "(none yet)":
        return None, None
    status, _, leg = name.partition(", ")
    return _STATUS_BY_NAME[status], LEGS[leg] if leg else None


def _cells() -> list[Cell]:
    headings, *rows = _table("from \\ to")
    return [
        Cell(*_origin(row[0]), COLUMNS[heading], letter)
        for row in rows
        for heading, letter in zip(headings[1:], row[1:], strict=True)
    ]


def _legs() -> dict[Status | None, Leg]:
    legs: dict[Status | None, Leg] = {}
    for entered_from, leg in _table("the problem was entered from")[1:]:
        legs.update(dict.fromkeys(_named(entered_from), LEGS[leg]))
        if "no status yet" in entered_from:
            legs[None] = LEGS[leg]
    return legs


def _happy_path() -> list[Status]:
    (found,) = re.findall(r"^Happy path: ([^.]*)\.", PAGE, re.MULTILINE)
    return _named(found)


VOCABULARY: Final = _vocabulary()
VERDICTS: Final = [_VERDICT_BY_NAME[row[0].strip("`")] for row in _table("verdict")[1:]]
CELLS: Final = _cells()
LEG_AFTER: Final = _legs()
HAPPY_PATH: Final = _happy_path()
