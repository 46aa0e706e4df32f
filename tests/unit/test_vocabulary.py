"""A vocabulary file adds words, and an invalid one is refused with the line's word and what to write."""

import hashlib
from pathlib import Path

import pytest

from domain.statuses import ALIASES, STANDARD_VOCABULARY, STATUSES, Vocabulary
from service.features.settings import read_settings
from service.settings import SettingsError
from service.vocabulary import WORD_CHARACTERS_MAX, read_vocabulary


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "words.toml"


def test_without_a_file_the_words_of_the_release_are_known() -> None:
    """The standard vocabulary has no further words."""
    vocabulary = read_vocabulary(None)
    assert (vocabulary.vocabulary, vocabulary.path, vocabulary.sha256) == (STANDARD_VOCABULARY, None, None)
    assert STANDARD_VOCABULARY.own_words == {}
    assert all(STANDARD_VOCABULARY.words(status) == [*ALIASES[status]] for status in STATUSES)


def test_a_file_adds_words(file: Path) -> None:
    """Words are normalised as reported strings are. A word of the release may be repeated with its meaning."""
    content = b'# courier words\n"Antar_ULANG" = "problem"\nsampai = "delivered"\ndikirim = "in_transit"\n'
    file.write_bytes(content)
    vocabulary = read_vocabulary(file)
    assert vocabulary.sha256 == hashlib.sha256(content).hexdigest()
    assert vocabulary.vocabulary.own_words == {"antar ulang": "problem", "sampai": "delivered"}
    assert vocabulary.vocabulary.words("delivered") == [*ALIASES["delivered"], "sampai"]
    assert [vocabulary.recognise(word) for word in (" antar-ulang ", "SAMPAI", "Dikirim", "x")] == [
        *("problem", "delivered", "in_transit", None)
    ]
    assert STANDARD_VOCABULARY.recognise("sampai") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'sampai = "arrived"\n', "'sampai' = 'arrived': expected one of submitted, packed, "),
        (b"sampai = 1\n", "'sampai' = 1: expected one of submitted, "),
        (b'[delivered]\nsampai = "delivered"\n', "delivered is a table: expected lines like "),
        (b'antar.ulang = "problem"\n', "antar is a table: expected lines like "),
        (b'Antar Ulang = "problem"\n', 'expected lines like "antar ulang" = "problem"'),
        (b"\xff\n", 'expected lines like "antar ulang" = "problem"'),
        (b'"sampai" = "problem"\n"SAMPAI" = "delivered"\n', "'SAMPAI' already means problem, so it cannot "),
        (b'"terkirim" = "in_transit"\n', "'terkirim' already means delivered, so it cannot mean in_transit"),
        (b'" _ " = "problem"\n', "' _ ' is blank: expected a status word of the sender"),
        (
            b'"' + b"x" * (WORD_CHARACTERS_MAX + 1) + b'" = "problem"\n',
            f"has more than {WORD_CHARACTERS_MAX} characters",
        ),
    ],
)
def test_an_invalid_file_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    """The start fails with one line that names the setting, the file, the word, and what is expected."""
    file.write_bytes(content)
    (file.parent / ".env").touch()
    monkeypatch.setenv("ORDER_TRACKING_ENV_FILE", str(file.parent / ".env"))
    monkeypatch.setenv("ORDER_TRACKING_VOCABULARY_FILE", str(file))
    with pytest.raises(SettingsError) as raised:
        read_settings()
    text = str(raised.value)
    assert text.startswith(f"ORDER_TRACKING_VOCABULARY_FILE: {file}")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("name", ["absent.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    """A missing file and a folder are refused with the operating system's reason."""
    with pytest.raises(ValueError, match=r"cannot read .*: (No such file|Is a directory)"):
        read_vocabulary(tmp_path / name)


def test_a_vocabulary_recognises_what_it_lists() -> None:
    """Every word that a vocabulary lists for a status means that status."""
    vocabulary = Vocabulary({"Antar Ulang": "problem"})
    for status in STATUSES:
        assert {vocabulary.recognise(word) for word in vocabulary.words(status)} == {status}
