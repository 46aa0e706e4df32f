"""The parser: it turns a body into a report, or raises the reason why the body is unparseable. No I/O.

The rules are those of ``docs/api.md``: it neither guesses at ambiguous values nor trims any.
"""

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, Final

import orjson

from domain.order import Arrival, Report

ORDER_NO_CHARACTERS_MAX: Final = 128
STATUS_CHARACTERS_MAX: Final = 128
CNOTE_CHARACTERS_MAX: Final = 128
# The maximum digits of an order number that is a JSON number. Some JSON parsers on its way keep no more.
ORDER_NO_DIGITS_MAX: Final = 18
# A sender's time outside these years is a placeholder, so it is ignored.
YEAR_MIN: Final = 2000
YEAR_MAX: Final = 2100

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
# Each key as it is in the bytes of a body, unless it is escaped.
_KEYS: Final = {"order_no": b'"order_no"', "cnote": b'"cnote"', "status": b'"status"'}
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# A larger number is in milliseconds.
_SECONDS_MAX: Final = (datetime(YEAR_MAX, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()


class UnreadableError(Exception):
    """A body is unparseable. ``str()`` is the reason; ``order_no`` is the order number if it could be read."""

    def __init__(self, reason: str, order_no: str | None = None) -> None:
        super().__init__(reason)
        self.order_no = order_no


def parse(raw: bytes, arrival: Arrival) -> Report:
    """Parse the body of a webhook.

    Args:
        raw: the decompressed body.
        arrival: the report's arrival.

    Raises:
        UnreadableError: the body is not a JSON object, is ambiguous, or lacks an order number or a status.
    """
    raw = raw.removeprefix(_BYTE_ORDER_MARK)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise UnreadableError(f"not JSON: {error.msg}") from None
    if not isinstance(body, dict):
        raise UnreadableError("not a JSON object")
    text = raw.decode()
    refuse_duplicates(raw, text, _KEYS)
    order_no = _order_no(body.get("order_no"))
    status = _status(body.get("status"), order_no)
    occurred_at = _occurred_at(body["timestamp"]) if "timestamp" in body else None
    cnote = _cnote(body.get("cnote"))
    return Report(arrival, order_no, status, cnote, text, occurred_at)


def ignored_members(body: str, cnote: str | None, occurred_at: datetime | None) -> list[str]:
    """Return the names of the members that are not blank in a body, but have no valid value.

    Args:
        body: the text of a recorded body; empty after an erasure.
        cnote: the airway bill that was taken from it.
        occurred_at: the time that was taken from it.
    """
    names = [name for name, taken in (("cnote", cnote), ("timestamp", occurred_at)) if taken is None]
    # Most bodies have no such member, so they need not be parsed again. A backslash may hide its name.
    if "\\" not in body and not any(name in body for name in names):
        return []
    try:
        members = orjson.loads(body)
    except orjson.JSONDecodeError:
        # Another program recorded it.
        return []
    if not isinstance(members, dict):
        return []
    return [name for name in names if not _is_blank(members.get(name))]


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def refuse_duplicates(raw: bytes, text: str, keys: Mapping[str, bytes]) -> None:
    """Refuse a JSON object in which one of these keys occurs twice.

    Args:
        raw: the object.
        text: the same, decoded.
        keys: the keys, and each one in quotes.

    Raises:
        UnreadableError: a key occurs twice, or the object cannot be checked.
    """
    # orjson silently takes the last of two equal keys. A body that has no backslash and contains each key at
    # most once has no duplicates, so the slow check is rare.
    if b"\\" not in raw and all(raw.count(quoted) <= 1 for quoted in keys.values()):
        return
    outermost: list[tuple[str, Any]] = []

    def keep_last(pairs: list[tuple[str, Any]]) -> None:
        # The decoder calls this for inner objects first, so the last call is for the outermost object.
        nonlocal outermost
        outermost = pairs

    try:
        # parse_int: int() itself would refuse a number of thousands of digits.
        json.loads(text, object_pairs_hook=keep_last, parse_int=str)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"the JSON cannot be checked for duplicate keys: {error}") from None
    names = [*map(itemgetter(0), outermost)]
    for key in keys:
        if names.count(key) > 1:
            raise UnreadableError(f"{key} occurs twice")


def _order_no(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < 10**ORDER_NO_DIGITS_MAX:
            raise UnreadableError(f"order_no is negative or has more than {ORDER_NO_DIGITS_MAX} digits")
        return str(value)
    if not isinstance(value, str):
        raise UnreadableError("order_no is missing" if value is None else "order_no is not text")
    if not value.strip():
        raise UnreadableError("order_no is blank")
    if len(value) > ORDER_NO_CHARACTERS_MAX:
        raise UnreadableError(f"order_no has more than {ORDER_NO_CHARACTERS_MAX} characters")
    if _CONTROL.search(value):
        raise UnreadableError("order_no has control characters")
    if value in {".", ".."}:
        raise UnreadableError("order_no is a path segment that clients remove")
    return value


def _status(value: Any, order_no: str) -> str:
    if not isinstance(value, str):
        raise UnreadableError("status is missing" if value is None else "status is not text", order_no)
    if not value.strip():
        raise UnreadableError("status is blank", order_no)
    if len(value) > STATUS_CHARACTERS_MAX:
        raise UnreadableError(f"status has more than {STATUS_CHARACTERS_MAX} characters", order_no)
    if "\x00" in value:
        raise UnreadableError("status has a NUL character", order_no)
    return value


def _cnote(value: Any) -> str | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip():
        return None
    if len(value) > CNOTE_CHARACTERS_MAX or _CONTROL.search(value):
        return None
    return value


def _occurred_at(value: Any) -> datetime | None:
    """Parse a time with an offset, or seconds or milliseconds since 1970; return None for anything else."""
    try:
        if isinstance(value, str):
            # Python 3.11 stops reading at a NUL character.
            time = datetime.fromisoformat(value if value.isprintable() else "")
            return _within_years(time.astimezone(UTC)) if time.tzinfo is not None else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            seconds = value if value < _SECONDS_MAX else value / 1_000
            return _within_years(_EPOCH + timedelta(seconds=seconds))
    except (ValueError, OverflowError):
        pass
    return None


def _within_years(time: datetime) -> datetime | None:
    return time if YEAR_MIN <= time.year < YEAR_MAX else None
