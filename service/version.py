"""The build: the version of this release, and the commit that its files come from."""

import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from service import VERSION

ROOT: Final = Path(__file__).resolve().parent.parent
# ``git archive`` writes the commit into this file (.gitattributes), and so does the build of the image.
COMMIT_FILE: Final = Path(__file__).with_name("commit.txt")
UNKNOWN: Final = "unknown"
# A ref leads to a commit, or to another ref. A longer chain is a broken repository.
REFS_MAX: Final = 5
GIT_FILE_BYTES_MAX: Final = 16 * 1024 * 1024

_COMMIT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_REF: Final = re.compile(r"ref: (refs/[\w./+@-]+)")


def read_commit(root: Path = ROOT, commit_file: Path = COMMIT_FILE) -> str:
    """Return the commit that the files come from, or "unknown". This reads a few small files, and runs nothing.

    Args:
        root: the folder that may be the work tree of a repository.
        commit_file: the file with the commit of an archive or an image.
    """
    for read, path in ((_read, commit_file), (_read_head, root / ".git")):
        with suppress(OSError, UnicodeError):
            if _COMMIT.fullmatch(commit := read(path)):
                return commit
    return UNKNOWN


@cache
def build_info() -> dict[str, str]:
    """Return this build's ``version`` and ``commit``."""
    return {"version": VERSION, "commit": read_commit()}


def _read(path: Path) -> str:
    with path.open(encoding="utf-8") as file:
        return file.read(GIT_FILE_BYTES_MAX).strip()


def _read_head(folder: Path) -> str:
    """Return the commit of HEAD, or another text if there is none."""
    if folder.is_file():
        # A linked work tree: the file names the folder with its HEAD, which names the one with the branches.
        folder = folder.parent / _read(folder).removeprefix("gitdir: ")
    shared = folder / _read(folder / "commondir") if (folder / "commondir").is_file() else folder
    text = _read(folder / "HEAD")
    for _ in range(REFS_MAX):
        if (match := _REF.fullmatch(text)) is None:
            break
        name = match[1]
        text = _read(shared / name) if (shared / name).is_file() else _find_packed(shared, name)
    return text


def _find_packed(folder: Path, name: str) -> str:
    """Return the commit of a branch in the file of packed refs, or an empty text."""
    lines = _read(folder / "packed-refs").splitlines()
    return next((line.partition(" ")[0] for line in lines if line.partition(" ")[2] == name), "")
