"""The commands of proofs."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Final

import typer

from projections.postgres import Connection
from service.console import EXIT_USAGE, database, err, fail, show
from service.database.connections import connected
from service.database.operations import check_reason, system_user
from service.event_log.store import head_position
from service.features.proofs import FEATURE, storage
from service.features.proofs import verify as verifier
from service.features.proofs.bundles import (
    Bundle,
    NotInHistoryError,
    NotSignedYetError,
    SinceError,
    make_bundle,
)
from service.features.proofs.notes import NoteError, make_key, read_checkpoint
from service.features.proofs.restart import restart as restart_history
from service.features.proofs.settings import ProofsSettings
from service.features.proofs.signer import Signer, make_signer
from service.features.proofs.status import read_status
from service.projecting.position import AFTER_POSITION_SECONDS_MAX
from service.settings import read

# How often a proof that waits for the service's signature is tried again.
POLL_SECONDS: Final = 0.1


async def proof(
    order_no: Annotated[str, typer.Argument(help="The order number.")],
    *,
    bodies: Annotated[
        bool, typer.Option("--bodies", help="Open the commitments to the reports' bodies.")
    ] = False,
    since: Annotated[
        Path | None, typer.Option(help="A file with an older checkpoint, which the proof shall continue.")
    ] = None,
    from_version: Annotated[int, typer.Option(min=1, help="Begin with this version of the order.")] = 1,
    after_position: Annotated[
        int | None,
        typer.Option(min=0, help="Wait until the service has signed this position, such as a receipt's."),
    ] = None,
) -> None:
    signer = _signer()
    size = None if since is None else _read_size(since)
    async with _opened() as connection:
        if after_position is not None and after_position > (head := await head_position(connection)):
            fail(f"the log ends at position {head}, before {after_position}: pass at most {head}")
        make = partial(
            make_bundle,
            *(connection, signer, order_no),
            with_bodies=bodies,
            since=size,
            from_version=from_version,
            after_position=after_position,
            events_max=None,
        )
        try:
            bundle = await _wait_until_signed(make)
        except NotInHistoryError:
            fail(
                f"the signed history has no such event of {order_no}: check the order number and the version; "
                "if the report has just arrived, pass its position as --after-position"
            )
        except NotSignedYetError as error:
            fail(f"{error}, not {after_position}: is the service running? See 'order-tracking check'")
        except SinceError as error:
            fail(error)
    # In ASCII, so that a terminal acts on none of it.
    typer.echo(json.dumps(bundle, indent=2))


async def _wait_until_signed(make: Callable[[], Awaitable[Bundle]]) -> Bundle:
    """Return the bundle as soon as the service has signed its position, for which this waits a while."""
    deadline = monotonic() + AFTER_POSITION_SECONDS_MAX
    while True:
        try:
            return await make()
        except NotSignedYetError:
            if monotonic() >= deadline:
                raise
            await asyncio.sleep(POLL_SECONDS)


def _read_size(file: Path) -> int:
    try:
        return read_checkpoint(file.read_text(encoding="utf-8")).size
    except (OSError, UnicodeError, NoteError) as error:
        fail(f"{file} is not a file with a checkpoint: {error}", EXIT_USAGE)


def verify(
    bundle: Annotated[
        list[str], typer.Argument(help="The file of a proof; all of its files if it has several.")
    ],
    *,
    key: Annotated[str, typer.Option(help="The operator's public key, or a file with it.")],
    since: Annotated[
        str | None, typer.Option(help="A file with an older checkpoint, which the history must continue.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another proof, which must not contradict this one.")
    ] = None,
    scan: Annotated[
        str | None, typer.Option(help="The history's URL, or a folder with its tiles: read every entry.")
    ] = None,
) -> int:
    options = {"--key": key, "--since": since, "--against": against, "--scan": scan}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return verifier.main([*given, "--", *bundle])


history = typer.Typer(no_args_is_help=True, add_completion=False)


@history.command("key")
async def key() -> None:
    """Print the public keys that sign the history, one on each line. Give them to those who verify proofs."""
    async with _opened() as connection:
        keys = _signer().find_verifiers(await storage.read_tree(connection))
    if not keys:
        fail("the history has no key yet: run 'serve', which makes one")
    for one in keys:
        show(str(one))


@history.command("checkpoint")
async def checkpoint() -> None:
    """Print the last signed checkpoint. Keep it elsewhere: it shows later that the history only grew."""
    async with _opened() as connection:
        status = await read_status(_signer(), connection)
    if status.published is None:
        fail("the history has no signed checkpoint yet: run 'serve', and see 'check'")
    typer.echo(status.published.note, nl=False)
    if status.halted is not None:
        err.print(f"this is not the newest checkpoint that was signed: {status.halted}", style="red")


@history.command("new-key")
async def new_key() -> None:
    """Print another private key of the history, for a second line of the key's file. Keep it secret."""
    keys = _signer().read_keys()
    if not keys:
        fail("the history has no key yet: run 'serve', which makes one")
    typer.echo(make_key(keys[0].name).text)


@history.command("restart")
async def restart(
    reason: Annotated[
        str, typer.Argument(help="Why, for everyone who verifies a proof; it is in the history.")
    ],
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Also if the history is signed, such as after a key was stolen.")
    ] = False,
) -> None:
    """Begin the history again, after a restore or a failover that lost signed entries."""
    try:
        check_reason(reason)
    except ValueError as error:
        fail(error, EXIT_USAGE)
    signer = _signer()
    has_key = signer.key_file.exists()
    async with _opened() as connection:
        status = await read_status(signer, connection)
        if not force and status.entries and not (status.halted or status.fault or status.unsigned):
            fail("the history is signed, so there is nothing to restart; --force restarts it anyway")
        begun = await restart_history(connection, signer, reason, system_user())
    show(f"the history {begun.origin} begins again; the service adds the recorded events to it")
    if not has_key:
        err.print(f"{signer.key_file} did not exist, so there is a new key: give it to all who verify proofs")
    err.print("proofs from before stay valid; tell those who keep a checkpoint why it is not continued")


def _signer() -> Signer:
    return make_signer(read(ProofsSettings))


@asynccontextmanager
async def _opened() -> AsyncIterator[Connection]:
    """Yield a connection to a database that has a history, or that a service adds one to."""
    settings = read(ProofsSettings)
    async with database(settings) as dsn, connected(dsn) as connection:
        if settings.features is None and await storage.read_tree(connection) is None:
            problem = f"the feature {FEATURE.name} is off, and there is no history"
            advice = f"add {FEATURE.name} to ORDER_TRACKING_FEATURES: docs/settings.md has the default"
            fail(f"{problem}; {advice}", EXIT_USAGE)
        yield connection
