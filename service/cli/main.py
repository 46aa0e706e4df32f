"""The command line: ``order-tracking`` or ``python -m service``.

Exit codes: 0 success; 1 failure (such as an unknown order, a difference, a port in use, a replay that is
already running, or a report that was neither advanced nor repeated); 2 wrong usage.
"""

from functools import cache
from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from service.build import build_info

# A command is a function, a coroutine function or a Typer; its module has the same name, with underscores. See
# ``runnable``.
# Pairs, not a dictionary, because bandit would take the summary of "token" for a password.
COMMANDS: Final = (
    ("serve", "Serve the webhook and the read API until SIGTERM or Ctrl-C."),
    ("replay", "Rebuild the views from the log beside the live ones, then swap them in."),
    ("audit", "Print an order's transitions."),
    ("proof", "Print the proof of an order's timeline, which 'verify' verifies."),
    ("verify", "Verify the proof of an order's timeline, offline."),
    ("history", "Print the history's key and checkpoint, and restart it after a loss."),
    ("rejudge", "Judge unrecognised reports again whose word has become known."),
    ("send", "Send one webhook as Komerce would, and print the receipt."),
    ("token", "Generate a webhook token for ORDER_TRACKING_WEBHOOK_TOKENS."),
    ("simulate", "Simulate Komerce, then compare the reports sent with those recorded."),
    ("register", "Register a webhook URL with Komerce; it replaces the previous one."),
    ("check", "Check settings, database and schema."),
    ("migrate", "Update the database schema as its owner; 'serve' does this at start."),
    ("backup", "Dump the whole database while the service keeps running."),
    ("restore", "Restore a dump into an empty database."),
    ("import-reports", "Record reports that no webhook brought, from a CSV or NDJSON file."),
    ("reconcile", "List orders without news, as the file that 'import-reports' takes."),
    ("move", "Move the whole log to another database, where the service goes on."),
    ("erase", "Erase an order's bodies and addresses permanently, and record who and why."),
    ("share", "Print a link to an order's page for its buyer, who needs no key."),
    ("unshare", "Revoke a link that 'share', the API or an order's page made."),
    ("keys", "Create, list and revoke API keys."),
    ("subscriptions", "Send order events to your own endpoints: add, list, test, pause, replay, remove."),
    ("quarantine", "List, show, retry and discard unparseable bodies."),
)
SUMMARIES: Final = dict(COMMANDS)


class Commands(TyperGroup):
    """Imports a command's module when that command is called: all modules together take half a second."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the called command as click does, with the real command instead of its stand-in."""
        if args[0] in SUMMARIES:
            self.commands[args[0]] = _load(args[0])
        return super().resolve_command(ctx, args)


@cache
def _load(name: str) -> Any:
    from service.cli.console import runnable  # noqa: PLC0415 - --help does without it

    function = name.replace("-", "_")
    command = getattr(import_module(f"{__package__}.{function}"), function)
    app = command
    if not isinstance(command, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command(name, help=SUMMARIES[name])(command)
    app.info.help = SUMMARIES[name]
    for registered in app.registered_commands:
        registered.callback = runnable(registered.callback)
    return get_command(app)


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
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and the commit of this release.")
    ] = False,
) -> None:
    if version:
        typer.echo("{version} (commit {commit})".format_map(build_info()))
        raise typer.Exit


def _stand_in() -> None:
    """Stand in for a command in --help; ``Commands`` replaces it when the command is called."""


for _name, _summary in COMMANDS:
    cli.command(_name, help=_summary)(_stand_in)
