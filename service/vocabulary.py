"""The vocabulary file: further status words of the sender, which the operator adds without a change of code."""

import hashlib
import tomllib
from pathlib import Path
from typing import Final, NamedTuple, cast

from domain.statuses import STANDARD_VOCABULARY, STATUSES, Recognise, Status, Vocabulary

# The longest status that the parser accepts.
WORD_CHARACTERS_MAX: Final = 128


class VocabularyFile(NamedTuple):
    """A vocabulary, and the file that it was read from.

    Attributes:
        vocabulary: the words of this release and of the file.
        path: the file, None if there is none.
        sha256: the hash of the file, in hex; None if there is none.
    """

    vocabulary: Vocabulary = STANDARD_VOCABULARY
    path: Path | None = None
    sha256: str | None = None

    @property
    def recognise(self) -> Recognise:
        """The function that returns the status of a reported string, None outside the vocabulary."""
        return self.vocabulary.recognise


def read_vocabulary(path: Path | None) -> VocabularyFile:
    """Read a vocabulary file, in which each line of TOML is ``"word" = "status"``.

    Args:
        path: the file, None for the words of this release alone.

    Raises:
        ValueError: the file cannot be read, or a line of it is invalid. ``str()`` says what to do.
    """
    if path is None:
        return VocabularyFile()
    try:
        content = path.read_bytes()
        words = tomllib.loads(content.decode())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(
            f'{path} is not TOML ({error}): expected lines like "antar ulang" = "problem"'
        ) from None
    for word, status in words.items():
        if isinstance(status, dict):
            raise ValueError(  # noqa: TRY004 - of the file, not of an argument
                f'{path}: {word} is a table: expected lines like "antar ulang" = "problem"'
            )
        if status not in STATUSES:
            raise ValueError(f"{path}: {word!r} = {status!r}: expected one of {', '.join(STATUSES)}")
        if len(word) > WORD_CHARACTERS_MAX:
            raise ValueError(f"{path}: {word[:20]!r}... has more than {WORD_CHARACTERS_MAX} characters")
    try:
        vocabulary = Vocabulary(cast("dict[str, Status]", words))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return VocabularyFile(vocabulary, path, hashlib.sha256(content).hexdigest())
