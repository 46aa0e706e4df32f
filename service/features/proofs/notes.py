"""Signed notes, their keys, and checkpoints (C2SP signed-note and tlog-checkpoint), with Ed25519."""

import binascii
import hashlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from nacl.exceptions import CryptoError
from nacl.signing import SigningKey as PrivateKey
from nacl.signing import VerifyKey as PublicKey

from service.features.proofs.tree import HASH_BYTES

# The type of a key and of its signatures.
ED25519: Final = b"\x01"
KEY_BYTES: Final = 32
KEY_ID_BYTES: Final = 4
PRIVATE_PREFIX: Final = "PRIVATE+KEY+"
SIGNATURE_PREFIX: Final = "\u2014 "


class NoteError(ValueError):
    """A note, a checkpoint or a key is malformed, or not signed by the key. ``str()`` is the reason."""


class VerifierKey(NamedTuple):
    """A public key and its name. ``str()`` is its text, such as ``example.com/log+1a2b3c4d+AX...``."""

    name: str
    public: bytes

    @property
    def key_id(self) -> bytes:
        """The first four bytes of the hash of the name and the key."""
        return hashlib.sha256(self.name.encode() + b"\n" + ED25519 + self.public).digest()[:KEY_ID_BYTES]

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{b64encode(ED25519 + self.public).decode()}"


class SigningKey(NamedTuple):
    """A private key with the name of its owner. ``text`` is a line of a key file, and secret."""

    name: str
    seed: bytes

    @property
    def verifier(self) -> VerifierKey:
        """The public key."""
        return VerifierKey(self.name, bytes(_private_key(self.seed).verify_key))

    @property
    def text(self) -> str:
        """The key in Go's format."""
        secret = b64encode(ED25519 + self.seed).decode()
        return f"{PRIVATE_PREFIX}{self.name}+{self.verifier.key_id.hex()}+{secret}"

    def __repr__(self) -> str:
        return f"SigningKey({self.name!r})"

    def sign(self, text: str) -> str:
        """Return the signature line of a note with this text."""
        signature = _private_key(self.seed).sign(text.encode()).signature
        return f"{SIGNATURE_PREFIX}{self.name} {b64encode(self.verifier.key_id + signature).decode()}\n"


@lru_cache
def _private_key(seed: bytes) -> PrivateKey:
    return PrivateKey(seed)


def make_key(name: str) -> SigningKey:
    """Return a new key."""
    return SigningKey(name, bytes(PrivateKey.generate()))


def is_key_name(name: str) -> bool:
    """Return whether a key can have this name, and a checkpoint this origin."""
    return (
        name.isprintable()
        and not any(character.isspace() or character == "+" for character in name)
        and name != ""
    )


def read_signing_key(text: str) -> SigningKey:
    """Return the key of a line of a key file.

    Raises:
        NoteError: the line is not an Ed25519 key. The message does not quote it.
    """
    parts = text.removeprefix(PRIVATE_PREFIX).split("+", 2)
    if not text.startswith(PRIVATE_PREFIX) or len(parts) != len(VerifierKey._fields) + 1:
        raise NoteError(f"a line does not have the form {PRIVATE_PREFIX}NAME+ID+KEY")
    name, key_id, encoded = parts
    key = SigningKey(name, _read_key(encoded))
    if not is_key_name(name) or key.verifier.key_id.hex() != key_id:
        raise NoteError(f"the id {key_id} does not belong to the key")
    return key


def read_verifier_key(text: str) -> VerifierKey:
    """Return the key of a text such as ``example.com/log+1a2b3c4d+AX...``.

    Raises:
        NoteError: the text is not such a key.
    """
    name, _, rest = text.strip().partition("+")
    key_id, _, encoded = rest.partition("+")
    key = VerifierKey(name, _read_key(encoded))
    if not is_key_name(name) or key.key_id.hex() != key_id:
        raise NoteError(f"{text.strip()!r} is not a key. Expected NAME+ID+KEY, as 'history key' prints it")
    return key


def _read_key(encoded: str) -> bytes:
    decoded = _decode(encoded)
    if len(decoded) != 1 + KEY_BYTES or decoded[:1] != ED25519:
        raise NoteError("the key is not an Ed25519 key")
    return decoded[1:]


def _decode(encoded: str) -> bytes:
    try:
        return b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise NoteError(f"{encoded[:16]!r} is not base64") from None


def sign_note(text: str, keys: Iterable[SigningKey]) -> str:
    """Return a note with a text, which ends with a line break, signed by each key."""
    return text + "\n" + "".join(key.sign(text) for key in keys)


def open_note(note: str, keys: Sequence[VerifierKey]) -> str:
    """Return the text of a note that one of the keys has signed.

    Raises:
        NoteError: the note is malformed, none of the keys signed it, or a signature of one of them is wrong.
    """
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not signatures.endswith("\n"):
        raise NoteError("it is not a signed note")
    text += "\n"
    by_id = {(key.name, key.key_id): key for key in keys}
    signers = 0
    for line in signatures.splitlines():
        name, _, encoded = line.removeprefix(SIGNATURE_PREFIX).partition(" ")
        signature = _decode(encoded)
        if (key := by_id.get((name, signature[:KEY_ID_BYTES]))) is None:
            continue
        try:
            PublicKey(key.public).verify(text.encode(), signature[KEY_ID_BYTES:])
        except CryptoError:
            raise NoteError(f"the signature of {name} is wrong") from None
        signers += 1
    if not signers:
        raise NoteError("no known key signed it")
    return text


class Checkpoint(NamedTuple):
    """A tree at one of its sizes: the log's origin, the number of entries, and the root hash."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        """The text of its note."""
        return f"{self.origin}\n{self.size}\n{b64encode(self.root).decode()}\n"


def read_checkpoint(text: str) -> Checkpoint:
    """Return the checkpoint of a note's text.

    Raises:
        NoteError: the text is not a checkpoint.
    """
    origin, size, root, *_ = [*text.splitlines(), "", "", ""]
    if not size.isascii() or not size.isdecimal() or str(int(size)) != size or len(_decode(root)) != HASH_BYTES:
        raise NoteError("it is not a checkpoint")
    return Checkpoint(origin, int(size), _decode(root))
