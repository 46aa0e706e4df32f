"""Temporary folders that PostgreSQL's own user can reach.

If root runs the tests, that user cannot reach the folders that pytest makes.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]


def make_folder() -> Path:
    """Create an empty folder; the caller removes it."""
    folder = Path(tempfile.mkdtemp(prefix="test-"))
    folder.chmod(0o711)
    return folder


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Create an empty folder for the length of the block."""
    folder = make_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def copied_folder(source: Path) -> Iterator[Path]:
    """Copy a folder, including owners and modes, for the length of the block."""
    with temporary_folder() as folder:
        copy = folder / "state"
        subprocess.run(["cp", "-a", source, copy], check=True)
        yield copy
