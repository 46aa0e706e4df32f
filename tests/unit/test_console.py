"""The output of commands: whatever a sender or an endpoint wrote, a terminal acts on none of it."""

import ast
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import pytest
import structlog
import typer

from service import console
from service.cli import startup
from service.features.settings import Settings
from tests.support.folders import ROOT

# Colours, a title, a cleared screen, a link, the 8-bit CSI, a right-to-left override, and a line of its own.
HOSTILE: Final = "a\x1b[31mb\x1b]0;x\x07\x1b[2J\x1b]8;;http://x\x1b\\\x9b31m\u202e\r\n[red]c[/red]"
# Modules that write data: a dump, a CSV, a body byte for byte, JSON in ASCII, and notes of the operator's own.
WRITERS: Final = {"main.py", "proofs/commands.py", "quarantine.py", "reconcile.py"}


def log(text: str) -> None:
    """Log a text as 'serve' does."""
    startup.configure_logs(Settings())
    structlog.get_logger().warning(text, text=text, error=text)
    structlog.reset_defaults()


@pytest.mark.parametrize(
    "write",
    [
        console.show,
        console.fail,
        console.out.print,
        console.err.print,
        lambda text: console.show_table(("name",), [(text,)], text),
        log,
    ],
)
def test_no_output_holds_what_a_terminal_acts_on(
    write: Callable[[str], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts, errors, tables and logs are printed with every unprintable character escaped."""
    with suppress(typer.Exit):
        write(HOSTILE)
    printed = "".join(capsys.readouterr())
    assert "\\x1b[2J" in printed
    assert not [one for one in printed if not one.isprintable() and one != "\n"], printed


def test_commands_print_by_the_console_alone() -> None:
    """No other module of the command line writes to a terminal by itself, except those that write data."""
    found = set()
    commands = (ROOT / "service/features").glob("*/commands.py")
    for file in (*(ROOT / "service/cli").glob("*.py"), *commands):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            call = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            used = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            if call in {"print", "typer.echo", "Console"} or used == "sys.stdout":
                found.add(file.name if file.parent.name == "cli" else f"{file.parent.name}/{file.name}")
    assert found - {"startup.py"} == WRITERS
