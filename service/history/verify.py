"""Verify the proof of an order's timeline: offline, with this one file, Python 3.9 or newer, and a public key.

    python3 verify.py KOM1.proof.json --key 'shop.example/orders+1a2b3c4d+AX...'

The exit code is 0 if the proof is valid, 1 if it is not, and 2 if the command is wrong. A proof of more than
1,000 events has several files: pass all of them, in their order.
"""

import argparse
import base64
import hashlib
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

VALID, INVALID, USAGE = 0, 1, 2
CLAIMS = """
Proven: what is shown was recorded, in this order, nothing between left out, unaltered since checkpoint {size}.
Stated by the operator's signature: that nothing follows before {size}.
Not claimed: that everything that was sent was recorded (a receipt names position and report_id), that clocks
were right, that what Komerce said is true."""


def require(condition: Any, reason: str) -> None:
    if not condition:
        raise ValueError(reason)


# Ed25519 (RFC 8032). A point is (X, Y, Z, T) with x = X/Z, y = Y/Z, x*y = T/Z.
P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, P - 2, P) % P
ROOT_OF_MINUS_1 = pow(2, (P - 1) // 4, P)
BASE = (4 * pow(5, P - 2, P) % P).to_bytes(32, "little")


def decode_point(data: bytes) -> Any:
    y, sign = int.from_bytes(data, "little") & (1 << 255) - 1, data[31] >> 7
    square = (y * y - 1) * pow(D * y * y + 1, P - 2, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if x * x % P == square else x * ROOT_OF_MINUS_1 % P
    require(y < P and x * x % P == square and not (x == 0 and sign), "a signature is malformed")
    x = x if x & 1 == sign else P - x
    return x, y, 1, x * y % P


def add(p: Any, q: Any) -> Any:
    a, b = (p[1] - p[0]) * (q[1] - q[0]), (p[1] + p[0]) * (q[1] + q[0])
    c, d = 2 * p[3] * q[3] * D, 2 * p[2] * q[2]
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def multiply(number: int, point: Any, total: Any = (0, 1, 1, 0)) -> Any:
    for bit in f"{number:b}"[::-1]:
        total = add(total, point) if bit == "1" else total
        point = add(point, point)
    return total


def require_signed(public: bytes, text: bytes, signature: bytes) -> None:
    require(len(public) == 32 and len(signature) == 64, "a signature is malformed")
    number = int.from_bytes(signature[32:], "little")
    challenge = int.from_bytes(hashlib.sha512(signature[:32] + public + text).digest(), "little") % ORDER
    left = multiply(number, decode_point(BASE))
    right = multiply(challenge, decode_point(public), decode_point(signature[:32]))
    is_equal = all((left[axis] * right[2] - right[axis] * left[2]) % P == 0 for axis in (0, 1))
    require(number < ORDER and is_equal, "a signature is wrong")


# The Merkle tree of RFC 6962. The algorithms are those of RFC 9162, 2.1.3.2 and 2.1.4.2.
class Checkpoint(NamedTuple):
    origin: str
    size: int
    root: bytes


def sha256(*parts: bytes) -> bytes:
    return hashlib.sha256(b"".join(parts)).digest()


def climb(node: int, last: int, roots: list[bytes], proof: list[bytes]) -> list[bytes]:
    """Return the roots that a proof leads to: the new one and, if it is asked for, the old one."""
    for sibling in proof:
        require(last > 0, "a proof is too long")
        if node & 1 or node == last:
            roots = [sha256(b"\x01", sibling, root) for root in roots]
            while node and not node & 1:
                node, last = node >> 1, last >> 1
        else:
            roots = [sha256(b"\x01", roots[0], sibling), *roots[1:]]
        node, last = node >> 1, last >> 1
    require(last == 0, "a proof is too short")
    return roots


def require_included(index: int, entry: str, proof: list[str], tree: Checkpoint) -> None:
    require(type(index) is int and 0 <= index < tree.size, f"checkpoint {tree.size} has no entry {index}")
    roots = climb(index, tree.size - 1, [sha256(b"\x00", entry.encode())], [*map(decode, proof)])
    require(roots == [tree.root], f"entry {index} is not the one in the history")


def require_continued(old: Checkpoint, new: Checkpoint, since: Any) -> None:
    """Require that the tree of one checkpoint is the beginning of that of another."""
    reason = f"checkpoint {new.size} does not continue checkpoint {old.size}: the history was changed"
    if old.size == new.size:
        require(old == new, reason)
        return
    require(since and since["size"] == old.size, f"the proof begins elsewhere: get it with since={old.size}")
    node, last, proof = old.size - 1, new.size - 1, [*map(decode, since["proof"])]
    while node & 1:
        node, last = node >> 1, last >> 1
    first, *rest = proof if node else [old.root, *proof]
    require(old[:2] < new[:2] and climb(node, last, [first, first], rest) == [new.root, old.root], reason)


# Notes and bundles.
class Proof(NamedTuple):
    order_no: str
    tree: Checkpoint
    header: dict[str, Any]
    entries: dict[int, Any]  # by their index
    bodies: dict[int, str]  # the same
    stated: tuple[int, ...]  # the first entry, the last entry, and the number of events
    since: Any


def decode(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    require(base64.b64encode(data).decode() == text, "a text in base64 is not canonical")
    return data


def members(value: Any, required: str, optional: str = "") -> dict[str, Any]:
    """Return a JSON object, or a part of one, with exactly these members."""
    found: dict[str, Any] = json.loads(value) if isinstance(value, str) else value
    names = set(required.split())
    require(names <= set(found) <= names | set(optional.split()), f"the members are not {required}")
    return found


def read_key(line: str) -> Any:
    """Return the name, the id and the key of a text such as shop.example/orders+1a2b3c4d+AX..."""
    name, key_id, encoded = line.split("+", 2)
    data = decode(encoded)
    key = (name, sha256(name.encode(), b"\n", data)[:4], data[1:])
    require(data[:1] == b"\x01" and key[1].hex() == key_id, f"{line} is not a key")
    return key


def open_note(note: str, keys: list[Any]) -> list[str]:
    """Return the lines of a note that one of the keys has signed (C2SP signed-note)."""
    text, _, signatures = note.rpartition("\n\n")
    signers = 0
    for line in signatures.splitlines():
        dash, name, encoded = line.split(" ")
        for key in keys:
            if (dash, name, decode(encoded)[:4]) == ("\u2014", *key[:2]):
                require_signed(key[2], f"{text}\n".encode(), decode(encoded)[4:])
                signers += 1
    require(signers > 0, "the key did not sign it")
    return text.split("\n")


def read_checkpoint(note: str, keys: list[Any]) -> Checkpoint:
    origin, size, root = open_note(note, keys)
    require(origin == keys[0][0] and str(int(size)) == size, "it is not a checkpoint of this history")
    return Checkpoint(origin, int(size), decode(root))


def verify(text: str, keys: list[Any]) -> Proof:
    bundle = members(text, "format origin order_no checkpoint last log events", "since")
    require(bundle["format"] == "order-tracking.proof.v1", "it is not a proof of an order")
    tree, order_no = read_checkpoint(bundle["checkpoint"], keys), bundle["order_no"]
    log = members(bundle["log"], "entry proof")
    require_included(0, log["entry"], log["proof"], tree)
    header = members(log["entry"], "continues existing key log origin")
    require(header["log"] == "order-tracking.history.v1", "it is not a history of orders")
    require(bundle["origin"] == header["origin"] == tree.origin, "the history has another origin")
    *about, last = open_note(bundle["last"], keys)
    expected = ["order-tracking.last.v1", tree.origin, str(tree.size), base64.b64encode(tree.root).decode()]
    require(about == expected, "the statement of the last event is about another checkpoint")
    entries: dict[int, Any] = {}
    bodies: dict[int, str] = {}
    for event in bundle["events"]:
        index = members(event, "index entry proof", "opened")["index"]
        require_included(index, event["entry"], event["proof"], tree)
        entry = members(event["entry"], "order_no position topic version", "body event raw")
        require(
            (entry["order_no"], entry["position"]) == (order_no, index), f"entry {index} is another order's"
        )
        require(index > max(entries, default=0), "the entries are not in their order")
        entries[index] = entry
        if "opened" in event:
            opened = members(event["opened"], "salt body")
            commitment = sha256(decode(opened["salt"]), opened["body"].encode())
            require(decode(entry["body"]) == commitment, f"the body of entry {index} is not the recorded one")
            bodies[index] = opened["body"]
    since = members(bundle["since"], "size proof") if "since" in bundle else None
    return Proof(order_no, tree, header, entries, bodies, tuple(map(int, last.split())), since)


def join(pages: list[Proof]) -> Proof:
    whole = pages[0]
    for page in pages[1:]:
        require(page.order_no == whole.order_no, "the files are proofs of several orders")
        require_continued(whole.tree, page.tree, page.since)
        whole = page._replace(entries={**whole.entries, **page.entries}, bodies={**whole.bodies, **page.bodies})
    versions = [entry["version"] for _, entry in sorted(whole.entries.items())]
    require(versions == [*range(1, len(versions) + 1)], f"events are left out: the versions are {versions}")
    shown = (min(whole.entries, default=0), max(whole.entries, default=0), len(versions))
    require(shown == whole.stated, f"first entry, last entry, events: {shown}, but {whole.stated} are stated")
    return whole


def compare(proof: Proof, other: Proof) -> None:
    old, new = sorted((proof, other), key=lambda one: one.tree.size)
    for one, another in ((old, new), (new, old)) if old.order_no == new.order_no else ():
        only = [index for index in one.entries if index < another.tree.size and index not in another.entries]
        require(not only, f"the proofs contradict each other: only one of them has the entries {only}")
    require_continued(old.tree, new.tree, new.since)


def scan(proof: Proof, source: str) -> None:
    """Read every entry: they must be those of the checkpoint, and no other one may be of the order."""
    headers = {"Authorization": f"Bearer {os.environ.get('HISTORY_API_KEY', '')}"}
    hashes: list[bytes] = []
    for number in range((proof.tree.size + 255) // 256):
        path = f"x{number // 10**6:03}/x{number // 1000 % 1000:03}/{number % 1000:03}"
        width = min(256, proof.tree.size - 256 * number)
        suffix = f".p/{width}" if width < 256 else ""
        place = f"{source}/tile/entries/{path[5 * (number < 10**6) + 5 * (number < 1000) :]}{suffix}"
        if source.startswith(("http://", "https://")):
            data = urllib.request.urlopen(urllib.request.Request(place, headers=headers), timeout=60).read()
        else:
            data = Path(place).read_bytes()
        while data:
            end = 2 + int.from_bytes(data[:2], "big")
            entry, data = data[2:end], data[end:]
            is_own = json.loads(entry).get("order_no") == proof.order_no
            require(is_own == (len(hashes) in proof.entries), f"entry {len(hashes)} of the order is left out")
            hashes.append(sha256(b"\x00", entry))
    size = len(hashes)
    while len(hashes) > 1:
        odd = hashes[-1:] if len(hashes) % 2 else []
        hashes = [sha256(b"\x01", *pair) for pair in zip(hashes[::2], hashes[1::2])] + odd
    require([size, *hashes] == [*proof.tree[1:]], "the entries are not those of the checkpoint")


def describe(proof: Proof) -> str:
    lines = [f"Valid: order {proof.order_no}, {len(proof.entries)} events"]
    for index, entry in sorted(proof.entries.items()):
        names = ("timestamp", "status", "verdict", "reported_status")
        values = [str(entry.get("event", {}).get(name, "-")) for name in names]
        lines.append(f"  {entry['version']}. entry {index}: {', '.join(values)}")
        lines += [f"     {proof.bodies[index]}"] if index in proof.bodies else []
    lines.append(f"History: {proof.tree.origin}; it began when {proof.header['existing']} events were recorded")
    if proof.header["continues"]:
        lines.append(f"The operator has restarted the history: {proof.header['continues']['reason']}")
    text = "\n".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in lines)
    return text + CLAIMS.format(size=proof.tree.size)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(prog="verify", description="Verify the proof of an order's timeline.")
    parser.add_argument("bundle", nargs="+", help="the file of a proof; all of its files if it has several")
    parser.add_argument("--key", required=True, help="the operator's public key, or a file with it")
    parser.add_argument("--since", help="a file with an older checkpoint, which the history must continue")
    parser.add_argument("--against", help="another proof, which must not contradict this one")
    parser.add_argument("--scan", help="the URL of the history, or a folder with its tiles: read every entry")
    given = parser.parse_args(arguments)
    try:
        files = {
            one: Path(one).read_text("utf-8") for one in (*given.bundle, given.since, given.against) if one
        }
        text = Path(given.key).read_text("utf-8") if Path(given.key).exists() else given.key
        keys = [read_key(line) for line in text.split()]
    except (OSError, ValueError) as error:
        print(f"cannot begin: {error}", file=sys.stderr)
        return USAGE
    try:
        proof = join([verify(files[name], keys) for name in given.bundle])
        if given.since:
            require_continued(read_checkpoint(files[given.since], keys), proof.tree, proof.since)
        if given.against:
            compare(proof, join([verify(files[given.against], keys)]))
        if given.scan:
            scan(proof, given.scan)
        print(describe(proof))
    except (ValueError, OSError, TypeError, LookupError, AttributeError, RecursionError) as error:
        print(f"NOT VALID: {error}")
        return INVALID
    return VALID


if __name__ == "__main__":
    sys.exit(main())
