"""The sequences that number the log's events and other rows, compared with their tables."""

from typing import Final, NamedTuple

from projections.postgres import Connection
from service.database.connections import UnsupportedServerError


class Numbered(NamedTuple):
    """A table, and the column that a sequence numbers."""

    table: str
    column: str

    @property
    def sequence(self) -> str:
        """The name that PostgreSQL gives to the sequence of an identity column."""
        return f"{self.table}_{self.column}_seq"


LOG: Final = Numbered("order_events", "notification_id")
NUMBERED: Final = (
    LOG,
    Numbered("quarantine", "quarantine_id"),
    Numbered("operations", "operation_id"),
    Numbered("erasures", "erasure_id"),
)

# The last number that a sequence has given, its two settings, and the highest number in its table.
SEQUENCE: Final = """
    SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END, seqincrement, seqcache,
        coalesce((SELECT max({column}) FROM public.{table}), 0)
    FROM public.{sequence}, pg_sequence
    WHERE seqrelid = 'public.{sequence}'::regclass
"""
# At a hundred numbers a second, they last for four months. Left alone, no sequence of a bigint comes near.
ROOM_NUMBERS_MIN: Final = 1_000_000_000
# The sequences of the schema public that have fewer numbers left, and whether a higher maximum is possible.
SCARCE: Final = """
    SELECT sequencename::text, max_value - coalesce(last_value, start_value), max_value < 9223372036854775807
    FROM pg_sequences
    WHERE schemaname = 'public' AND NOT cycle AND max_value - coalesce(last_value, start_value) < $1
    ORDER BY 1
"""
# Logical replication does not copy sequences.
ADVANCE: Final = "SELECT setval('{sequence}', max({column})) FROM {table}"
ADVANCE_TO: Final = "SELECT setval('public.{sequence}', $1)"
LAST_NUMBER: Final = "SELECT CASE WHEN is_called THEN last_value ELSE last_value - 1 END FROM public.{sequence}"
RESET: Final = "ALTER SEQUENCE {sequence} INCREMENT 1 CACHE 1"


async def find_faults(connection: Connection) -> list[str]:
    """Return which sequences would give numbers that do not rise, and what to do about each."""
    faults = []
    for numbered in NUMBERED:
        names = {**numbered._asdict(), "sequence": numbered.sequence}
        ((last, increment, cache, highest),) = await connection.fetch(SEQUENCE.format(**names))
        fault = ""
        if last < highest:
            fault, statement = f"is at {last}, behind its table's {highest}", ADVANCE
        # Only the log's positions must rise in the order of the commits.
        elif numbered == LOG and (increment, cache) != (1, 1):
            fault, statement = f"has increment {increment} and cache {cache}", RESET
        if fault:
            faults.append(
                f"the sequence {numbered.sequence} {fault}: run, as its owner, {statement.format(**names)}"
            )
    return faults


async def find_scarce(connection: Connection) -> list[str]:
    """Return which sequences will soon have no number left, after which nothing is recorded, and what to do."""
    return [
        f"the sequence {name} has only {left:,} numbers left: "
        + (
            f"run, as its owner, ALTER SEQUENCE {name} NO MAXVALUE"
            if can_grow
            else "a statement has set it far ahead; move to another database before it ends"
        )
        for name, left, can_grow in await connection.fetch(SCARCE, ROOM_NUMBERS_MIN)
    ]


async def require_rising_numbers(connection: Connection) -> None:
    """Check the sequences.

    Raises:
        UnsupportedServerError: a number would not rise.
    """
    if faults := await find_faults(connection):
        raise UnsupportedServerError("; ".join(faults))


async def last_number(connection: Connection, numbered: Numbered) -> int:
    """Return the last number that a sequence has given, 0 if none."""
    number: int = await connection.fetchval(LAST_NUMBER.format(sequence=numbered.sequence))
    return number


async def advance(connection: Connection, numbered: Numbered, number: int) -> None:
    """Let a sequence continue after a number, unless it is there already. No rollback takes this back."""
    if number > await last_number(connection, numbered):
        await connection.execute(ADVANCE_TO.format(sequence=numbered.sequence), number)
