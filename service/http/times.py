"""Times as text, as in JSON responses."""

from datetime import UTC, datetime


def to_rfc3339(time: datetime, timespec: str = "auto") -> str:
    """Return a time in RFC 3339 format, in UTC; see ``datetime.isoformat`` for ``timespec``."""
    return time.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
