"""The registry of the views, each with its part of schema.sql."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from projections import current_status, statistics, timeline
from projections.view import View

SCHEMA_FILE: Final = Path(__file__).parents[1] / "schema.sql"
# What precedes the tables that every view has, and the views.
LOG_SQL, _, _VIEWS_SQL = SCHEMA_FILE.read_text(encoding="utf-8").partition("-- in every view\n")


def with_tables(*views: View) -> tuple[View, ...]:
    """Return the views with the SQL that creates their tables, from schema.sql."""
    shared, *sections = re.split(r"(?m)^-- view (\w+)\n", _VIEWS_SQL.partition("-- end of views")[0])
    by_name = dict(zip(sections[::2], sections[1::2], strict=True))
    complete = []
    for view in views:
        tables, _, indexes = by_name[view.name].partition("-- indexes\n")
        complete.append(replace(view, tables_sql=shared + tables, indexes_sql=indexes))
    return tuple(complete)


VIEWS: Final = with_tables(
    current_status.VIEW,
    timeline.VIEW,
    statistics.VIEW,
)
