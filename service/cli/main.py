"""The command line: ``order-tracking`` or ``python -m service``.

Exit codes: 0 done; 1 something is wrong (an unknown order, a difference, a port taken, a replay already
running, a report that was neither advanced nor repeated); 2 misused.
"""

from importlib import import_module
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command

from service import VERSION


class Command(NamedTuple):
    """A command: the module below this package that has a function or a Typer of its name, and its summary."""

    module: str
    summary: str


COMMANDS: Final = {
    "serve": Command("serve", "Serve the webhook and the read API until SIGTERM or Ctrl-C."),
    "replay": Command("replay", "Rebuild the views from the log beside the live ones, then swap them in."),
    "audit": Command("audit", "Print an order's transitions, or the verdicts that today's table changes."),
    "send": Command("send", "Send one webhook as Komerce would, and print the receipt."),
    "token": Command("send", "Generate a webhook token for ORDER_TRACKING_WEBHOOK_TOKENS."),
    "simulate": Command("simulate", "Simulate Komerce, then compare the reports sent with those recorded."),
    "register": Command("simulate", "Register a webhook URL with Komerce; it replaces the previous one."),
    "check": Command("check", "Check settings, database and schema."),
    "migrate": Command("check", "Update the database schema as its owner; 'serve' does this at start."),
    "backup": Command("backup", "Dump the whole database while the service keeps running."),
    "restore": Command("backup", "Restore a dump into an empty database."),
    "erase": Command("erase", "Erase an order's bodies and addresses permanently, and record who and why."),
    "keys": Command("keys", "Create, list and revoke API keys."),
    "quarantine": Command("quarantine", "List, show, retry and discard unparseable bodies."),
}


class Commands(TyperGroup):
    """Imports a command's module when that command is called: all modules together take half a second."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the called command as click does, with the real command in place of its summary."""
        if args[0] in COMMANDS:
            self.commands[args[0]] = _load(args[0])
        return super().resolve_command(ctx, args)


def _load(name: str) -> Any:
    target = getattr(import_module(f"{__package__}.{COMMANDS[name].module}"), name)
    if isinstance(target, typer.Typer):
        target.info.help = COMMANDS[name].summary
        return get_command(target)
    command = typer.Typer(add_completion=False)
    command.command(name, help=COMMANDS[name].summary)(target)
    return get_command(command)


cli: Final = typer.Typer(
    name="order-tracking",
    help="Event-sourced tracking of orders shipped through Komerce.",
    cls=Commands,
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
        typer.echo(VERSION)
        raise typer.Exit


def _summarize(name: str) -> None:
    @cli.command(name, help=COMMANDS[name].summary)
    def summary() -> None:
        """Stand in for the command in --help; ``Commands`` replaces it when the command is called."""


for _name in COMMANDS:
    _summarize(_name)
