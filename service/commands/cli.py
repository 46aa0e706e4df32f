"""The command line: ``order-tracking`` or ``python -m service``.

Exit codes: 0 done; 1 something is wrong (an unknown order, a difference, a port taken, a replay already
running, a report that was neither advanced nor repeated); 2 misused.
"""

from typing import Annotated, Final

import typer

from service.commands import (
    auditing,
    backing_up,
    checking,
    erasing,
    keys,
    quarantining,
    replaying,
    sending,
    serving,
    simulating,
)
from service.commands.console import out
from service.version import VERSION

cli: Final = typer.Typer(
    name="order-tracking",
    help="Event-sourced tracking of orders shipped through Komerce.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@cli.callback(invoke_without_command=True)
def show_version(
    *, version: Annotated[bool, typer.Option("--version", help="Print the version of this release.")] = False
) -> None:
    if version:
        out.print(VERSION, markup=False)
        raise typer.Exit


for command in (
    serving.serve,
    replaying.replay,
    auditing.audit,
    sending.send,
    sending.token,
    simulating.simulate,
    simulating.register,
    checking.check,
    checking.migrate,
    backing_up.backup,
    backing_up.restore,
    erasing.erase,
):
    cli.command()(command)
cli.add_typer(keys.keys, name="keys")
cli.add_typer(quarantining.quarantine, name="quarantine")
