from typing import Annotated

import typer

from service.cli.console import EXIT_USAGE, database, err, fail, show
from service.database.connections import connected
from service.database.operations import check_reason, system_user
from service.history import storage
from service.history.notes import make_key
from service.history.restart import restart as restart_history
from service.history.signer import NOTHING, Signer, make_signer
from service.history.status import read_status
from service.settings import Settings, read_settings

NewHistory = Annotated[
    bool,
    typer.Option("--new-history", help="Begin a new history with a new key, and leave the signed one out."),
]

history = typer.Typer(no_args_is_help=True, add_completion=False)


@history.command("key")
async def key() -> None:
    """Print the public keys that sign the history, one on each line. Give them to those who verify proofs."""
    async with database() as dsn, connected(dsn) as connection:
        keys = _signer().find_verifiers(await storage.read_tree(connection))
    if not keys:
        fail("the history has no key yet: run 'serve', which makes one")
    for verifier in keys:
        show(str(verifier))


@history.command("checkpoint")
async def checkpoint() -> None:
    """Print the last signed checkpoint. Keep it elsewhere: it shows later that the history only grew."""
    async with database() as dsn, connected(dsn) as connection:
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
    async with database() as dsn, connected(dsn) as connection:
        status = await read_status(signer, connection)
        if not force and status.entries and not (status.halted or status.fault or status.unsigned):
            fail("the history is signed, so there is nothing to restart; --force restarts it anyway")
        begun = await restart_history(connection, signer, reason, system_user())
    show(f"the history {begun.origin} begins again; the service adds the recorded events to it")
    if not has_key:
        err.print(f"{signer.key_file} did not exist, so there is a new key: give it to all who verify proofs")
    err.print("proofs from before stay valid; tell those who keep a checkpoint why it is not continued")


def keeps_history(settings: Settings, *, new_history: bool) -> bool | None:
    """Return whether to bring a signed history along; None if its key's guard is missing.

    Args:
        settings: the settings.
        new_history: whether the operator wants a new history.
    """
    signer = make_signer(settings)
    files = [file for file in (signer.key_file, signer.guard_file) if file.exists()]
    if signer.read_guard() == NOTHING:
        # A service has made the key, and has signed nothing with it.
        files = []
    if new_history and files:
        names = " and ".join(map(str, files))
        fail(f"--new-history makes a new key: move {names} away, which belong to another history", EXIT_USAGE)
    return False if new_history else len(files) == len((signer.key_file, signer.guard_file)) or None


def _signer() -> Signer:
    return make_signer(read_settings())
