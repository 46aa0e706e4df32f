"""The README's commands run unchanged, and its tables and links agree with the code."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from domain.statuses import STATUSES, Status
from domain.transitions import Leg, judge
from service.features.settings import Settings
from tests.support.folders import ROOT
from tests.support.processes import RunningService, environment
from tests.support.waiting import PATIENCE_SECONDS

README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS_PAGE = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
INDONESIAN = (ROOT / "docs" / "README.id.md").read_text(encoding="utf-8")
STATUSES_PAGE = (ROOT / "docs" / "statuses.md").read_text(encoding="utf-8")
WORDS_MAX = 1_800
IMAGES_BYTES_MAX = 200_000

# Text that differs between runs. All other text is compared unchanged.
VARYING = {
    r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}": "ID",
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)": "TIME",
}


def steps() -> list[tuple[str, str]]:
    """Return each command of the README's console blocks with its documented output."""
    found = []
    for block in re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = step.partition("\n")
            found.append((command, output))
    return found


def pattern_of(written: str) -> str:
    """Return a pattern for documented output, in which three dots stand for any text."""
    return r".*?".join(re.escape(part) for part in levelled(written).strip().split("..."))


def levelled(text: str) -> str:
    for varying, name in VARYING.items():
        text = re.sub(varying, name, text)
    return text


@pytest.mark.skipif(shutil.which("curl") is None, reason="the README's commands use curl")
def test_the_first_five_minutes_are_true(service: RunningService, tmp_path: Path) -> None:
    """Every command of the README, run in order with a new service, prints its documented output.

    The test takes about 7 s, because each command is a process.
    """
    tool = tmp_path / "order-tracking"
    tool.write_text(
        f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m service "$@"\n', encoding="utf-8"
    )
    tool.chmod(0o755)
    commands = steps()
    assert len(commands) >= 8
    for command, written in commands:
        run = command.replace("http://127.0.0.1:8080", service.url).replace(
            ".venv/bin/order-tracking", str(tool)
        )
        done = subprocess.run(
            ["sh", "-c", run],
            env=environment(service.state_dir),
            cwd=service.state_dir,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert done.returncode == 0, (command, done.stderr)
        assert re.fullmatch(pattern_of(written), levelled(done.stdout).strip(), re.DOTALL), (
            command,
            done.stdout,
        )


def test_the_diagram_draws_legal_moves_only() -> None:
    """Each arrow is a move that advances without skipped stages, and the diagram has every status."""
    (diagram,) = re.findall(r"^```mermaid\nstateDiagram-v2\n(.*?)^```", STATUSES_PAGE, re.MULTILINE | re.DOTALL)
    arrows = re.findall(r"^ +(\S+) --> (\S+)$", diagram, re.MULTILINE)
    drawn = {name for arrow in arrows for name in arrow if name != "[*]"}
    assert drawn == set(STATUSES)
    for origin, reported in arrows:
        if "[*]" in {origin, reported}:
            continue
        leg: Leg | None = "on_the_way_out" if origin == "problem" else None
        judgement = judge(cast("Status", origin), leg, cast("Status", reported))
        assert (judgement.verdict, judgement.skipped) == ("advanced", ()), (origin, reported)


def test_every_setting_is_in_the_table() -> None:
    """The table has each setting by its full name, with its meaning."""
    rows = dict(re.findall(r"^\| `ORDER_TRACKING_([A-Z_]+)` \| .*? \| (.*?) \|$", SETTINGS_PAGE, re.MULTILINE))
    assert set(rows) == {name.upper() for name in Settings.model_fields}
    for name, field in Settings.model_fields.items():
        assert field.description is not None
        assert rows[name.upper()].replace("`", "") == field.description, name


def test_its_files_exist() -> None:
    """Every link to a file and every path of a source file leads to an existing file."""
    for path in re.findall(r"\]\((docs/[^)#]+)[^)]*\)|`((?:service|domain|projections)/[\w/]+\.py)`", README):
        assert (ROOT / (path[0] or path[1])).is_file(), path


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)


def code_spans(text: str) -> set[str]:
    """Return the commands, names and values in a text, without its code blocks."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"`([^`\n]+)`", prose))


def test_its_first_half_exists_in_indonesian() -> None:
    """Up to "How it works", both languages have the same code, the same names and as many sections."""
    first_half, heading, _ = README.partition("## How it works\n")
    assert heading
    assert code_blocks(INDONESIAN) == code_blocks(first_half)
    assert code_spans(INDONESIAN) == code_spans(first_half)
    assert INDONESIAN.count("\n## ") == first_half.count("\n## ")
    assert INDONESIAN.count("\n|") == first_half.count("\n|")
    # Readers find either language at the top of the other.
    assert README.splitlines()[2] == "[Bahasa Indonesia](docs/README.id.md)"
    assert INDONESIAN.splitlines()[2] == "[English](../README.md)"


def test_the_files_of_the_indonesian_half_exist() -> None:
    """Every link to a file leads to an existing file, from the folder of the Indonesian text."""
    links = re.findall(r"\]\(([^)#]+)", INDONESIAN)
    assert len(links) >= 8
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []


def test_it_is_short() -> None:
    """The README is short, and its two pictures are small enough to load quickly."""
    assert len(README.split()) <= WORDS_MAX
    images = re.findall(r"!\[[^\]]+\]\((docs/images/[^)]+)\)", README)
    assert len(images) == 2
    assert sum((ROOT / image).stat().st_size for image in images) < IMAGES_BYTES_MAX
