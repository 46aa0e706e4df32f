"""The image without a container runtime: its build context, and the folder that COPY makes of that."""

import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.support.folders import ROOT

# Variables of an instruction.
ASSIGNMENT: Final = re.compile(r'(\w+)=("[^"]*"|\S*)')


def read_patterns(text: str) -> list[str]:
    """Return the patterns of a .dockerignore."""
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def is_ignored(path: str, patterns: Sequence[str]) -> bool:
    """Return whether a path is left out: the last pattern that matches it or a parent of it decides."""
    parents = path.split("/")
    prefixes = ["/".join(parents[:count]) for count in range(1, len(parents) + 1)]
    ignored = False
    for pattern in patterns:
        expression = _expression(pattern.removeprefix("!").strip("/"))
        if any(expression.fullmatch(prefix) for prefix in prefixes):
            ignored = not pattern.startswith("!")
    return ignored


def _expression(pattern: str) -> re.Pattern[str]:
    translations = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.findall(r"\*\*/|\*\*|\*|\?|\[[^\]]+\]|.", pattern)
    escaped = (part if part.startswith("[") and len(part) > 1 else re.escape(part) for part in parts)
    return re.compile("".join(translations.get(part, text) for part, text in zip(parts, escaped, strict=True)))


def context_files(root: Path = ROOT) -> Iterator[str]:
    """Yield the paths of the files in the build context."""
    patterns = read_patterns((root / ".dockerignore").read_text(encoding="utf-8"))
    for folder, folders, files in os.walk(root):
        inner = Path(folder).relative_to(root)
        # No pattern includes a part of an ignored folder again.
        folders[:] = [name for name in folders if not is_ignored((inner / name).as_posix(), patterns)]
        paths = ((inner / name).as_posix() for name in files)
        yield from (path for path in paths if not is_ignored(path, patterns))


class Image(NamedTuple):
    """The instructions of a Containerfile that a test can follow.

    Attributes:
        folder: the working folder in the image.
        copies: the sources and the target of each COPY.
        commands: the shell command of each RUN.
        variables: the variables that ENV sets.
        entrypoint: the command that runs.
        arguments: its default arguments.
    """

    folder: str
    copies: list[tuple[list[str], str]]
    commands: list[str]
    variables: dict[str, str]
    entrypoint: list[str]
    arguments: list[str]


def read_image(containerfile: str) -> Image:
    """Read a Containerfile."""
    lines = "\n".join(line for line in containerfile.splitlines() if not line.startswith("#"))
    image = Image("", [], [], {}, [], [])
    for line in lines.replace("\\\n", "").splitlines():
        instruction, _, rest = line.partition(" ")
        match instruction:
            case "WORKDIR":
                image = image._replace(folder=rest)
            case "COPY":
                *sources, target = shlex.split(rest)
                image.copies.append((sources, target))
            case "RUN":
                image.commands.append(rest)
            case "ENV":
                image.variables.update((name, value.strip('"')) for name, value in ASSIGNMENT.findall(rest))
            case "ENTRYPOINT":
                image.entrypoint.extend(json.loads(rest))
            case "CMD":
                image.arguments.extend(json.loads(rest))
            case _:
                pass
    return image


def copy_into(folder: Path, image: Image, files: Sequence[str]) -> None:
    """Do what the COPY instructions do, with the files of a build context alone."""
    for sources, target in image.copies:
        for source in sources:
            copied = [path for path in files if path == source or path.startswith(f"{source}/")]
            assert copied, f"COPY {source}: the build context has no such file"
            for path in copied:
                inner = Path(path).relative_to(source) if path != source else Path(source).name
                to = folder / target / inner
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, to)
