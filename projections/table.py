"""The tables of views as data. A table is a list of columns; the statement that writes it comes from them."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

from projections.postgres import Connection

# A row by column name. A table without a key never changes a row, so its rows are tuples in the columns' order:
# a rebuild copies them as they are, and uses a tenth less CPU than with a mapping for each event.
Row: TypeAlias = dict[str, Any]
# The rows of a view's tables, by the table's name. The keys of the inner mapping are the fold's own.
Rows: TypeAlias = dict[str, dict[Any, Any]]

# The number of rows in memory with which a rebuild writes a view.
ROWS_MAX: Final = 2_000


class Merge(NamedTuple):
    """How a column of a row in the table and of a row to be written become one value.

    Attributes:
        sql: the value, with the placeholders ``batch`` and ``present``; the present row may be missing.
        blank: the value of the column in a new row of the batch.
        settles: whether most batches leave the value as it is.
    """

    sql: str
    blank: int | None = None
    settles: bool = False


LAST: Final = Merge("{batch}")
LAST_KNOWN: Final = Merge("coalesce({batch}, {present})")
FIRST: Final = Merge("coalesce({present}, {batch})", settles=True)
SUM: Final = Merge("{batch} + coalesce({present}, 0)", blank=0)
# PostgreSQL's functions ignore null.
MIN: Final = Merge("least({batch}, {present})", settles=True)
MAX: Final = Merge("greatest({batch}, {present})", settles=True)


class Column(NamedTuple):
    """A column: its name, its type in PostgreSQL, and how two values become one."""

    name: str
    type: str
    merge: Merge = LAST


@dataclass(frozen=True)
class Table:
    """A table of a view. ``schema.sql`` creates it with the same columns in the same order.

    Args:
        name: the name.
        columns: the columns.
        key: the columns of the key by which rows are merged. Without one, every row is new, and is a tuple.
        rows_max: the number of rows in memory with which a rebuild writes the view.
    """

    name: str
    columns: tuple[Column, ...]
    key: tuple[str, ...] = ()
    rows_max: int = ROWS_MAX

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(column.name for column in self.columns)

    @cached_property
    def blank(self) -> Row:
        """A new row, to which nothing was added."""
        return {column.name: column.merge.blank for column in self.columns}

    def write_sql(self, parameter: int) -> str:
        """Return the statement that adds rows to the table, given as JSON in the parameter of this number.

        The SELECT computes the new values, because the table's CHECKs test the row to insert even if it
        conflicts. This is safe: no other process writes the view at the same time. One JSON parameter, because
        asyncpg would check each value of an array parameter for nested arrays.
        """
        typed = ", ".join(f"{name} {type_}" for name, type_, _ in self.columns)
        names = ", ".join(self.names)
        insert = f"INSERT INTO {self.name} ({names})"
        source = f"FROM json_to_recordset(${parameter}) AS batch ({typed})"
        if not self.key:
            return f"{insert} SELECT {names} {source}"
        merged = [column for column in self.columns if column.name not in self.key]
        if not merged:
            return f"{insert} SELECT {names} {source} ON CONFLICT DO NOTHING"
        values = ", ".join(
            f"batch.{name}"
            if name in self.key
            else merge.sql.format(batch=f"batch.{name}", present=f"present.{name}")
            for name, _, merge in self.columns
        )
        same_key = " AND ".join(f"present.{name} = batch.{name}" for name in self.key)
        sql = f"{insert} SELECT {values} {source} LEFT JOIN {self.name} AS present ON {same_key}"
        if all(merge.settles for _, _, merge in merged):
            # A row that stays as it is must be neither locked nor written.
            stays = " AND ".join(
                f"{merge.sql.format(batch=f'batch.{name}', present=f'present.{name}')} = present.{name}"
                for name, _, merge in merged
            )
            sql += f" WHERE ({stays}) IS NOT TRUE"
        renewed = ", ".join(f"{name} = excluded.{name}" for name, _, _ in merged)
        return f"{sql} ON CONFLICT ({', '.join(self.key)}) DO UPDATE SET {renewed}"

    def parameter(self, rows: dict[Any, Any]) -> list[Row]:
        """Return rows as the parameter of the statement that adds them."""
        if self.key:
            return [*rows.values()]
        return [dict(zip(self.names, row, strict=True)) for row in rows.values()]

    async def copy(self, connection: Connection, rows: dict[Any, tuple[Any, ...]]) -> None:
        """Add new rows of a table without a key, in two thirds of the time of the statement.

        Never under the view's lock: while PostgreSQL waits for the data of a COPY, no timeout ends a process
        that is suspended.
        """
        await connection.copy_records_to_table(self.name, records=rows.values(), columns=self.names)


def write_sql(tables: tuple[Table, ...]) -> str:
    """Return one statement that adds rows to all of these tables, each table's as one JSON parameter."""
    added = (f"added_{number} AS ({table.write_sql(number)})" for number, table in enumerate(tables, start=1))
    return f"WITH {', '.join(added)} SELECT"
