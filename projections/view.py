"""What a view is: its tables, and the fold that turns events into their rows."""

import hashlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from domain.logged import DecodedEvent
from projections.postgres import Connection
from projections.table import Rows, Table, write_sql

Fold: TypeAlias = Callable[[Iterable[DecodedEvent], Rows], None]
# Called with a connection and the last erased version of each order.
Erase: TypeAlias = Callable[[Connection, Mapping[str, int]], Awaitable[None]]


@dataclass(frozen=True)
class View:
    """A view: its tables, and the function that folds events into rows.

    Args:
        name: the name of the view and of its schema.
        fold_version: change this number whenever the view has different rows for the same events.
        tables: the tables. ``replay --verify`` compares them.
        fold: adds events to rows. An order's events come in the order of its versions, and none is left out.
            The live projection passes the events of all orders in log order, a rebuild sorted by order number.
        batch_events_max: the maximum number of events that the live projection applies in one transaction.
        idle_seconds: the pause after a batch that was not full, so that the next batch is larger under load.
        erase: empties what the tables have of erased events, as if a rebuild had made them. None if they have
            nothing of the kind.
        tables_sql: SQL from schema.sql that creates the tables and their primary keys, with unqualified names.
        indexes_sql: SQL from schema.sql that creates the other indexes. A rebuild writes the rows first.
    """

    name: str
    fold_version: int
    tables: tuple[Table, ...]
    fold: Fold
    batch_events_max: int
    idle_seconds: float
    erase: Erase | None = None
    tables_sql: str = ""
    indexes_sql: str = ""

    @cached_property
    def definition(self) -> str:
        """The hash of the view's definition. A view is rebuilt if the database holds another hash for it."""
        text = f"{self.fold_version}\n{self.tables_sql}\n{self.indexes_sql}"
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def write_sql(self) -> str:
        """The statement that adds rows to the tables of the schema on the search path."""
        return write_sql(self.tables)

    def new_rows(self) -> Rows:
        """Return no rows yet."""
        return {table.name: {} for table in self.tables}

    def is_full(self, rows: Rows) -> bool:
        """Return whether the rows take so much memory that a rebuild must write them now."""
        return any(len(rows[table.name]) >= table.rows_max for table in self.tables)

    async def write(self, connection: Connection, rows: Rows) -> None:
        """Add rows to the tables, which already include all earlier events of the same orders."""
        await connection.execute(self.write_sql, *(table.parameter(rows[table.name]) for table in self.tables))

    async def write_new(self, connection: Connection, rows: Rows) -> None:
        """Add rows as ``write`` does, but faster, to tables that no other process uses."""
        for table in self.tables:
            if not table.key:
                await table.copy(connection, rows[table.name])
                rows[table.name] = {}
        await self.write(connection, rows)

    async def apply(self, connection: Connection, events: Iterable[DecodedEvent]) -> None:
        """Add events to the tables."""
        rows = self.new_rows()
        self.fold(events, rows)
        await self.write(connection, rows)
