"""The tables of limits in docs/SECURITY.md have the values of the code, and a test that attacks each cell."""

import re
from types import ModuleType
from typing import Any, Final

import pytest

from service.features.settings import Settings
from service.features.subscriptions import delivery, responses, subscription
from service.http import budgets, connections, server
from service.ingest import recorder
from tests.support.folders import ROOT

INCOMING: Final = (connections, server, budgets, recorder)
OUTGOING: Final = (responses, budgets, delivery, subscription)
# Where nothing is held.
EMPTY: Final = "nothing"
UNITS: Final = {"KiB": 1_024, "MiB": 1_024**2, "%": 0.01, "s": 1, "": 1}
CELL: Final = re.compile(r"`(?P<name>\w+)` (?P<number>[\d.]+) ?(?P<unit>\D*)")


def tables() -> list[tuple[str, str, str, tuple[ModuleType, ...]]]:
    """Return each cell: its phase, its limit, its text, and the modules that may define its constant."""
    text = (ROOT / "docs" / "SECURITY.md").read_text(encoding="utf-8")
    cells: list[tuple[str, str, str, tuple[ModuleType, ...]]] = []
    for table in re.findall(r"(\| phase \|.*\n\|-.*\n(?:\|.*\n)+)", text):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        modules = INCOMING if "address" in head else OUTGOING
        cells += [
            (row[0], limit, cell, modules)
            for row in rows
            for limit, cell in zip(head[1:], row[1:], strict=True)
        ]
    return cells


def defined(name: str, modules: tuple[ModuleType, ...]) -> Any:
    """Return the value of a constant, or the default of a setting."""
    if name in Settings.model_fields:
        return Settings.model_fields[name].default
    (value,) = {getattr(module, name) for module in modules if hasattr(module, name)}
    return value


@pytest.mark.parametrize(("phase", "limit", "cell", "modules"), tables())
def test_each_cell_has_the_value_of_the_code(
    phase: str, limit: str, cell: str, modules: tuple[ModuleType, ...]
) -> None:
    """A cell names a constant with its value, or says that nothing is held."""
    if cell != EMPTY:
        assert (match := CELL.fullmatch(cell)) is not None, (phase, limit)
        assert defined(match["name"], modules) == pytest.approx(float(match["number"]) * UNITS[match["unit"]])


def test_each_cell_is_attacked() -> None:
    """Each cell has a test with its mark, and each mark its cell."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    attacked = {mark for source in sources for mark in re.findall(r'\.attacks\("([\w ]+)", "(\w+)"\)', source)}
    assert attacked == {(phase, limit) for phase, limit, _, _ in tables()}
    assert len(tables()) == 6 * 4 + 4 * 4


def test_limits_of_each_connection_are_the_constants() -> None:
    """What tests may change has the values of the constants by default."""
    for limits, module in ((connections.LIMITS, connections), (responses.LIMITS, responses)):
        for name in limits.__dataclass_fields__:
            assert getattr(limits, name) == getattr(module, name.upper())
