"""A list as CSV (RFC 4180), for spreadsheets: nested members are columns of their own, no cell is a formula."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

# What a spreadsheet would take for the beginning of a formula, or drop before one.
FORMULA_BEGINNINGS: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")  # noqa: RUF001 - its own
BYTE_ORDER_MARK: Final = "\ufeff"


def to_csv(columns: Sequence[str], items: Sequence[Mapping[str, Any]]) -> bytes:
    """Return items as CSV with a heading; a column ``a.b`` is the member ``b`` of ``a``.

    Spreadsheets take the byte order mark for the sign of UTF-8.
    """
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    for item in items:
        writer.writerow(_cell(_member(item, column)) for column in columns)
    return (BYTE_ORDER_MARK + text.getvalue()).encode()


def columns_of(kind: type) -> list[str]:
    """Return the columns of a typed dictionary, those of dictionaries within it included."""
    return [*_columns(kind, "")]


def _columns(kind: type, before: str) -> Iterator[str]:
    for name, value in kind.__annotations__.items():
        inner = next(
            (one for one in (value, *getattr(value, "__args__", ())) if _is_typed_dictionary(one)), None
        )
        if inner is None:
            yield before + name
        else:
            yield from _columns(inner, f"{before}{name}.")


def _is_typed_dictionary(kind: Any) -> bool:
    return hasattr(kind, "__total__")


def _member(item: Mapping[str, Any], column: str) -> Any:
    value: Any = item
    for name in column.split("."):
        value = value[name] if value is not None else None
    return value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, list | tuple):
        return _cell(" ".join(map(str, value)))
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return f"'{text}" if isinstance(value, str) and text.startswith(FORMULA_BEGINNINGS) else text
