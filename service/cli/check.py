from collections.abc import Iterator
from datetime import UTC, datetime
from shlex import quote
from typing import Annotated, Final

import typer
from rich.progress import MofNCompleteColumn

from service.cli.console import EXIT_FAILURE, database, show
from service.cli.progress import showing_progress
from service.database.connections import connected
from service.history.check import Checked, check_history
from service.history.signer import Signer, make_signer
from service.maintenance import check as checks
from service.maintenance.check import Finding
from service.settings import OTHER_USERS, Settings, read_settings
from service.subscriptions.held_orders import HELD_ORDERS_MAX

# An event is signed about a second after it is recorded.
LAG_SECONDS_MAX: Final = 60.0


async def check(
    *,
    history: Annotated[
        bool,
        typer.Option(
            "--history", help="Compare every event with the history, not only the newest and some others."
        ),
    ] = False,
) -> int | None:
    settings = read_settings()
    async with database(as_service=False) as dsn:
        found = await checks.check_database(
            dsn,
            is_open=settings.is_open,
            retention_days=settings.body_retention_days,
            replica_age_seconds_max=settings.replica_age_seconds_max if settings.read_only else None,
            held_orders_max=HELD_ORDERS_MAX,
        )
        findings = [
            checks.check_webhook(settings),
            *checks.check_settings_file(),
            checks.describe_database(settings, dsn),
            *checks.check_account(settings),
            *found,
        ]
        # Without its schema, the database has no history.
        if checks.is_current(found):
            findings += await _check_history(settings, dsn, whole=history)
    findings += checks.check_embedded(settings, datetime.now(UTC).date())
    for finding in findings:
        show(f"{finding.kind:<5}  {finding.text}")
    return EXIT_FAILURE if any(finding.kind == "WRONG" for finding in findings) else None


async def _check_history(settings: Settings, dsn: str, *, whole: bool) -> list[Finding]:
    signer = make_signer(settings)
    with showing_progress("comparing", MofNCompleteColumn(), "rows", is_shown=whole) as progress:
        # A policy on a table is a function of its owner's; it must not run as the operator.
        async with connected(dsn, row_security="off") as connection:
            checked = await check_history(connection, signer, whole=whole, progress=progress)
    return [*_describe(checked), *_check_key_file(signer)]


def _describe(checked: Checked) -> Iterator[Finding]:
    status = checked.status
    if status.halted is not None:
        yield Finding("WRONG", f"the history is not signed any more: {status.halted}")
    elif status.fault is not None:
        yield Finding("WRONG", f"the history is not signed: {status.fault}")
    elif status.unsigned is not None:
        yield Finding("note", f"this machine does not sign the history: {status.unsigned}")
    if status.halted is None and status.lag_seconds > LAG_SECONDS_MAX:
        yield Finding(
            "note",
            f"the oldest event that is not signed was recorded {status.lag_seconds:,.0f} s ago: see the "
            "service's log for the reason, unless the service has just begun to build the history",
        )
    for position, problem in checked.differences:
        yield Finding("WRONG", f"position {position} differs from the history: {problem}")
    if more := checked.differing - len(checked.differences):
        yield Finding("WRONG", f"further positions that differ from the history: {more:,}")
    for level, number in checked.tiles:
        yield Finding("WRONG", f"the history's tile {number} of level {level} does not fit the tiles below it")
    if not checked.fits_checkpoint:
        yield Finding("WRONG", "the history has another root than its signed checkpoint: it was changed")
    is_whole = not checked.differing and not checked.tiles and checked.fits_checkpoint
    if status.entries and status.halted is None and is_whole:
        yield Finding(
            "ok",
            f"the history has {status.entries:,} entries, of which {status.signed:,} are signed; "
            f"{checked.compared:,} were compared with the log",
        )


def _check_key_file(signer: Signer) -> Iterator[Finding]:
    file = signer.key_file
    if file.exists() and file.stat().st_mode & OTHER_USERS:
        yield Finding("WRONG", f"other users can read the history's key: run 'chmod 600 {quote(str(file))}'")
