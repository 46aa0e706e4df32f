"""The command line: ``order-tracking`` or ``python -m service``.

Exit codes: 0 success; 1 failure (such as an unknown order, a difference, a port in use, a replay that is
already running, or a report that was neither advanced nor repeated); 2 wrong usage.
"""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from inspect import Parameter, Signature, signature
from pkgutil import resolve_name
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup
from typer.main import get_command

from service.feature import Command, Feature, Option
from service.features import FEATURES
from service.version import build_info

# A command is a function, a coroutine function or a Typer; its module has the same name, with underscores. See
# ``runnable``.
# Pairs, not a dictionary, because bandit would take the summary of "token" for a password.
CORE: Final = (
    ("serve", "Serve the webhook and the read API until SIGTERM or Ctrl-C."),
    ("replay", "Rebuild the views from the log beside the live ones, then swap them in."),
    ("audit", "Print an order's transitions."),
    ("rejudge", "Judge unrecognised reports again whose word has become known."),
    ("send", "Send one webhook as Komerce would, and print the receipt."),
    ("token", "Generate a webhook token for ORDER_TRACKING_WEBHOOK_TOKENS."),
    ("register", "Register a webhook URL with Komerce; it replaces the previous one."),
    ("check", "Check settings, database and schema."),
    ("migrate", "Update the database schema as its owner; 'serve' does this at start."),
    ("backup", "Dump the whole database while the service keeps running."),
    ("restore", "Restore a dump into an empty database."),
    ("import-reports", "Record reports that no webhook brought, from a CSV or NDJSON file."),
    ("reconcile", "List orders without news, as the file that 'import-reports' takes."),
    ("move", "Move the whole log to another database, where the service goes on."),
    ("erase", "Erase an order's bodies and addresses permanently, and record who and why."),
    ("keys", "Create, list and revoke API keys."),
    ("quarantine", "List, show, retry and discard unparseable bodies."),
)


def _locate(name: str) -> str:
    function = name.replace("-", "_")
    return f"{__package__}.{function}:{function}"


# Each command with its feature, None for the core's own.
COMMANDS: Final[dict[str, tuple[Command, Feature | None]]] = {
    **{
        name: (Command(name, summary, _locate(name), works_always=name == "token"), None)
        for name, summary in CORE
    },
    **{command.name: (command, feature) for feature in FEATURES for command in feature.commands},
}


class Commands(TyperGroup):
    """Imports a command's module when that command is called: all modules together take half a second."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the called command as click does, with the real command instead of its stand-in."""
        if args[0] in COMMANDS:
            self.commands[args[0]] = _load(args[0])
        return super().resolve_command(ctx, args)


@cache
def _load(name: str) -> Any:
    from service.console import runnable  # noqa: PLC0415 - --help does without it

    command, feature = COMMANDS[name]
    function = resolve_name(command.location)
    app = function
    if not isinstance(function, typer.Typer):
        app = typer.Typer(add_completion=False)
        options = [option for one in FEATURES for option in one.options if option.command == name]
        app.command(name, help=command.summary)(_with_options(function, options) if options else function)
    app.info.help = command.summary
    for registered in app.registered_commands:
        callback = registered.callback if command.works_always else _checked(registered.callback, feature)
        registered.callback = runnable(callback)
    return get_command(app)


def _with_options(function: Callable[..., Any], options: Sequence[Option]) -> Callable[..., Any]:
    """Return a function that takes the flags of features, and passes on the names of those that are set."""

    @wraps(function)
    def call(**arguments: Any) -> Any:
        flags = {option.name for option in options if arguments.pop(option.name)}
        return function(**arguments, options=flags)

    parameters = [one for one in signature(function).parameters.values() if one.name != "options"]
    for option in options:
        annotation = Annotated[bool, typer.Option(f"--{option.name.replace('_', '-')}", help=option.help)]
        parameters.append(Parameter(option.name, Parameter.KEYWORD_ONLY, default=False, annotation=annotation))
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # which typer reads
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def _checked(callback: Callable[..., Any], feature: Feature | None) -> Callable[..., Any]:
    """Return a command that fails if a setting is invalid or unknown, or if its feature is switched off."""

    @wraps(callback)
    def call(**arguments: Any) -> Any:
        from service.console import EXIT_USAGE, fail  # noqa: PLC0415 - --help does without it
        from service.features.settings import read_settings  # noqa: PLC0415 - the same

        listed = read_settings().features
        if feature is not None and feature.run and listed is not None and feature.name not in listed:
            wanted = ",".join((*listed, feature.name))
            fail(f"the feature {feature.name} is off: set ORDER_TRACKING_FEATURES={wanted}", EXIT_USAGE)
        return callback(**arguments)

    return call


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


for _name, (_command, _) in COMMANDS.items():
    cli.command(_name, help=_command.summary)(_stand_in)
