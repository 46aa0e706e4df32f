"""Hints name a command that works when pasted into a shell."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from service.command_name import NAME, command_name
from service.version import build_info
from tests.support.folders import ROOT


def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_script: bool) -> Path:
    """Make a folder look like an environment, with a Python and perhaps the script that Make writes."""
    folder = tmp_path / "a clone" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    if has_script:
        (folder / NAME).write_text("#!/bin/sh\necho works\n")
        (folder / NAME).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return folder


def run(command: str, folder: Path) -> str:
    return subprocess.run(["sh", "-c", command], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_a_script_on_the_path_needs_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the script is on the PATH, its name is enough."""
    folder = environment(tmp_path, monkeypatch, has_script=True)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    assert command_name() == NAME
    assert run(command_name(), tmp_path) == "works\n"


def test_a_script_in_the_clone_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path is relative to the clone, as the README writes it; elsewhere it is absolute, and quoted."""
    folder = environment(tmp_path, monkeypatch, has_script=True)
    clone = folder.parents[1]
    monkeypatch.chdir(clone)
    assert command_name() == ".venv/bin/order-tracking"
    assert run(command_name(), clone) == "works\n"
    monkeypatch.chdir("/")
    assert command_name() == shlex.quote(str(folder / NAME))
    assert run(command_name(), Path("/")) == "works\n"


def test_without_a_script_it_is_the_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An environment without the script, such as a developer's own, gets the command that runs the module."""
    executable = sys.executable
    environment(tmp_path, monkeypatch, has_script=False)
    command = command_name()
    assert command.endswith("/python' -m service")
    command = command.replace(shlex.quote(sys.executable), shlex.quote(executable))
    assert run(f"{command} --version", ROOT) == "{version} (commit {commit})\n".format(**build_info())


def test_usage_names_the_command_that_was_found() -> None:
    """The usage line of a real process begins with that command."""
    done = subprocess.run(
        [sys.executable, "-m", "service", "keys", "create"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    expected = ".venv/bin/order-tracking" if (ROOT / ".venv/bin" / NAME).exists() else " -m service"
    assert f"{expected} keys create" in done.stderr
