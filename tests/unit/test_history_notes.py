"""Signed notes and their keys: the example of Go's package, and every way in which one can be wrong."""

import pytest

from service.features.proofs.notes import (
    Checkpoint,
    NoteError,
    is_key_name,
    make_key,
    open_note,
    read_checkpoint,
    read_signing_key,
    read_verifier_key,
    sign_note,
)

# From the documentation of golang.org/x/mod/sumdb/note.
PRIVATE = "PRIVATE+KEY+PeterNeumann+c74f20a3+AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz"
PUBLIC = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
SIGNED = (
    f"{TEXT}\n"
    "\u2014 PeterNeumann "
    "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)


def test_the_example_of_go() -> None:
    """A key, its public part, and a note are those of Go."""
    key = read_signing_key(PRIVATE)
    assert (key.text, str(key.verifier)) == (PRIVATE, PUBLIC)
    assert read_verifier_key(PUBLIC) == key.verifier
    assert sign_note(TEXT, [key]) == SIGNED
    assert open_note(SIGNED, [key.verifier]) == TEXT


def test_a_secret_is_not_shown() -> None:
    """Neither the representation of a key nor an error about one shows it."""
    assert "AYEK" not in repr(read_signing_key(PRIVATE))
    with pytest.raises(NoteError) as info:
        read_signing_key(PRIVATE.replace("c74f20a3", "00000000"))
    assert "AYEK" not in str(info.value)


def test_several_keys_sign_one_note() -> None:
    """During a rotation, each key signs, and a verifier of either accepts the note."""
    old, new = make_key("log"), make_key("log")
    note = sign_note(TEXT, [old, new])
    assert open_note(note, [old.verifier]) == open_note(note, [new.verifier]) == TEXT
    with pytest.raises(NoteError, match="no known key"):
        open_note(note, [make_key("log").verifier])


@pytest.mark.parametrize(
    "note",
    [
        "",
        TEXT,
        SIGNED[:-1],
        SIGNED.replace("problem,", "problem;"),
        SIGNED.replace("PeterNeumann", "Other"),
        SIGNED.replace("x08go/ZJ", "x08go/ZK"),
        SIGNED.replace("x08go", "\u00e9"),
        SIGNED.replace("nAM=", ""),  # a signature that is too short
    ],
)
def test_a_wrong_note_is_refused(note: str) -> None:
    """A note that is cut off, changed, or signed by another key has no text."""
    with pytest.raises(NoteError):
        open_note(note, [read_verifier_key(PUBLIC)])


@pytest.mark.parametrize("text", ["", "log+1+2", PUBLIC[:-4], PUBLIC.replace("ARpc", "ASpc"), f"a {PUBLIC}"])
def test_a_wrong_key_is_refused(text: str) -> None:
    """A text that is not a key names the form of one."""
    with pytest.raises(NoteError):
        read_verifier_key(text)


@pytest.mark.parametrize("text", ["", "log\n", "log\n1\n", "log\n01\nAA==\n", "log\n-1\n\n", "log\nx\n\n"])
def test_a_wrong_checkpoint_is_refused(text: str) -> None:
    """A text that is not a checkpoint is refused."""
    with pytest.raises(NoteError):
        read_checkpoint(text)


def test_a_checkpoint_can_be_read_again() -> None:
    """Lines after the root belong to others (tlog-checkpoint)."""
    checkpoint = Checkpoint("shop.example/orders", 12, bytes(range(32)))
    assert read_checkpoint(checkpoint.text) == checkpoint
    assert read_checkpoint(f"{checkpoint.text}more\n") == checkpoint


def test_the_names_of_keys() -> None:
    """A name has neither spaces nor a plus."""
    assert is_key_name("shop.example/orders")
    assert not any(map(is_key_name, ("", "a b", "a+b", "a\n", "a\u2003b")))
