"""Lists as CSV (RFC 4180) for spreadsheets: nested members become columns, and no cell is a formula."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, get_args

from typing_extensions import is_typeddict  # typing's own misses these before Python 3.12

from service.http.times import to_rfc3339

# A spreadsheet would treat a cell that begins with one of these as a formula, even after white space.
FORMULA_BEGINNINGS: Final = ("=", "+", "-", "@", "|", "＝", "＋", "－", "＠", "｜")  # noqa: RUF001 - theirs
CONTROLS: Final = ("\t", "\r", "\n")
# Spreadsheets recognise UTF-8 by it.
BYTE_ORDER_MARK: Final = "\ufeff"


def to_csv(record_type: type, items: Sequence[Mapping[str, Any]]) -> bytes:
    """Return records as CSV with a heading.

    Args:
        record_type: the typed dictionary of the records. A member ``b`` of its member ``a`` is the column
            ``a.b``.
        items: the records.
    """
    return csv_heading(record_type) + b"".join(csv_line(record_type, item) for item in items)


def csv_heading(record_type: type) -> bytes:
    """Return the first line of a list as CSV, after a byte order mark."""
    return BYTE_ORDER_MARK.encode() + _line(_columns(record_type))


def csv_line(record_type: type, item: Mapping[str, Any]) -> bytes:
    """Return the line of a record in a list as CSV."""
    return _line(_cell(_member(item, column)) for column in _columns(record_type))


def _line(cells: Iterable[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text).writerow(cells)
    return text.getvalue().encode()


@cache
def _columns(record_type: type) -> tuple[str, ...]:
    return tuple(_member_columns(record_type, ""))


def _member_columns(record_type: type, prefix: str) -> Iterator[str]:
    for name, member_type in record_type.__annotations__.items():
        inner = next((one for one in (member_type, *get_args(member_type)) if is_typeddict(one)), None)
        if inner is None:
            yield prefix + name
        else:
            yield from _member_columns(inner, f"{prefix}{name}.")


def _member(item: Mapping[str, Any], column: str) -> Any:
    value: Any = item
    for name in column.split("."):
        value = value[name] if value is not None else None
    return value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return to_rfc3339(value)
    if isinstance(value, list | tuple):
        return _cell(" ".join(map(str, value)))
    if isinstance(value, bool):
        return "true" if value else "false"
    return escape_formula(value) if isinstance(value, str) else str(value)


def escape_formula(text: str) -> str:
    """Return a text with an apostrophe before it if a spreadsheet would take it for a formula."""
    return f"'{text}" if _is_formula(text) else text


def unescape_formula(text: str) -> str:
    """Return the text that ``escape_formula`` returned this one for."""
    return text[1:] if text.startswith("'") and _is_formula(text) else text


def _is_formula(text: str) -> bool:
    # Of a text that already has apostrophes, so that each escaped text stands for one text alone.
    bare = text.lstrip("'")
    return bare.startswith(CONTROLS) or bare.lstrip().startswith(FORMULA_BEGINNINGS)
