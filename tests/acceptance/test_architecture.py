"""docs/architecture.md: its paths name real files that import each other, and its recipes work."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.support.folders import ROOT, temporary_folder

PAGE: Final = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
SECTIONS: Final = dict(re.findall(r"^##+ (.+)\n((?:(?!##)(?:```[\s\S]*?^```|.*)\n)*)", PAGE, re.MULTILINE))
PATHS: Final = [title for title in SECTIONS if title.startswith("The path of")]
PATHS_EXPECTED: Final = 5
RECIPES: Final = [
    "Add a status word",
    "Add a view",
    "Add a column to a view",
    "Add an endpoint",
    "Add a feature",
]
# A step of a path, and the files below it that the step uses.
STEP: Final = re.compile(r"^(\d+)\. `([\w./]+)`|^   - `([\w./]+)`", re.MULTILINE)
# A change of a recipe: the verb, the file, the language of its block, and the block.
CHANGE: Final = re.compile(r"^(Create|In) `([\w./]+)`:\n\n```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND: Final = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RECIPE_SECONDS_MAX: Final = 240


def test_the_page_has_every_path() -> None:
    """The page describes the paths of a report, of an event, of a read, of a delivery and of an entry."""
    assert len(PATHS) == PATHS_EXPECTED


def module(path: str) -> str:
    return path.removesuffix(".py").replace("/", ".")


def imports(file: str, imported: str) -> bool:
    """Return whether a file imports a module, as a whole or names from it."""
    text = (ROOT / file).read_text(encoding="utf-8")
    package, _, name = module(imported).rpartition(".")
    return bool(
        re.search(rf"^\s*from {re.escape(module(imported))} import ", text, re.MULTILINE)
        or re.search(rf"^\s*from {re.escape(package)} import [^\n]*\b{name}\b", text, re.MULTILINE)
    )


@pytest.mark.parametrize("title", PATHS)
def test_each_step_of_a_path_imports_the_next(title: str) -> None:
    """Each numbered file exists and imports the next one and the files that are listed below it."""
    step, number = "", 0
    for match in STEP.finditer(SECTIONS[title]):
        file = match[2] or match[3]
        assert (ROOT / file).is_file(), file
        if step:
            assert imports(step, file), f"{step} does not import {file}"
        if match[2]:
            step, number = file, number + 1
            assert int(match[1]) == number
    assert number >= 3


def change(folder: Path, verb: str, file: str, language: str, block: str) -> None:
    """Make one change of a recipe."""
    path = folder / file
    if verb == "Create":
        assert not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block, encoding="utf-8")
        return
    assert language == "diff"
    lines = block.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if not line.startswith("+"))
    after = "".join(line[1:] for line in lines if not line.startswith("-"))
    text = path.read_text(encoding="utf-8")
    assert text.count(before) == 1, f"{file} has not exactly one place like this:\n{before}"
    path.write_text(text.replace(before, after), encoding="utf-8")


def run(folder: Path, *command: str) -> str:
    """Run a command in a folder as if no test called it, and return its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=RECIPE_SECONDS_MAX,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_recipes_work_one_after_the_other() -> None:
    """A copy of the repository with the changes of every recipe passes the recipes' tests and the linter."""
    commands = []
    with temporary_folder() as folder:
        copy = folder / "copy"
        ignored = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for recipe in RECIPES:
            changes = CHANGE.findall(SECTIONS[recipe])
            assert changes
            for verb, file, language, block in changes:
                change(copy, verb, file, language, block)
            commands += COMMAND.findall(SECTIONS[recipe])
        assert len(commands) == len(RECIPES)
        run(copy, "-m", "ruff", "check", "--no-cache", "domain", "projections", "service", "tests")
        run(copy, "-m", "ruff", "format", "--no-cache", "--check", "domain", "projections", "service")
        lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
        assert "0 broken" in run(copy, "-c", lint)
        # One run for all recipes: it starts one server.
        files = [file for command in commands for file in shlex.split(command.replace("\\\n", ""))[3:]]
        run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
