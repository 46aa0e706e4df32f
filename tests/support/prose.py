"""The prose check of ``make lint``: it fails if a bad habit of language returns.

It reads README.md, docs/, CHANGELOG.md, the comments of schema.sql, the English texts of the pages, and the
comments, docstrings and strings of the code. In tests it reads only comments and docstrings, because their
strings are often inputs.
"""

import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from tests.support.folders import ROOT

# Each pattern with its replacement.
HABITS: Final = {
    r"\bwhoever\b": "name the role: the sender, the operator, a client",
    # "nobody" is also a user of the operating system.
    r"(?<!user )(?<!\")\b(?:some|any|every|no)body\b(?!')": "name the role: the sender, the operator, a client",
    r"\banew\b": "again",
    r"\bbeneath\b": "below",
    r"\bfor ever\b": "permanently",
    r"\bmeanwhile\b": "in the meantime",
    r"\bbelongs? into\b": "belongs in",
    r"(?<!there )\bis none\b": "unknown; invalid; None",
    r"\bas it stands\b": "unchanged",
    r"\bto be had\b": "available",
    r"\bmended\b": "fixed",
    r"\bset aside\b": "parked",
    r"\bthere (?:is|are) \{": "name the values: Known settings: A, B",
    r"(?<!there )(?<!There )\bis no (?!longer\b|more\b|less\b|different\b)[a-z]+": "is not a; invalid; unknown",
    r"\b(?:is|are|was) told\b": "receives; returns; is called with",
    r"\bWhat is no\b": "invalid; malformed",
}
# A relative clause used as a noun, such as "what is written" or "what cannot be parsed".
NOUN_CLAUSE: Final = re.compile(r"\bwhat (?:is|was|were|are|came|comes|cannot|can)\b", re.IGNORECASE)
NOUN_CLAUSES_MAX: Final = 0.3  # per 1,000 words of README and docs
YOU: Final = re.compile(r"\byou(?:r|rs|rself)?\b", re.IGNORECASE)
YOU_MIN: Final = 20.0  # per 1,000 words of README
CODE: Final = re.compile(r"^```.*?^```|`[^`\n]*`", re.MULTILINE | re.DOTALL)
WORD: Final = re.compile(r"[A-Za-z][\w'-]*")

# The table of habits, and files that quote them.
EXCLUDED: Final = {"tests/support/prose.py", "tests/unit/test_prose.py"}


class Text(NamedTuple):
    """A text of a file, and the line on which it begins."""

    file: str
    line: int
    text: str


def find_habits(text: Text) -> Iterator[str]:
    """Yield a line for each habit in a text, with its place, the matched words and the replacement."""
    for pattern, replacement in HABITS.items():
        for match in re.finditer(pattern, text.text):
            line = text.line + text.text.count("\n", 0, match.start())
            yield f"{text.file}:{line}: {match[0]!r}: {replacement}"


def python_texts(file: str, source: str) -> Iterator[Text]:
    """Yield the comments and strings of a Python file; only comments and docstrings if it is a test."""
    is_test = file.startswith("tests/")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_docstring = token.type == tokenize.STRING and token.string.startswith('"""')
        is_string = token.type == tokenize.STRING or tokenize.tok_name[token.type] == "FSTRING_MIDDLE"
        if token.type == tokenize.COMMENT or is_docstring or (is_string and not is_test):
            yield Text(file, token.start[0], token.string)


def all_texts() -> Iterator[Text]:
    """Yield every text that the check reads."""
    for path in sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")]):
        yield Text(_name(path), 1, path.read_text(encoding="utf-8"))
    for path in sorted(
        [ROOT / "schema.sql", ROOT / "Makefile", *ROOT.glob("service/database/migrations/*.sql")]
    ):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield Text(_name(path), number, line)
    messages = ROOT / "service/features/pages/messages.toml"
    for name, (_indonesian, english) in tomllib.loads(messages.read_text(encoding="utf-8")).items():
        yield Text(f"{_name(messages)} ({name})", 1, english)
    for package in ("domain", "projections", "service", "tests"):
        for path in sorted((ROOT / package).rglob("*.py")):
            yield from python_texts(_name(path), path.read_text(encoding="utf-8"))


def rate(pattern: re.Pattern[str], text: str) -> float:
    """Return the number of matches per 1,000 words of a text without its code."""
    prose = CODE.sub(" ", text)
    return 1_000 * len(pattern.findall(prose)) / max(1, len(WORD.findall(prose)))


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def main() -> int:
    """Print every habit and the rates, and return the exit code."""
    habits = [habit for text in all_texts() if text.file not in EXCLUDED for habit in find_habits(text)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    english = (path for path in ROOT.glob("docs/*.md") if not path.name.endswith(".id.md"))
    documents = [readme, *(path.read_text(encoding="utf-8") for path in english)]
    you, noun_clauses = rate(YOU, readme), rate(NOUN_CLAUSE, "\n".join(documents))
    sys.stdout.write("".join(f"{habit}\n" for habit in habits))
    sys.stdout.write(
        f"prose: {you:.0f} times 'you' in 1,000 words of README.md (at least {YOU_MIN:g}); "
        f"{noun_clauses:.1f} times 'what is' as a noun in README.md and docs (at most {NOUN_CLAUSES_MAX:g})\n"
    )
    return 1 if habits or you < YOU_MIN or noun_clauses > NOUN_CLAUSES_MAX else 0


if __name__ == "__main__":
    sys.exit(main())
