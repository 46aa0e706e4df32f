"""The end of a test run: it must leave no process, socket or folder and, on CI, no change in the work tree."""

import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]  # it brings no types
import pytest

from tests.support.folders import ROOT
from tests.support.waiting import PATIENCE_SECONDS, until

# The folder of pytest itself, which keeps the files of failed tests.
PYTEST_FOLDER: Final = "pytest-of-"
MEMORY: Final = Path("/dev/shm")  # noqa: S108 - the folder in it has a random name
MEMORY_BYTES_MIN: Final = 2 * 1024**3
_run_folder = pytest.StashKey[Path]()
_tree_before = pytest.StashKey[str]()


def begin(config: pytest.Config) -> None:
    """Put every file of this run and of its child processes into one temporary directory."""
    if not hasattr(config, "workerinput"):
        # The name is short because the path of a socket is limited to about a hundred bytes.
        folder = Path(tempfile.mkdtemp(prefix="ot-", dir=_memory()))
        folder.chmod(0o711)
        config.stash[_run_folder] = folder
        config.stash[_tree_before] = _tree()
        os.environ["TMPDIR"] = str(folder)
        tempfile.tempdir = str(folder)
    # A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP. Child processes would
    # inherit that. A handler that does nothing ignores the signal here, and child processes start with the
    # default again.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)


def _memory() -> Path | None:
    """Return a file system in memory with enough space for the run, or None.

    Hundreds of databases consist of many files, which memory creates faster than a disk. The tests lose nothing
    by it, because they end processes and never the machine. ``make faults`` uses a disk.
    """
    try:
        system = os.statvfs(MEMORY)
    except OSError:
        return None
    is_fit = system.f_bavail * system.f_frsize >= MEMORY_BYTES_MIN and not system.f_flag & os.ST_NOEXEC
    return MEMORY if is_fit and os.access(MEMORY, os.W_OK) else None


def end(session: pytest.Session) -> None:
    """Fail the run if it left anything behind, and print a line for each leftover."""
    folder = session.config.stash.get(_run_folder, None)
    if folder is None:
        return
    left = [*_files(folder), *_processes(folder)]
    # On other machines a developer may be changing the work tree while the tests run.
    if "CI" in os.environ and (tree := _tree()) != session.config.stash[_tree_before]:
        left.append(f"changes in the work tree:\n{tree}")
    for line in left:
        session.config.get_terminal_writer().line(f"\nthe test run left behind: {line}", red=True)
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return [str(path) for path in folder.iterdir() if not path.name.startswith(PYTEST_FOLDER)]


def _processes(folder: Path) -> list[str]:
    """Return the command lines of processes that name the run's directory, after giving them time to end."""

    def find() -> list[str]:
        commands = (process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"]))
        return [" ".join(command) for command in commands if any(str(folder) in word for word in command)]

    try:
        until(lambda: not find())
    except AssertionError:
        return [f"after {PATIENCE_SECONDS:.0f} s, the process {command}" for command in find()]
    return []


def _tree() -> str:
    """Return the changes that git finds in the work tree, or an empty string without git."""
    try:
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return status.stdout
