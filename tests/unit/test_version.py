"""The commit of a build comes from an archive's or an image's file, or from the repository."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from service.version import COMMIT_FILE, ROOT, UNKNOWN, read_commit

GIT = shutil.which("git")
NO_FILE = Path("/nowhere/commit.txt")
AUTHOR = ("-c", "user.name=Test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false")


def git(folder: Path, *arguments: str) -> str:
    command = [str(GIT), "-C", str(folder), *AUTHOR, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with two commits, whose commit file and attributes are those of this project."""
    if GIT is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "clone"
    (folder / "service").mkdir(parents=True)
    for name in (".gitattributes", "service/commit.txt"):
        shutil.copy(ROOT / name, folder / name)
    git(folder, "init", "--quiet", "--initial-branch", "feature/one")
    git(folder, "add", ".")
    for message in ("First", "Second"):
        git(folder, "commit", "--quiet", "--allow-empty", "--message", message)
    return folder


def test_the_commit_is_that_of_the_work_tree(repository: Path, tmp_path: Path) -> None:
    """The commit is right on a branch, with packed refs, in a linked work tree, and without a branch."""
    commit_file = repository / "service" / "commit.txt"
    assert read_commit(repository, commit_file) == git(repository, "rev-parse", "HEAD")
    linked = tmp_path / "linked"
    git(repository, "worktree", "add", "--quiet", "-b", "other", str(linked), "HEAD~1")
    assert read_commit(linked, commit_file) == git(repository, "rev-parse", "HEAD~1")
    git(repository, "pack-refs", "--all")
    for folder in (repository, linked):
        assert read_commit(folder, commit_file) == git(folder, "rev-parse", "HEAD")
    git(repository, "checkout", "--quiet", "--detach", "HEAD~1")
    assert read_commit(repository, commit_file) == git(repository, "rev-parse", "other")


def test_an_archive_has_its_commit(repository: Path, tmp_path: Path) -> None:
    """``git archive`` writes the commit into the file, which needs no repository."""
    archive, folder = tmp_path / "release.tar", tmp_path / "unpacked"
    git(repository, "archive", "--output", str(archive), "HEAD")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    assert read_commit(folder, folder / "service" / "commit.txt") == git(repository, "rev-parse", "HEAD")


def test_the_file_of_an_image_comes_first(repository: Path, tmp_path: Path) -> None:
    """The build of the image knows the commit, whatever else is in the folder."""
    commit_file = tmp_path / "commit.txt"
    commit_file.write_text(f"{'ab' * 20}\n", encoding="utf-8")
    assert read_commit(repository, commit_file) == "ab" * 20


@pytest.mark.parametrize(
    "head", ["", "ref: refs/heads/absent", "ref: refs/heads/loop", "ref: ../../etc/passwd", "short", "\xff"]
)
def test_a_broken_repository_has_an_unknown_commit(tmp_path: Path, head: str) -> None:
    """A repository without commits, or with a broken HEAD, neither fails nor makes a commit up."""
    (tmp_path / ".git" / "refs" / "heads").mkdir(parents=True)
    (tmp_path / ".git" / "refs" / "heads" / "loop").write_text("ref: refs/heads/loop", encoding="utf-8")
    (tmp_path / ".git" / "HEAD").write_bytes(head.encode("latin-1"))
    assert read_commit(tmp_path, NO_FILE) == UNKNOWN
    assert read_commit(tmp_path / "absent", NO_FILE) == UNKNOWN


def test_the_committed_file_has_no_commit() -> None:
    """In a clone, the file holds only the placeholder, so that a commit does not name an earlier one."""
    placeholder = "$Format:%H$"
    assert COMMIT_FILE.read_text(encoding="utf-8") in {f"{placeholder}\n", f"{read_commit()}\n"}
