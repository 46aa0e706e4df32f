"""Verify the proof of an order's timeline: offline, with this one file, Python 3.9 or newer, and a public key.

    python3 verify.py KOM1.proof.json --key 'shop.example/orders+1a2b3c4d+AX...'

The exit code is 0 if the proof is valid, 1 if it is not, and 2 if the command is wrong or a
file cannot be read. A proof of more than 1,000 events has several files: pass all of them, in their order.
"""

import argparse
import base64
import hashlib
import http.client
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


def require_continued(old: Checkpoint, proof: Any) -> None:
    """Require that the tree of a checkpoint is the beginning of a proof's tree."""
    new, since, restart = proof.tree, proof.since, proof.header["continues"]
    why = f"the operator restarted it: {restart['reason']}" if restart else "it was changed"
    reason = f"the history at checkpoint {new.size} does not continue checkpoint {old.size}: {why}"
    require(old.size <= new.size, f"checkpoint {old.size} is newer than the proof: get a newer proof")
    if old.size == new.size:
        require(old == new, reason)
        return
    require(
        since and since["size"] == old.size > 0, f"get the proof with since={old.size}: it begins elsewhere"
    )
    node, last, hashes = old.size - 1, new.size - 1, [*map(decode, since["proof"])]
    while node & 1:
        node, last = node >> 1, last >> 1
    first, *rest = hashes if node else [old.root, *hashes]
    require(old[0] == new[0] and climb(node, last, [first, first], rest) == [new.root, old.root], reason)


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


def read_keys(text: str) -> list[Any]:
    """Return the name, the id and the key of each text like shop.example/orders+1a2b3c4d+AX..., or file."""
    keys = []
    try:
        for line in (Path(text).read_text("utf-8") if Path(text).is_file() else text).split() or [""]:
            name, key_id, encoded = line.split("+", 2)
            data = decode(encoded)
            keys.append((name, sha256(name.encode(), b"\n", data)[:4], data[1:]))
            require(data[:1] == b"\x01" and keys[-1][1].hex() == key_id, "it is damaged")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a public key like NAME+ID+KEY ({error})") from None
    return keys


def open_note(note: str, keys: list[Any]) -> list[str]:
    """Return the lines of a note that one of the keys has signed (C2SP signed-note)."""
    text, _, signatures = note.rpartition("\n\n")
    lines = [line.split(" ") for line in signatures.split("\n")]
    found = [(key, decode(line[2])) for line in lines for key in keys if line[:2] == ["\u2014", key[0]]]
    for key, data in (signed := [(key, data) for key, data in found if data[:4] == key[1]]):
        require_signed(key[2], f"{text}\n".encode(), data[4:])
    require(signed, f"the key {keys[0][0]} did not sign it: is it of another history?")
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
    since = members(bundle["since"], "size proof") if "since" in bundle else None
    proof = Proof(order_no, tree, header, {}, {}, tuple(map(int, last.split())), since)
    for event in bundle["events"]:
        index = members(event, "index entry proof", "opened")["index"]
        require_included(index, event["entry"], event["proof"], tree)
        entry = members(event["entry"], "order_no position topic version", "body event raw")
        place = (entry["order_no"], entry["position"], index > next(reversed(proof.entries), 0))
        require(place == (order_no, index, True), f"entry {index} is out of place")
        proof.entries[index] = entry
        if "opened" in event:
            opened = members(event["opened"], "salt body")
            commitment = sha256(decode(opened["salt"]), opened["body"].encode())
            require(decode(entry["body"]) == commitment, f"the body of entry {index} is not the recorded one")
            proof.bodies[index] = opened["body"]
    return proof


def join(pages: list[Proof]) -> Proof:
    whole = pages[0]
    for page in pages[1:]:
        require(page.order_no == whole.order_no, "the files are proofs of several orders")
        require_continued(whole.tree, page)
        whole = page._replace(entries={**whole.entries, **page.entries}, bodies={**whole.bodies, **page.bodies})
    versions = [entry["version"] for _, entry in sorted(whole.entries.items())]
    require(versions == [*range(1, len(versions) + 1)], f"events are left out: the versions are {versions}")
    shown = (min(whole.entries, default=0), max(whole.entries, default=0), len(versions))
    require(shown == whole.stated, f"first, last, events: {shown}; stated: {whole.stated}; pass all files")
    return whole


def compare(proof: Proof, other: Proof) -> None:
    old, new = sorted((proof, other), key=lambda one: one.tree.size)
    for one, another in ((old, new), (new, old)) if old.order_no == new.order_no else ():
        only = [index for index in one.entries if index < another.tree.size and index not in another.entries]
        require(not only, f"the proofs contradict each other: only one of them has the entries {only}")
    require_continued(old.tree, new)


def scan(proof: Proof, source: str) -> None:
    base = source if "://" in source else Path(source).absolute().as_uri()
    headers = {"Authorization": f"Bearer {os.environ.get('HISTORY_API_KEY', '')}"}
    refuses: Any = type("Refuses", (urllib.request.HTTPRedirectHandler,), {"redirect_request": lambda *_: None})
    opener = urllib.request.build_opener(refuses)  # the key is for this address alone
    hashes: list[bytes] = []
    for number in range((proof.tree.size + 255) // 256):
        path = f"x{number // 10**6:03}/x{number // 1000 % 1000:03}/{number % 1000:03}"
        path = path[5 * (number < 10**6) + 5 * (number < 1000) :]
        path += f".p/{width}" if (width := proof.tree.size - 256 * number) < 256 else ""
        data = opener.open(urllib.request.Request(f"{base}/tile/entries/{path}", headers=headers)).read()
        while data:
            entry, data = data[2 : (end := 2 + int.from_bytes(data[:2], "big"))], data[end:]
            is_own = json.loads(entry).get("order_no") == proof.order_no
            require(is_own == (len(hashes) in proof.entries), f"entry {len(hashes)} of the order is left out")
            hashes.append(sha256(b"\x00", entry))
    while len(hashes) > 1:
        hashes = [sha256(b"\x01", *two) for two in zip(hashes[::2], hashes[1::2])] + hashes[len(hashes) & ~1 :]
    require(hashes == [proof.tree.root], "the entries are not those of the checkpoint")


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def describe(proof: Proof, given: Any) -> str:
    lines = [f"Valid: order {proof.order_no}, events: {len(proof.entries)}"]
    for index, entry in sorted(proof.entries.items()):
        names = ("timestamp", "status", "verdict", "reported_status")
        values = [str(entry.get("event", {}).get(name, "-")) for name in names]
        lines.append(f"  {entry['version']}. entry {index}: {', '.join(values)}")
        lines += [f"     {proof.bodies[index]}"] if index in proof.bodies else []
    lines.append(f"History: {proof.tree.origin}; events recorded before it began: {proof.header['existing']}")
    restart = proof.header["continues"]
    lines += [f"The operator has restarted the history: {restart['reason']}"] if restart else []
    lines += [f"Also verified: --{k} {v}" for k, v in vars(given).items() if v and k not in {"bundle", "key"}]
    return "\n".join(map(printable, lines)) + CLAIMS.format(size=proof.tree.size)


def main(arguments: Any = None) -> int:
    parser = argparse.ArgumentParser(prog="verify", description="Verify the proof of an order's timeline.")
    parser.add_argument("bundle", nargs="+", help="the file of a proof; all of its files if it has several")
    parser.add_argument("--key", required=True, type=read_keys, help="the operator's public key, or its file")
    parser.add_argument("--since", help="a file with an older checkpoint, which the history must continue")
    parser.add_argument("--against", help="another proof, which must not contradict this one")
    parser.add_argument("--scan", help="the URL of the history, or a folder with its tiles: read every entry")
    given = parser.parse_args(arguments)
    getattr(sys.stdout, "reconfigure", lambda **_: None)(errors="backslashreplace")
    try:
        names = filter(None, (*given.bundle, given.since, given.against))
        files = {name: Path(name).read_text("utf-8") for name in names}
        proof = join([verify(files[name], given.key) for name in given.bundle])
        if given.since:
            require_continued(read_checkpoint(files[given.since], given.key), proof)
        if given.against:
            compare(proof, join([verify(files[given.against], given.key)]))
        if given.scan:
            scan(proof, given.scan)
        print(describe(proof, given))
    except (OSError, http.client.HTTPException) as error:
        print(printable(f"cannot verify: {error}; --scan of a URL may need HISTORY_API_KEY"), file=sys.stderr)
        return USAGE
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        print(printable(f"NOT VALID: {error}"))
        return INVALID
    return VALID


if __name__ == "__main__":
    sys.exit(main())
