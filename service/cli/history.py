from typing import Annotated

import typer

from service.cli.console import EXIT_USAGE, database, err, fail, show
from service.database.connections import connected
from service.database.operations import check_reason, system_user
from service.history import storage
from service.history.restart import restart as restart_history
from service.history.signer import Signed, Signer, make_signer, read_published
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
    typer.echo((await _read_published()).note, nl=False)


@history.command("restart")
async def restart(
    reason: Annotated[
        str, typer.Argument(help="Why, for everyone who verifies a proof; it is in the history.")
    ],
) -> None:
    """Begin the history again, after a restore or a failover that lost signed entries."""
    try:
        check_reason(reason)
    except ValueError as error:
        fail(error, EXIT_USAGE)
    async with database() as dsn, connected(dsn) as connection:
        begun = await restart_history(connection, _signer(), reason, system_user())
    show(f"the history {begun.origin} begins again; the service adds the recorded events to it")
    err.print("proofs from before stay valid; tell those who keep a checkpoint why it is not continued")


def keeps_history(settings: Settings, *, new_history: bool) -> bool | None:
    """Return whether to bring a signed history along; None if its key's guard is missing.

    Args:
        settings: the settings.
        new_history: whether the operator wants a new history.
    """
    signer = make_signer(settings)
    if new_history and signer.guard_file.exists():
        fail(
            f"--new-history makes a new key, but {signer.key_file} has signed a history: move it and "
            f"{signer.guard_file.name} away",
            EXIT_USAGE,
        )
    return False if new_history else signer.guard_file.exists() or None


def _signer() -> Signer:
    return make_signer(read_settings())


async def _read_published() -> Signed:
    async with database() as dsn, connected(dsn) as connection:
        tree = await storage.read_tree(connection)
        signed = None
        if tree is not None:
            signed = await read_published(connection, tree, _signer().find_verifiers(tree))
    if signed is None:
        fail("the history has no signed checkpoint yet: run 'serve', and see 'check'")
    return signed
