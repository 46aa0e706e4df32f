"""The command line inside the test process, which is faster than starting a process for each command."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from service.cli.main import cli
from tests.support.processes import environment


class Completed(NamedTuple):
    """The exit code and the output of a command."""

    returncode: int
    stdout: str
    stderr: str


def call_command(state_dir: Path, *arguments: str, **settings: str) -> Completed:
    """Run a command until it exits, with the settings of a service.

    A command runs an event loop. It gets its own thread if the caller's thread already runs one.
    """
    names = environment(state_dir, **settings)
    invoke = partial(CliRunner().invoke, cli, arguments, env=names, prog_name="order-tracking")
    if asyncio._get_running_loop() is None:  # noqa: SLF001 - the public function raises
        done = invoke()
    else:
        with ThreadPoolExecutor(max_workers=1) as thread:
            done = thread.submit(invoke).result()
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return Completed(done.exit_code, done.stdout, done.stderr)
