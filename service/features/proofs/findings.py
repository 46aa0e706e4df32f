"""What commands of the core learn of the history: findings of ``check``, its part of a dump, its files."""

from collections.abc import AsyncIterator, Collection, Iterator
from pathlib import Path
from shlex import quote
from typing import Final

from rich.progress import MofNCompleteColumn

from projections.postgres import Connection
from service.console import EXIT_USAGE, fail
from service.features.proofs.check import Checked, check_history
from service.features.proofs.settings import ProofsSettings
from service.features.proofs.signer import NOTHING, Signer, make_signer
from service.maintenance.backup import Part
from service.maintenance.check import Finding
from service.progress import showing_progress
from service.settings import OTHER_USERS

# An event is signed about a second after it is recorded.
LAG_SECONDS_MAX: Final = 60.0
# The flags of ``check`` and of ``restore``.
WHOLE: Final = "history"
NEW_HISTORY: Final = "new_history"
TABLES: Final = "history_"


async def check(
    connection: Connection, settings: ProofsSettings, options: Collection[str]
) -> AsyncIterator[Finding]:
    """Compare the log with the history: its newest part and some others, or the whole with WHOLE."""
    signer, whole = make_signer(settings), WHOLE in options
    with showing_progress("comparing", MofNCompleteColumn(), "rows", is_shown=whole) as progress:
        checked = await check_history(connection, signer, whole=whole, progress=progress)
    for finding in (*_describe(checked), *_check_key_file(signer)):
        yield finding


def find_part(settings: ProofsSettings, options: Collection[str], *, may_be_on: bool) -> Part:
    """Return the part of a dump that has the history.

    Args:
        settings: the settings.
        options: with NEW_HISTORY, the operator wants a new history.
        may_be_on: whether a service may follow the history after the restore, and so needs its key.
    """
    signer, is_new = make_signer(settings), NEW_HISTORY in options
    files = [file for file in (signer.key_file, signer.guard_file) if file.exists()]
    if signer.read_guard() == NOTHING:
        # A service has made the key, and has signed nothing with it.
        files = []
    if is_new and files:
        names = " and ".join(map(str, files))
        fail(f"--new-history makes a new key: move {names} away, which belong to another history", EXIT_USAGE)
    has_key = len(files) == len((signer.key_file, signer.guard_file))
    refusal = (
        "the dump has a signed history, but the guard of its key is not here: copy history.key and "
        "history.signed from the old service, or pass --new-history to begin a new history with a new key"
    )
    return Part(
        TABLES,
        is_kept=not is_new,
        refusal=None if is_new or has_key or not may_be_on else refusal,
        advice="if more entries of the history were signed than the dump has, run 'history restart REASON'"
        if has_key and not is_new
        else "",
    )


def find_files(settings: ProofsSettings) -> list[Path]:
    """Return the files of the key, which a service with another state folder needs too."""
    signer = make_signer(settings)
    return [file for file in (signer.key_file, signer.guard_file) if file.exists()]


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
