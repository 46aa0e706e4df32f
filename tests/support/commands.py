"""The command line inside the test process: quicker than a process of its own, and by the same code."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from service.cli.main import cli
from tests.support.processes import environment


class Called(NamedTuple):
    """How a command ended, and its output."""

    returncode: int
    stdout: str
    stderr: str


def call_command(state_dir: Path, *arguments: str, **settings: str) -> Called:
    """Run a command to its end, with the settings of a service.

    Commands run an event loop: if the caller's thread has one, the command gets a thread to itself.
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
    return Called(done.exit_code, done.stdout, done.stderr)
