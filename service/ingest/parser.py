"""Bytes to a report, or the reason why they cannot be understood. No I/O.

The rules are those of ``docs/api.md``: what is ambiguous is never guessed at, and nothing is trimmed.
"""

import json
import re
from datetime import UTC, datetime, timedelta
from operator import itemgetter
from typing import Any, Final

import orjson

from domain.order import Report

ORDER_NO_CHARACTERS_MAX: Final = 128
STATUS_CHARACTERS_MAX: Final = 128
CNOTE_CHARACTERS_MAX: Final = 128
# An order number written as a number: more digits would not survive every JSON reader on its way here.
ORDER_NO_DIGITS_MAX: Final = 18
# A time of the sender's is believed within these years; beyond them it is a placeholder.
YEAR_MIN: Final = 2000
YEAR_MAX: Final = 2100

_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_KEYS: Final = ("order_no", "cnote", "status")
_QUOTED_KEYS: Final = tuple(f'"{key}"'.encode() for key in _KEYS)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# A larger number counts milliseconds.
_SECONDS_MAX: Final = (datetime(YEAR_MAX, 1, 1, tzinfo=UTC) - _EPOCH).total_seconds()


class UnreadableError(Exception):
    """A body that cannot be understood. ``str()`` is the reason; the order number is kept if it was read."""

    def __init__(self, reason: str, order_no: str | None = None) -> None:
        super().__init__(reason)
        self.order_no = order_no


def parse(raw: bytes, report_id: str, remote: str | None = None, idempotency_key: str | None = None) -> Report:
    """Read the body of a webhook.

    Args:
        raw: the body.
        report_id: and what else is known of its arrival, see Report.
        remote: the address that it came from.
        idempotency_key: the sender's key.

    Raises:
        UnreadableError: it is not JSON, not an object, ambiguous, or lacks an order number or a status.
    """
    raw = raw.removeprefix(_BYTE_ORDER_MARK)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise UnreadableError(f"not JSON: {error.msg}") from None
    if not isinstance(body, dict):
        raise UnreadableError("not a JSON object")
    text = raw.decode()
    _refuse_doubled_keys(raw, text)
    order_no = _order_no(body.get("order_no"))
    status = _status(body.get("status"), order_no)
    occurred_at = _occurred_at(body["timestamp"]) if "timestamp" in body else None
    cnote = _cnote(body.get("cnote"))
    return Report(report_id, order_no, status, cnote, text, occurred_at, remote, idempotency_key)


def _refuse_doubled_keys(raw: bytes, text: str) -> None:
    # orjson takes the last of two equal keys in silence. A body without a backslash that spells each key at
    # most once cannot have two of them, so the slow look is rare.
    if b"\\" not in raw and all(raw.count(key) <= 1 for key in _QUOTED_KEYS):
        return
    outermost: list[tuple[str, Any]] = []

    def keep_last(pairs: list[tuple[str, Any]]) -> None:
        # Called for the inner objects first, so the last call is the outermost object's.
        nonlocal outermost
        outermost = pairs

    try:
        # parse_int: a number of thousands of digits would be refused by int() itself.
        json.loads(text, object_pairs_hook=keep_last, parse_int=str)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"not JSON that can be checked for doubled keys: {error}") from None
    names = [*map(itemgetter(0), outermost)]
    for key in _KEYS:
        if names.count(key) > 1:
            raise UnreadableError(f"{key} stands in it twice")


def _order_no(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        if not 0 <= value < 10**ORDER_NO_DIGITS_MAX:
            raise UnreadableError(f"order_no is a number below 0 or of over {ORDER_NO_DIGITS_MAX} digits")
        return str(value)
    if not isinstance(value, str):
        raise UnreadableError("order_no is missing" if value is None else "order_no is not text")
    if not value.strip():
        raise UnreadableError("order_no is blank")
    if len(value) > ORDER_NO_CHARACTERS_MAX:
        raise UnreadableError(f"order_no has over {ORDER_NO_CHARACTERS_MAX} characters")
    if _CONTROL.search(value):
        raise UnreadableError("order_no has control characters")
    if value in {".", ".."}:
        raise UnreadableError("order_no is a path segment that clients resolve away")
    return value


def _status(value: Any, order_no: str) -> str:
    if not isinstance(value, str):
        raise UnreadableError("status is missing" if value is None else "status is not text", order_no)
    if not value.strip():
        raise UnreadableError("status is blank", order_no)
    if len(value) > STATUS_CHARACTERS_MAX:
        raise UnreadableError(f"status has over {STATUS_CHARACTERS_MAX} characters", order_no)
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
    """Read a time with an offset, or seconds or milliseconds since 1970; a time without an offset is none."""
    try:
        if isinstance(value, str):
            # Python 3.11 reads no further than a NUL.
            time = datetime.fromisoformat(value if value.isprintable() else "")
            return _plausible(time.astimezone(UTC)) if time.tzinfo is not None else None
        if isinstance(value, int | float) and not isinstance(value, bool):
            seconds = value if value < _SECONDS_MAX else value / 1_000
            return _plausible(_EPOCH + timedelta(seconds=seconds))
    except (ValueError, OverflowError):
        pass
    return None


def _plausible(time: datetime) -> datetime | None:
    return time if YEAR_MIN <= time.year < YEAR_MAX else None
