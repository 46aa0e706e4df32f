"""The record of operators' actions: who did what, when and why."""

import os
import pwd
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias, cast

import structlog
from typing_extensions import TypedDict  # pydantic cannot read typing's own before Python 3.12

from projections.postgres import Connection

Via: TypeAlias = Literal["api", "page", "cli", "service"]
Action: TypeAlias = Literal[
    "key_created",
    "key_revoked",
    "session_opened",
    "session_ended",
    "entry_retried",
    "entry_discarded",
    "order_erased",
    "reports_rejudged",
    "reports_imported",
    "contradiction_handled",
    "share_made",
    "share_revoked",
    "shares_kept",
    "setting_opened",
    "setting_closed",
    "subscription_added",
    "subscription_changed",
    "subscription_tested",
    "subscription_paused",
    "subscription_resumed",
    "subscription_replayed",
    "subscription_removed",
    "secret_rotated",
    "delivery_retried",
    "delivery_skipped",
    "history_restarted",
    "feature_stopped",
    "feature_resumed",
]

# The user who logged in to this process's session. Without a login, as for a service, it is NO_LOGIN.
LOGIN_UID: Final = Path("/proc/self/loginuid")
NO_LOGIN: Final = 2**32 - 1
# Of a reason or a note that an operator gives.
REASON_CHARACTERS_MAX: Final = 500

RECORD: Final = """
    INSERT INTO public.operations (via, actor, action, subject, reason) VALUES ($1, $2, $3, $4, $5)
    RETURNING operation_id
"""
# Actions below an id, newest first.
PAGE: Final = """
    SELECT operation_id, performed_at, via, actor, action, subject, reason
    FROM public.operations WHERE operation_id < $1 AND ($2::text IS NULL OR action = $2)
    ORDER BY operation_id DESC LIMIT $3
"""
LAST_OPENNESS: Final = """
    SELECT reason FROM public.operations WHERE action IN ('setting_opened', 'setting_closed') AND subject = $1
    ORDER BY operation_id DESC LIMIT 1
"""

LAST_FEATURE_ACTION: Final = """
    SELECT action FROM public.operations WHERE action IN ('feature_stopped', 'feature_resumed') AND subject = $1
    ORDER BY operation_id DESC LIMIT 1
"""

logger = structlog.get_logger()


class Operation(TypedDict):
    """An operator's action. ``actor`` is the name of an API key or, for ``cli``, a user of the system.

    ``actor`` is null without a key, in the open mode.
    """

    operation_id: int
    performed_at: datetime
    via: Via
    actor: str | None
    action: Action
    subject: str
    reason: str | None


class Actor(NamedTuple):
    """Who acts, and by which way."""

    via: Via
    name: str | None


def system_user() -> Actor:
    """Return the user of the operating system who runs this process, and the login from which another one came.

    Both come from the kernel. LOGNAME and SUDO_USER are of the environment, which the user chooses.
    """
    uid = os.getuid()
    name = _user_name(uid)
    with suppress(OSError, ValueError):
        login = int(LOGIN_UID.read_text(encoding="ascii"))
        if login not in {uid, NO_LOGIN}:
            name = f"{name}, logged in as {_user_name(login)}"
    return Actor("cli", name)


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        # The user has no name, as in some containers.
        return f"uid {uid}"


def check_reason(text: str, name: str = "reason") -> None:
    """Check what an operator gives as a reason.

    Args:
        text: the reason.
        name: what to call it in the error.

    Raises:
        ValueError: it is empty, not printable, or longer than REASON_CHARACTERS_MAX.
    """
    if not text.strip() or len(text) > REASON_CHARACTERS_MAX or not text.isprintable():
        raise ValueError(f"the {name} must have 1 to {REASON_CHARACTERS_MAX} printable characters")


async def record_operation(
    connection: Connection, actor: Actor, action: Action, subject: str, reason: str | None = None
) -> int:
    """Record an action, in the transaction that performs it if there is one, and return its id.

    Actions over HTTP are logged too.

    Args:
        connection: the connection.
        actor: who acts.
        action: what is done.
        subject: to which key, entry, order or setting.
        reason: why, if the operator gave a reason.
    """
    operation_id: int = await connection.fetchval(RECORD, *actor, action, subject, reason)
    if actor.via in {"api", "page"}:
        logger.info("operator's action", action=action, subject=subject, via=actor.via, actor=actor.name)
    return operation_id


async def operations_page(
    connection: Connection, before: int, action: Action | None, limit: int
) -> list[Operation]:
    """Return actions with ids below ``before``, newest first."""
    return [cast("Operation", dict(row)) for row in await connection.fetch(PAGE, before, action, limit)]


async def record_openness(connection: Connection, actor: Actor, subject: str, reason: str | None) -> None:
    """Record that something is open to the network, or no longer, unless the last start recorded the same.

    Args:
        connection: the connection.
        actor: who started the service.
        subject: what is open.
        reason: by which settings it is open; None if it is closed.
    """
    if await connection.fetchval(LAST_OPENNESS, subject) != reason:
        action: Action = "setting_closed" if reason is None else "setting_opened"
        await record_operation(connection, actor, action, subject, reason)


async def record_feature(connection: Connection, actor: Actor, name: str, use: str | None) -> None:
    """Record that a feature is off which the database has used, or on again, unless the last start did.

    Args:
        connection: the connection.
        actor: who started the service.
        name: the feature.
        use: what the database has of it; None if it is on, or was never used.
    """
    last = await connection.fetchval(LAST_FEATURE_ACTION, name)
    action: Action = "feature_resumed" if use is None else "feature_stopped"
    if last != action and (last is not None or use is not None):
        await record_operation(connection, actor, action, name, use)
