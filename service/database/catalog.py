"""The objects of a database's log schema, and the rights on them, to compare them with a release's."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from projections.postgres import Connection

# What a new database has, as ``read_catalog`` and ``read_rights`` return it. A test compares the file with one;
# ``python -m tests.support.catalog`` writes it.
CATALOG_FILE: Final = Path(__file__).with_name("catalog.txt")

# Tables, columns, constraints, indexes, triggers, rules and functions of the schema public. Each line names one
# object and describes it in text that PostgreSQL 15 to 18 agree on; NOT NULL is part of its column's line.
CATALOG: Final = """
    WITH tables AS (
        SELECT oid, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'
    )
    SELECT format('table %s', relname),
        format('persistence %s, row security %s', relpersistence, relrowsecurity)
    FROM tables JOIN pg_class USING (oid, relname)
    UNION ALL
    SELECT format('column %s.%s', relname, attname),
        format('%s%s%s%s%s%s', format_type(atttypid, atttypmod),
            CASE WHEN collname <> 'default' THEN ' COLLATE ' || collname::text END,
            CASE WHEN attnotnull THEN ' NOT NULL' END,
            CASE WHEN attidentity <> '' THEN ' IDENTITY ' || attidentity::text END,
            CASE WHEN attgenerated <> '' THEN ' GENERATED' END,
            ' DEFAULT ' || pg_get_expr(adbin, adrelid))
    FROM tables JOIN pg_attribute ON attrelid = tables.oid AND attnum > 0 AND NOT attisdropped
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        LEFT JOIN pg_collation ON pg_collation.oid = attcollation
    UNION ALL
    SELECT format('constraint %s of %s', conname, relname), pg_get_constraintdef(pg_constraint.oid)
    FROM tables JOIN pg_constraint ON conrelid = tables.oid AND contype <> 'n'
    UNION ALL
    SELECT format('index %s', indexname), indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL
    SELECT format('trigger %s of %s', tgname, relname), pg_get_triggerdef(pg_trigger.oid)
    FROM tables JOIN pg_trigger ON tgrelid = tables.oid AND NOT tgisinternal
    UNION ALL
    SELECT format('state of trigger %s of %s', tgname, relname),
        CASE tgenabled WHEN 'A' THEN 'ENABLE ALWAYS' WHEN 'D' THEN 'disabled' ELSE 'not ENABLE ALWAYS' END
    FROM tables JOIN pg_trigger ON tgrelid = tables.oid AND NOT tgisinternal
    UNION ALL
    SELECT format('rule %s of %s', rulename, relname), pg_get_ruledef(pg_rewrite.oid)
    FROM tables JOIN pg_rewrite ON ev_class = tables.oid
    UNION ALL
    SELECT format('function %s(%s)', proname, pg_get_function_identity_arguments(oid)),
        format('%s %s %s', CASE WHEN prosecdef THEN 'SECURITY DEFINER' ELSE 'SECURITY INVOKER' END,
            proconfig, md5(regexp_replace(prosrc, '\\s+', ' ', 'g')))
    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
        AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
    ORDER BY 1
"""


async def read_catalog(connection: Connection) -> list[str]:
    """Return the objects of the schema public as lines ``name: description``, sorted by name."""
    objects = await connection.fetch(CATALOG)
    # Whether PostgreSQL qualifies a name depends on the connection's search path.
    return [f"{name}: {description.replace('public.', '')}" for name, description in objects]


# What a role may do, by whatever grant. MAINTAIN, which PostgreSQL 15 does not have, is left out.
RIGHTS: Final = """
    WITH tables AS (
        SELECT oid, relname, relkind FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S')
    )
    SELECT format('%s on %s', privilege, relname)
    FROM tables,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'REFERENCES', 'TRIGGER']) AS privilege
    WHERE relkind = 'r' AND has_table_privilege($1::name, oid, privilege)
    UNION ALL
    SELECT format('%s (%s) on %s', privilege, attname, relname)
    FROM tables JOIN pg_attribute ON attrelid = oid AND attnum > 0 AND NOT attisdropped,
        unnest(ARRAY['SELECT', 'INSERT', 'UPDATE', 'REFERENCES']) AS privilege
    WHERE relkind = 'r' AND NOT has_table_privilege($1::name, oid, privilege)
        AND has_column_privilege($1::name, oid, attnum, privilege)
    UNION ALL
    SELECT format('%s on SEQUENCE %s', privilege, relname)
    FROM tables, unnest(ARRAY['SELECT', 'USAGE', 'UPDATE']) AS privilege
    WHERE CASE relkind WHEN 'S' THEN has_sequence_privilege($1::name, oid, privilege) END
    UNION ALL
    SELECT format('EXECUTE on ROUTINE %s', replace(oid::regprocedure::text, 'public.', '')) FROM pg_proc
    WHERE pronamespace = 'public'::regnamespace AND has_function_privilege($1::name, oid, 'EXECUTE')
        AND NOT EXISTS (SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
    UNION ALL
    SELECT format('%s on SCHEMA public', privilege) FROM unnest(ARRAY['USAGE', 'CREATE']) AS privilege
    WHERE has_schema_privilege($1::name, 'public'::regnamespace::oid, privilege)
    ORDER BY 1
"""
# The line of a right begins with this.
RIGHT: Final = "right: "
_COLUMN: Final = re.compile(r" \(\w+\)(?= on )")


async def read_rights(connection: Connection, role: str) -> list[str]:
    """Return what a role may do with the objects of the schema public, one line for each right, sorted."""
    return [f"{RIGHT}{right}" for (right,) in await connection.fetch(RIGHTS, role)]


def first_difference(expected: Sequence[str], found: Sequence[str]) -> str | None:
    """Return the name of an expected object that is missing or differs; None if all are present and equal.

    Other objects are ignored: an operator may add an index or a table.
    """
    missing = sorted({*expected} - {*found})
    return missing[0].partition(": ")[0] if missing else None


class Differences(NamedTuple):
    """How a database differs from a new one.

    Attributes:
        faults: objects that are missing or differ, and further ones that may refuse or change a row.
        indexes: further indexes on this service's tables.
        lost: rights that the service's role lacks.
        further: rights on this service's objects that it has besides.
    """

    faults: list[str]
    indexes: list[str]
    lost: list[str]
    further: list[str]


def compare(objects: Sequence[str], rights: Sequence[str]) -> Differences:
    """Compare a database with a new one. An operator's own tables do not count.

    Args:
        objects: the database's objects, as ``read_catalog`` returns them.
        rights: the rights of the service's role, as ``read_rights`` returns them.
    """
    lines = CATALOG_FILE.read_text(encoding="utf-8").splitlines()
    expected = _by_name(line for line in lines if not line.startswith(RIGHT))
    given = {line for line in lines if line.startswith(RIGHT)}
    found = _by_name(objects)
    faults = [f"{name} is missing" for name in expected if name not in found]
    faults += [
        f"{name} is '{found[name]}' instead of '{description}'"
        for name, description in expected.items()
        if _without_parentheses(found.get(name, description)) != _without_parentheses(description)
    ]
    indexes = []
    for name, description in found.items():
        if name not in expected and f"table {_table(name, description)}" in expected:
            if name.startswith("index ") and not description.startswith("CREATE UNIQUE"):
                indexes.append(name)
            elif not name.startswith("state of "):
                faults.append(f"{name} is not of this release: {description}")
    ours = {right.partition(" on ")[2] for right in given}
    further = [right for right in sorted({*rights} - given) if right.partition(" on ")[2] in ours]
    # A right on a table includes those on its columns.
    lost = [right for right in sorted(given - {*rights}) if _COLUMN.sub("", right, 1) not in rights]
    return Differences(faults, indexes, _statements(lost), _statements(further))


def _statements(rights: Sequence[str]) -> list[str]:
    """Return rights as GRANT and REVOKE name them."""
    return [right.removeprefix(RIGHT).replace(" on ", " ON ") for right in rights]


def _without_parentheses(description: str) -> str:
    """Return a description without parentheses, since a restore may nest the same expression in another way."""
    return description.replace("(", "").replace(")", "")


def _by_name(lines: Iterable[str]) -> dict[str, str]:
    return {name: description for name, _, description in (line.partition(": ") for line in lines)}


def _table(name: str, description: str) -> str:
    """Return the table of an object, by its line; something else for a function or a table."""
    if name.startswith("index "):
        return description.partition(" ON ")[2].removeprefix("ONLY ").partition(" ")[0]
    if name.startswith("column "):
        return name.removeprefix("column ").partition(".")[0]
    return name.rpartition(" of ")[2]
