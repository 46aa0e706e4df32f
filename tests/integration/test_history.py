"""The history: the follower, the signatures and their guard, the proofs, and everything that must not pass."""

import asyncio
import base64
import copy
import json
import random
from argparse import Namespace
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg
import pytest
from aiohttp import web
from aiohttp.test_utils import RawTestServer
from structlog.testing import capture_logs

from domain.order import decide
from projections.postgres import Connection
from service.database.api_keys import Scope, create_key
from service.database.connections import DedicatedConnection, connect, connected
from service.database.operations import Actor
from service.database.schema import SERVICE_ROLE, as_role
from service.event_log import store
from service.event_log.follow import Memory
from service.features.proofs import storage
from service.features.proofs import verify as verifier
from service.features.proofs.bundles import make_bundle, read_range
from service.features.proofs.check import Checked, check_history
from service.features.proofs.entries import NO_SALT
from service.features.proofs.follower import BATCH_LEAVES_MAX, Follower
from service.features.proofs.notes import read_checkpoint, read_verifier_key
from service.features.proofs.restart import restart
from service.features.proofs.signer import NOTHING, KeyFileError, NotSigningError, Signer
from service.features.proofs.status import read_status
from service.features.proofs.storage import HistoryHaltedError
from service.features.proofs.tree import TILE_HASHES, TileId, hash_leaf, root_of, split
from service.maintenance.erasure import erase_order
from tests.support.client import Client, serving_client
from tests.support.databases import TestServer
from tests.support.history import read_size, until_signed, verify
from tests.support.reports import report
from tests.support.waiting import until_async

pytestmark = pytest.mark.usefixtures("all_features")

OPERATOR = Actor("cli", "operator")
# A position that no event gets.
DRAW = "SELECT nextval('order_events_notification_id_seq')"
FALSIFY = """
    UPDATE order_events
    SET state = convert_to(replace(convert_from(state, 'UTF8'), 'Diajukan', 'Selesai'), 'UTF8')
    WHERE notification_id = $1
"""
STATUSES = ("Diajukan", "Dikirim", "Diterima")


class History(NamedTuple):
    """A follower without a service, and the parts that it works with."""

    connection: Connection
    memory: Memory
    follower: Follower
    signer: Signer

    async def build(self) -> storage.Tree:
        """Add every event to the tree, sign it, and return it."""
        while await self.follower.step():
            pass
        tree = await storage.read_tree(self.connection)
        assert tree is not None
        return tree


@asynccontextmanager
async def following(dsn: str, folder: Path) -> AsyncIterator[History]:
    """Make a follower of a log that nothing else follows."""
    own = as_role(dsn, SERVICE_ROLE)
    reading, writing = DedicatedConnection(partial(connect, own)), DedicatedConnection(partial(connect, own))
    memory, signer = Memory(reading), Signer(folder / "history.key", "shop.example/orders")
    await memory.hear_in_time()
    async with connected(dsn) as connection:
        yield History(connection, memory, Follower(writing, memory, signer), signer)
    await reading.close()
    await writing.close()


@pytest.fixture
async def history(owner_dsn: str, tmp_path: Path) -> AsyncIterator[History]:
    async with following(owner_dsn, tmp_path) as one:
        yield one


async def record(history: History, order_no: str, *words: str, remember: bool = False) -> list[int]:
    """Record reports of an order, and return their positions."""
    positions = []
    for word in words:
        state = (await store.order_states(history.connection, [order_no]))[order_no]
        event = decide(state, report(order_no, word))
        (position,), _ = await store.append(history.connection, [event])
        if remember:
            history.memory.remember([event], [position])
        positions.append(position)
    return positions


async def append_orders(history: History, count: int, name: str = "KOM") -> None:
    """Record a report of each of some new orders."""
    order_nos = [f"{name}{number}" for number in range(count)]
    states = await store.order_states(history.connection, order_nos)
    await store.append(history.connection, [decide(states[one], report(one)) for one in order_nos])


async def salts(connection: Connection, positions: list[int]) -> list[bytes]:
    found = await storage.read_salts(connection, positions)
    return [found[position] for position in positions]


async def check(history: History, *, whole: bool = True) -> Checked:
    return await check_history(history.connection, history.signer, whole=whole)


async def prove(history: History, order_no: str, **options: Any) -> Any:
    return await make_bundle(history.connection, history.signer, order_no, **{"with_bodies": False, **options})


async def checkpoint_of(history: History) -> str:
    """Return the published checkpoint."""
    tree = await storage.read_tree(history.connection)
    assert tree is not None
    assert tree.note is not None
    return tree.note


def key_of(history: History) -> str:
    return str(history.signer.read_keys()[0].verifier)


# The tree.


@pytest.mark.parametrize("remember", [False, True])
async def test_every_position_has_its_entry(history: History, *, remember: bool) -> None:
    """Events become entries at their positions, from memory or from the log, and the check finds nothing."""
    await record(history, "KOM1", *STATUSES, "Wat", remember=remember)
    tree = await history.build()
    assert (tree.size, tree.salted, tree.origin) == (5, 5, "shop.example/orders")
    status = await read_status(history.signer, history.connection)
    assert (status.entries, status.signed, status.halted, status.unsigned) == (5, 5, None, None)
    checked = await check(history)
    assert (checked.compared, checked.differing, checked.tiles) == (5, 0, [])


async def test_a_position_without_an_event_is_a_gap(history: History) -> None:
    """A refused append leaves a gap, which has an entry of its own, once a later event exists."""
    (first,) = await record(history, "KOM1", "Diajukan")
    await history.build()
    for _ in range(3):
        await history.connection.execute(DRAW)
    (last,) = await record(history, "KOM1", "Dikirim")
    tree = await history.build()
    assert tree.size == last + 1 == first + 5
    async with history.connection.transaction(isolation="repeatable_read"):
        entries = await read_range(history.connection, tree, 0, tree.size)
    assert [json.loads(entry).get("gap") for entry in entries] == [None, None, 2, 3, 4, None]
    assert (await check(history)).differing == 0


async def test_a_restored_tree_of_the_same_size_is_read_again(
    server: TestServer, history: History, owner_dsn: str, tmp_path: Path
) -> None:
    """The edge in memory is used only if the tree still ends with the same entry."""
    await record(history, "KOM1", *STATUSES)
    await history.build()
    dump = await asyncio.to_thread(server.dump, owner_dsn)
    await record(history, "LOST", *STATUSES[:2])
    lost = await history.build()
    await asyncio.to_thread(server.restore_clean, owner_dsn, dump)
    async with following(owner_dsn, tmp_path) as other:
        await record(other, "KOM2", *STATUSES[:2])
        assert (await other.build()).size == lost.size
    await record(history, "KOM3", STATUSES[0])
    assert (await history.build()).size == lost.size + 1
    checked = await check(history)
    assert (checked.differing, checked.tiles) == (0, [])


async def test_random_batches_and_restarts_make_one_tree(
    history: History, owner_dsn: str, tmp_path: Path
) -> None:
    """However the log grows, and whichever process adds to the tree, its tiles are those of all entries."""
    choose = random.Random(1)
    async with following(owner_dsn, tmp_path) as other:
        for number in range(12):
            for _ in range(choose.randrange(1, 90)):
                await record(history, f"KOM{choose.randrange(40)}", choose.choice(STATUSES), remember=True)
            if choose.random() < 0.3:
                await history.connection.execute(DRAW)
            await choose.choice((history, other)).follower.step()
            if number == 6:
                await history.follower._dedicated.close()  # noqa: SLF001 - as a server's restart does
        tree = await history.build()
        async with history.connection.transaction(isolation="repeatable_read"):
            entries = await read_range(history.connection, tree, 0, tree.size)
        leaves = [hash_leaf(entry) for entry in entries]
        (root,) = await storage.read_roots(history.connection, tree.number, tree.size)
    assert root == root_of(leaves)
    assert tree.size > TILE_HASHES
    assert (await check(history)).differing == 0


async def test_a_batch_is_bounded(history: History) -> None:
    """A long gap is added in parts, since the event loop is held while one is hashed."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    await history.connection.execute(
        f"SELECT setval('order_events_notification_id_seq', {3 * BATCH_LEAVES_MAX})"
    )
    await record(history, "KOM1", "Dikirim")
    assert await history.follower.step() == BATCH_LEAVES_MAX
    assert (await history.build()).size == 3 * BATCH_LEAVES_MAX + 2


async def test_a_lost_event_in_memory_is_not_added(history: History) -> None:
    """Memory may hold an event whose commit was lost: the log is read instead."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    (position,) = await record(history, "KOM2", "Dikirim")
    lost = decide((await store.order_states(history.connection, ["KOM3"]))["KOM3"], report("KOM3", "Batal"))
    history.memory.remember([lost], [position])
    await history.build()
    assert (await check(history)).differing == 0


async def test_a_state_without_a_body_has_an_entry(history: History) -> None:
    """Rows that another program wrote are committed whole, and stay provable."""
    await history.connection.execute(
        "INSERT INTO order_events (originator_id, originator_version, topic, state) "
        """VALUES ('KOM1', 1, 'other', '{"a": 1}'), ('KOM1', 2, 'other', '\\xff')"""
    )
    await history.build()
    assert (await check(history)).differing == 0
    bundle = await prove(history, "KOM1", with_bodies=True)
    assert [set(json.loads(event["entry"])) & {"raw", "event"} for event in bundle["events"]] == [{"raw"}] * 2
    assert not any("opened" in event for event in bundle["events"])


ODD_STATES = {
    "a fraction": {"body": "secret", "remote": "::1", "number": 1e-07},
    "a fraction far inside": {"body": "secret", "remote": "::1", "list": [{"number": 0.10}]},
    "depth": {"body": "secret", "remote": "::1", "list": [[[[[[[[[[]]]]]]]]]]},
    "size": {"body": "secret", "remote": "::1", "long": "x" * 70_000},
    "no text": {"body": 1, "remote": "::1"},
}


@pytest.mark.parametrize("is_erased_first", [False, True])
@pytest.mark.parametrize("members", ODD_STATES.values(), ids=ODD_STATES)
async def test_an_odd_state_is_committed_to_as_a_whole(
    history: History, tmp_path: Path, members: dict[str, Any], *, is_erased_first: bool
) -> None:
    """What JSON writers could write in two ways, or what is too long, is proved also once it is erased."""
    await record(history, "KOM0", "Diajukan")
    await history.build()
    await history.connection.execute(
        """
        INSERT INTO order_events (originator_id, originator_version, topic, state)
        VALUES ('KOM1', 1, 'order.other', $1)
        """,
        json.dumps(members).encode(),
    )
    if not is_erased_first:
        await history.build()
    await erase_order(history.connection, "KOM1", "asked to", OPERATOR)
    await history.build()
    bundle = await prove(history, "KOM1", with_bodies=True)
    assert verify(bundle, key_of(history), tmp_path).code == 0
    (event,) = bundle["events"]
    assert ("raw" in json.loads(event["entry"]) or is_erased_first, "secret" in json.dumps(bundle)) == (
        True,
        False,
    )
    assert (await check(history)).differing == 0
    await history.connection.execute(
        """
        ALTER TABLE order_events DISABLE TRIGGER USER;
        UPDATE order_events SET state = '{"body": "forged"}' WHERE notification_id = 2;
        """
    )
    assert (await check(history)).differing == 1


async def test_a_log_before_the_history(history: History) -> None:
    """The first entry says how many events were there already."""
    await record(history, "KOM1", *STATUSES)
    tree = await history.build()
    assert json.loads(tree.header)["existing"] == 3


async def test_a_history_from_the_first_event(history: History) -> None:
    """If this process has just recorded the first event, no event was there before."""
    await record(history, "KOM1", *STATUSES, remember=True)
    assert json.loads((await history.build()).header)["existing"] == 0


async def test_nothing_is_begun_for_an_empty_log(history: History) -> None:
    """The key is made, and the tree begins with the first event: until then, an import may bring its own."""
    assert await history.follower.step() == 0
    assert len(history.signer.read_keys()) == 1
    assert await storage.read_tree(history.connection) is None
    status = await read_status(history.signer, history.connection)
    assert (status.entries, status.unsigned) == (0, "the history has not begun yet")


# What is stored only grows.


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE history_trees SET header = 'x'",
        "DELETE FROM history_tiles",
        "TRUNCATE history_tiles",
        "UPDATE history_tiles SET hashes = set_byte(hashes, 0, 255 - get_byte(hashes, 0))",
        "UPDATE history_tiles SET level = 7",
        "UPDATE history_tiles SET hashes = substr(hashes, 1, 32)",
        "UPDATE history_salts SET salts = set_byte(salts, 19, 255 - get_byte(salts, 19))",
        "UPDATE history_salts SET tile = 9",
        "DELETE FROM history_salts",
        "DELETE FROM history_commitments",
        "UPDATE history_checkpoints SET size = 1",
        "DELETE FROM history_checkpoints",
        "TRUNCATE history_trees CASCADE",
    ],
)
async def test_the_history_only_grows(history: History, statement: str) -> None:
    """Not even a superuser changes it, unless the triggers are switched off."""
    await record(history, "KOM1", *STATUSES)
    await history.build()
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="only grows"):
        await history.connection.execute(statement)


async def test_the_service_cannot_zero_a_salt(history: History, dsn: str) -> None:
    """Only an erasure by the owner does; the service's role can only add."""
    await record(history, "KOM1", *STATUSES)
    await history.build()
    async with connected(dsn) as own:
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await own.execute("UPDATE history_salts SET salts = decode(repeat('00', length(salts)), 'hex')")
        for statement in (
            "DELETE FROM history_tiles",
            "UPDATE history_tiles SET level = 1",
            "INSERT INTO history_commitments VALUES (1, NULL)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await own.execute(statement)


# Erasure.


async def test_an_erasure_leaves_no_salt_and_every_proof(history: History, tmp_path: Path) -> None:
    """Bundles from before and after it are valid, and the salts are zeros."""
    positions = await record(history, "KOM1", "Diajukan", "Wat", "Dikirim")
    await record(history, "KOM2", "Diajukan")
    await history.build()
    before = await prove(history, "KOM1", with_bodies=True)
    await erase_order(history.connection, "KOM1", "asked to", OPERATOR)
    assert await salts(history.connection, positions) == [NO_SALT] * 3
    assert NO_SALT not in await salts(history.connection, [4])
    await record(history, "KOM1", "Diterima")
    await history.build()
    after = await prove(history, "KOM1", with_bodies=True)
    assert [event.get("opened") is not None for event in after["events"]] == [False, False, False, True]
    assert [event["entry"] for event in after["events"][:3]] == [event["entry"] for event in before["events"]]
    for bundle in (before, after):
        assert verify(bundle, key_of(history), tmp_path).code == 0
    assert (await check(history)).differing == 0
    # Once more, which changes nothing.
    await erase_order(history.connection, "KOM1", "asked to", OPERATOR)
    assert (await check(history)).differing == 0


@pytest.mark.parametrize("remember", [False, True])
async def test_an_erasure_before_the_entry(history: History, *, remember: bool) -> None:
    """An event that is erased before it is in the tree gets a commitment, and its salt is thrown away."""
    await record(history, "KOM0", "Diajukan")
    await history.build()
    positions = await record(history, "KOM1", *STATUSES, remember=remember)
    await erase_order(history.connection, "KOM1", "asked to", OPERATOR)
    await history.build()
    assert await salts(history.connection, positions) == [NO_SALT] * 3
    commitments = await storage.read_commitments(history.connection, positions)
    assert len({commitments[position] for position in positions}) == 3
    assert None not in commitments.values()
    assert (await check(history)).differing == 0


async def test_an_erased_body_in_memory_is_not_committed_to(history: History, dsn: str) -> None:
    """While a tree is built again, the memory of this process has lost what was erased since."""
    positions = await record(history, "KOM1", *STATUSES, remember=True)
    tree = await history.build()
    async with connected(dsn) as own:
        await restart(own, history.signer, "a test", OPERATOR)
        await erase_order(history.connection, "KOM1", "asked to", OPERATOR)
    await history.memory.hear_in_time(at_once=True)
    assert not history.memory.recall(0, 1)
    await history.build()
    assert await salts(history.connection, positions) == [NO_SALT] * 3
    tiles = [await storage.read_tiles(history.connection, number, [TileId(0, 0)]) for number in (1, 2)]
    before, after = (split(one[TileId(0, 0)]) for one in tiles)
    assert (len(before), before[1:]) == (tree.size, after[1:])


async def test_erasures_that_race_the_follower_leave_no_salt(history: History, dsn: str) -> None:
    """A thousand orders are erased while the follower adds them: no salt of any is left."""
    orders = [f"KOM{number}" for number in range(1_000)]
    positions: list[int] = []

    async def erase(order_nos: list[str]) -> None:
        async with connected(dsn.partition("&role=")[0]) as owner:
            for order_no in order_nos:
                await owner.execute("CALL erase_order($1, 'asked to')", order_no)

    async def report_all() -> None:
        erasing = []
        for start in range(0, len(orders), 100):
            for order_no in orders[start : start + 100]:
                positions.extend(await record(history, order_no, "Diajukan", remember=True))
            erasing.append(asyncio.create_task(erase(orders[start : start + 100])))
        await asyncio.gather(*erasing)

    reporting = asyncio.create_task(report_all())
    while not reporting.done():
        await history.follower.step()
        await asyncio.sleep(0)
    await reporting
    await history.build()
    assert await salts(history.connection, positions) == [NO_SALT] * 1_000
    assert (await check(history)).differing == 0
    marks = await history.connection.fetchval(
        "SELECT count(*) FROM history_commitments WHERE commitment IS NULL"
    )
    assert marks == 0


# The guard.


async def test_a_rebuilt_tree_is_not_signed(history: History, tmp_path: Path) -> None:
    """A superuser changes a row and rebuilds the tree: the guard refuses, and an old checkpoint convicts."""
    await record(history, "KOM1", *STATUSES)
    await record(history, "KOM2", *STATUSES)
    await history.build()
    old = await checkpoint_of(history)
    (tmp_path / "old").write_text(old, encoding="utf-8")
    await history.connection.execute(
        """
        ALTER TABLE order_events DISABLE TRIGGER order_events_immutable;
        ALTER TABLE history_tiles DISABLE TRIGGER history_tiles_kept;
        ALTER TABLE history_checkpoints DISABLE TRIGGER history_checkpoints_kept;
        DELETE FROM history_tiles WHERE tree = 1;
        DELETE FROM history_checkpoints;
        """
    )
    await history.connection.execute(FALSIFY, 1)
    first = hash_leaf((await history.connection.fetchval("SELECT header FROM history_trees")).encode())
    await history.connection.execute("INSERT INTO history_tiles VALUES (1, 0, 0, $1)", first)
    await history.follower._dedicated.close()  # noqa: SLF001
    with capture_logs() as logs:
        await history.build()
        await history.follower.step()
    assert [log["event"] for log in logs] == ["the history is not signed"]
    assert "are not those that were signed" in logs[0]["reason"]
    with pytest.raises(HistoryHaltedError):
        await prove(history, "KOM1")
    assert (await read_status(history.signer, history.connection)).halted is not None
    # With an empty guard, the operator signs it all the same. Who kept a checkpoint notices.
    history.signer.guard_file.write_text(NOTHING, encoding="utf-8")
    await history.build()
    bundle = await prove(history, "KOM1", since=read_size(old))
    assert verify(bundle, key_of(history), tmp_path).code == 0
    result = verify(bundle, key_of(history), tmp_path, "--since", str(tmp_path / "old"))
    assert (result.code, "does not continue" in result.text or "has another" in result.text) == (1, True)


async def test_a_history_that_cannot_begin_is_seen(history: History, dsn: str) -> None:
    """If the key cannot be made, the log grows and the history does not: its lag shows it."""
    await record(history, "KOM1", "Diajukan")
    file = history.signer.key_file.with_name("file")
    file.touch()
    blocked = Signer(file / "history.key")
    own = as_role(dsn, SERVICE_ROLE)
    writing = DedicatedConnection(partial(connect, own))
    with capture_logs() as logs:
        assert await Follower(writing, history.memory, blocked).step() == 0
    await writing.close()
    assert [log["event"] for log in logs] == ["the history is not signed"]
    status = await read_status(history.signer, history.connection)
    assert (status.entries, status.signed, status.lag_seconds > 0) == (0, 0, True)
    await history.build()
    status = await read_status(history.signer, history.connection)
    assert (status.signed, status.lag_seconds) == (2, 0)


async def test_a_missing_guard_stops_the_signatures(history: History) -> None:
    """Without the guard, what was signed is unknown; put back, it is signed again."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    kept = history.signer.guard_file.read_text(encoding="utf-8")
    history.signer.guard_file.unlink()
    await record(history, "KOM1", "Dikirim")
    await history.build()
    status = await read_status(history.signer, history.connection)
    assert (status.entries, status.signed, "is missing" in str(status.halted)) == (3, 2, True)
    history.signer.guard_file.write_text("nonsense", encoding="utf-8")
    assert "cannot be used" in str((await read_status(history.signer, history.connection)).halted)
    history.signer.guard_file.write_text(kept, encoding="utf-8")
    with capture_logs() as logs:
        await history.build()
    assert [log["event"] for log in logs] == ["the history is signed again"]
    assert (await read_status(history.signer, history.connection)).signed == 3


async def test_a_key_without_a_guard_signs_nothing_new(history: History) -> None:
    """An old key was copied to a new machine, without its guard: it may have signed another history."""
    history.signer.make_keys()
    history.signer.guard_file.unlink()
    await record(history, "KOM1", "Diajukan")
    await history.build()
    status = await read_status(history.signer, history.connection)
    assert (status.signed, "is missing" in str(status.halted)) == (0, True)


async def test_an_empty_guard_is_only_for_a_key_that_signed_nothing(history: History) -> None:
    """The guard of a new key beside an old one does not let the old one sign again."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    history.signer.guard_file.write_text(NOTHING, encoding="utf-8")
    status = await read_status(history.signer, history.connection)
    assert "has signed nothing" in str(status.halted)


async def test_two_databases_with_one_key_are_not_both_signed(server: TestServer, tmp_path: Path) -> None:
    """Two services share a key by mistake. One signs; the other one says that its history does not continue."""
    with server.database() as dsn, server.database() as other_dsn:
        async with following(dsn, tmp_path) as one, following(other_dsn, tmp_path) as other:
            await record(one, "KOM1", "Diajukan")
            await record(other, "KOM2", "Diajukan")
            await asyncio.gather(one.build(), other.build())
            halted = [(await read_status(each.signer, each.connection)).halted for each in (one, other)]
    assert sorted(reason is None for reason in halted) == [False, True]


async def test_a_restart_with_a_guard_that_cannot_be_read(history: History, dsn: str) -> None:
    """The published checkpoint is then the one that the new tree continues."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    note = await checkpoint_of(history)
    history.signer.guard_file.write_bytes(b"\xff")
    assert "cannot be read" in str((await read_status(history.signer, history.connection)).halted)
    async with connected(dsn) as own:
        await restart(own, history.signer, "a test", OPERATOR)
    tree = await history.build()
    assert json.loads(tree.header)["continues"] == {"note": note, "reason": "a test"}
    assert (await read_status(history.signer, history.connection)).halted is None


@pytest.mark.parametrize("key", ["absent", "another", "damaged", "of another name"])
async def test_without_the_key_entries_are_added_and_not_signed(history: History, key: str) -> None:
    """Another machine, or one whose key was lost, builds the tree and says why it does not sign it."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    other = Signer(history.signer.key_file.with_name("other.key"), "shop.example/orders")
    history.signer.key_file.unlink()
    if key == "another":
        other.make_keys()
        other.key_file.rename(history.signer.key_file)
    elif key == "damaged":
        history.signer.key_file.write_text("PRIVATE+KEY+x", encoding="utf-8")
    elif key == "of another name":
        first, second = (Signer(other.key_file.with_name(name), name).make_keys()[0] for name in "ab")
        history.signer.key_file.write_text(f"{first.text}\n{second.text}\n", encoding="utf-8")
    await record(history, "KOM1", "Dikirim")
    with capture_logs() as logs:
        await history.build()
    assert [log["event"] for log in logs] == ["the history is not signed"]
    status = await read_status(history.signer, history.connection)
    assert (status.entries, status.signed, status.halted) == (3, 2, None)
    assert (status.unsigned is None) == (key != "absent")
    assert str(history.signer.key_file) in str(status.unsigned or status.fault)
    with pytest.raises((NotSigningError, KeyFileError)):
        await prove(history, "KOM1")


async def test_two_keys_sign_during_a_rotation(history: History, tmp_path: Path) -> None:
    """Each line of the key file signs, so a verifier of the old or the new key accepts the proof."""
    await record(history, "KOM1", *STATUSES)
    await history.build()
    old = history.signer.read_keys()[0]
    new = Signer(tmp_path / "new.key", "shop.example/orders").make_keys()[0]
    history.signer.key_file.write_text(f"{old.text}\n{new.text}\n", encoding="utf-8")
    await record(history, "KOM1", "Selesai")
    await history.build()
    bundle = await prove(history, "KOM1")
    assert len(bundle["checkpoint"].splitlines()) == 6
    for key in (old, new):
        assert verify(bundle, str(key.verifier), tmp_path).code == 0


async def test_another_origin_is_not_signed(history: History) -> None:
    """The origin is in the first entry, so the setting cannot change it later."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    renamed = Signer(history.signer.key_file, "other.example/orders")
    status = await read_status(renamed, history.connection)
    assert "ORDER_TRACKING_HISTORY_ORIGIN is other.example/orders" in str(status.fault)


async def test_a_lossy_failover_halts_until_a_restart(
    server: TestServer, owner_dsn: str, dsn: str, tmp_path: Path
) -> None:
    """After signed entries were lost, proofs are refused and webhooks go on; a restart begins another tree."""
    async with serving_client(dsn, state_dir=tmp_path) as client:
        for status in STATUSES:
            await client.webhook("KOM1", status)
        await until_signed(client, 4)
        older = await asyncio.to_thread(server.copy, owner_dsn)
        await client.webhook("KOM2", "Diajukan")
        old_note = await until_signed(client, 5)
        old = await client.get("/orders/KOM1/proof")
        key = (await client.text("/history/key")).strip()
        await asyncio.to_thread(server.put_back, owner_dsn, older)

        async def refused() -> Any:
            return await client.get("/orders/KOM1/proof", 503)

        problem = await refused()
        while problem["type"] != "/problems/history-halted":
            problem = await refused()
        assert "the history has 4 entries, but 5 were signed" in problem["detail"]
        await client.get("/orders/KOM1/events/1/proof", 503)
        await client.webhook("KOM3", "Diajukan")
        assert (await client.get("/orders/KOM3?after_position=4"))["status"] == "submitted"
        assert "history_halted 1.0" in await client.text("/metrics")
        signer = Signer(tmp_path / "history.key")
        async with connected(owner_dsn) as connection:
            checked = await check_history(connection, signer, whole=True)
            assert "were signed" in str(checked.status.halted)
        async with connected(dsn) as own:
            await restart(own, signer, "the standby lost a second of commits", OPERATOR)
        await until_signed(client, 5)
        bundle = await client.get("/orders/KOM3/proof")
        (operation,) = (await client.get("/audit/operations?action=history_restarted"))["operations"]
    assert operation["reason"] == "the standby lost a second of commits"
    result = verify(bundle, key, tmp_path)
    assert (result.code, "restarted the history: the standby lost a second" in result.text) == (0, True)
    assert verify(old, key, tmp_path).code == 0
    header = json.loads(bundle["log"]["entry"])
    assert header["continues"] == {"note": old_note, "reason": "the standby lost a second of commits"}
    assert verify(bundle, key, tmp_path, "--against", str(tmp_path / "0.proof.json")).code == 0
    (tmp_path / "old.json").write_text(json.dumps(old), encoding="utf-8")
    assert verify(bundle, key, tmp_path, "--against", str(tmp_path / "old.json")).code == 1


async def test_a_restart_keeps_the_salts(history: History, dsn: str) -> None:
    """In the new tree, the entries of the same events are the same, also those that were erased."""
    positions = await record(history, "KOM1", *STATUSES)
    await record(history, "KOM2", *STATUSES)
    await history.build()
    await erase_order(history.connection, "KOM1", "asked to", OPERATOR)
    async with connected(dsn) as own:
        await restart(own, history.signer, "a test", OPERATOR)
    tree = await history.build()
    assert (tree.number, tree.size, tree.salted) == (2, 7, 7)
    tiles = [await storage.read_tiles(history.connection, number, [TileId(0, 0)]) for number in (1, 2)]
    before, after = (split(one[TileId(0, 0)]) for one in tiles)
    assert (before[0] == after[0], before[1:] == after[1:]) == (False, True)
    assert await salts(history.connection, positions) == [NO_SALT] * 3
    assert (await check(history)).differing == 0


# Changes behind the service's back.


async def test_the_check_names_each_position(history: History) -> None:
    """A superuser changes one row, removes one, and adds one in a gap: the check names all three."""
    for number in range(300):
        await record(history, f"KOM{number}", "Diajukan")
    await history.connection.execute(DRAW)
    await record(history, "KOM300", "Diajukan")
    await history.build()
    await history.connection.execute(
        """
        ALTER TABLE order_events DISABLE TRIGGER USER;
        DELETE FROM order_events WHERE notification_id = 290;
        INSERT INTO order_events (originator_id, originator_version, topic, state, notification_id)
            OVERRIDING SYSTEM VALUE VALUES ('KOM0', 2, 'order.status_reported', '{"body": ""}', 301);
        """
    )
    await history.connection.execute(FALSIFY, 17)
    for whole in (True, False):
        checked = await check(history, whole=whole)
        assert [tuple(one) for one in checked.differences] == [
            (17, "its event was changed"),
            (290, "its event was removed"),
            (301, "its event was added"),
        ]


async def test_a_commitment_does_not_hide_a_changed_event(history: History) -> None:
    """A superuser changes a body and stores its commitment, as if the event were erased: the check finds it."""
    (position,) = await record(history, "KOM1", "Diajukan")
    await history.build()
    await history.connection.execute(
        """
        INSERT INTO history_commitments (position, commitment, raw)
        SELECT notification_id, sha256(substr(salts, 17, 16) || convert_to(
            convert_from(state, 'UTF8')::jsonb ->> 'body', 'UTF8')), sha256(substr(salts, 17, 16) || state)
        FROM order_events, history_salts;
        ALTER TABLE order_events DISABLE TRIGGER USER;
        UPDATE order_events SET state = convert_to(jsonb_set(
            convert_from(state, 'UTF8')::jsonb, '{body}', '"forged"')::text, 'UTF8');
        """
    )
    checked = await check(history)
    assert [tuple(one) for one in checked.differences] == [(position, "its event was changed")]


@pytest.mark.parametrize("position", [0, -1])
async def test_an_event_before_the_log_is_found(history: History, position: int) -> None:
    """No entry stands for a position below 1, so only the check can find an event there."""
    await record(history, "KOM1", "Diajukan")
    await history.build()
    await history.connection.execute(
        """
        INSERT INTO order_events (originator_id, originator_version, topic, state, notification_id)
        OVERRIDING SYSTEM VALUE VALUES ('KOM0', 1, 'order.status_reported', '{"body": ""}', $1)
        """,
        position,
    )
    checked = await check(history)
    assert [tuple(one) for one in checked.differences] == [(position, "no position of the log is below 1")]


async def test_the_check_without_the_key_finds_a_tree_that_was_built_again(history: History) -> None:
    """The published checkpoint is enough: a check on another machine needs no key."""
    await record(history, "KOM1", *STATUSES)
    await history.build()
    keyless = Signer(history.signer.key_file.with_name("other.key"))
    assert (await check_history(history.connection, keyless, whole=True)).fits_checkpoint
    await history.connection.execute(
        FALSIFY.replace("UPDATE", "ALTER TABLE order_events DISABLE TRIGGER USER; UPDATE").replace("$1", "1")
    )
    header = (await history.connection.fetchval("SELECT header FROM history_trees")).encode()
    await history.connection.execute(
        """
        ALTER TABLE history_tiles DISABLE TRIGGER USER;
        DELETE FROM history_tiles;
        """
    )
    await history.connection.execute("INSERT INTO history_tiles VALUES (1, 0, 0, $1)", hash_leaf(header))
    await history.follower._dedicated.close()  # noqa: SLF001
    await history.build()
    checked = await check_history(history.connection, keyless, whole=True)
    assert (checked.differing, checked.tiles, checked.fits_checkpoint) == (0, [], False)


async def test_the_check_finds_changed_tiles(history: History) -> None:
    """A hash that does not fit its entry, and one above that does not fit its tile, are found."""
    for number in range(260):
        await record(history, f"KOM{number}", "Diajukan")
    await history.build()
    await history.connection.execute(
        """
        ALTER TABLE history_tiles DISABLE TRIGGER USER;
        UPDATE history_tiles SET hashes = overlay(hashes PLACING '\\x00000000' FROM 33 FOR 4)
        WHERE level = 0 AND tile = 0
        """
    )
    checked = await check(history)
    assert ([tuple(one) for one in checked.differences], checked.tiles) == (
        [(1, "its event was changed")],
        [TileId(1, 0)],
    )


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        ("UPDATE history_tiles SET hashes = substr(hashes, 1, 32) WHERE level = $1 AND tile = 0", 1),
        ("DELETE FROM history_tiles WHERE level = $1 AND tile = 0", 0),
    ],
)
async def test_missing_hashes_halt_the_history(history: History, level: int, damage: str, kept: int) -> None:
    """Nothing is signed or proven from a tree that a superuser has cut, and the check says where."""
    await append_orders(history, 600)
    await history.build()
    await history.connection.execute("ALTER TABLE history_tiles DISABLE TRIGGER USER")
    await history.connection.execute(damage, level)
    with pytest.raises(HistoryHaltedError, match="hashes or salts were changed"):
        await prove(history, "KOM1")
    checked = await check(history)
    assert checked.tiles == [TileId(1, 0)]
    # Of the entries, only those without a hash differ.
    missing = range(kept, TILE_HASHES) if level == 0 else range(0)
    assert checked.differing == len(missing)
    assert [one.position for one in checked.differences[:2]] == [*missing[:2]]


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM history_tiles WHERE level = 0 AND tile >= 1",
        "DELETE FROM history_tiles WHERE level = 1",
        "UPDATE history_tiles SET hashes = substr(hashes, 1, 32) WHERE level = 1",
        "UPDATE history_tiles SET hashes = hashes || substr(hashes, 1, 32) WHERE level = 1",
        "UPDATE history_salts SET salts = substr(salts, 1, 16) WHERE tile = 2",
    ],
)
async def test_nothing_is_added_to_a_damaged_tree(
    history: History, monkeypatch: pytest.MonkeyPatch, damage: str, *, is_new: bool
) -> None:
    """The new hashes would be in a wrong place, and a wrong root would be signed. It is logged once."""
    monkeypatch.setattr("service.features.proofs.follower.POLL_SECONDS", 0.0)
    await append_orders(history, 600)
    await history.build()
    for table in ("history_tiles", "history_salts"):
        await history.connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
    await history.connection.execute(damage)
    damaged = await storage.read_tree(history.connection)
    await append_orders(history, 200, "NEW")
    if is_new:
        # Another follower has no tile of the tree in memory.
        await history.follower._dedicated.close()  # noqa: SLF001
    with capture_logs() as logs:
        for _ in range(3):
            assert not await history.follower.step()
    assert [log["event"] for log in logs] == ["the history is not signed"]
    assert logs[0]["reason"] == storage.DAMAGED
    tree = await storage.read_tree(history.connection)
    assert (tree and tree.size, tree and tree.note) == (damaged and damaged.size, damaged and damaged.note)
    checked = await check(history)
    assert checked.differing or checked.tiles or checked.status.halted


# Over HTTP.


@pytest.fixture
async def served(dsn: str, tmp_path: Path) -> AsyncIterator[Client]:
    async with serving_client(dsn, state_dir=tmp_path) as client:
        for status in STATUSES:
            await client.webhook("KOM 1/ä", status)
        await until_signed(client, 4)
        yield client


ORDER = "/orders/KOM%201%2F%C3%A4"


async def test_a_proof_over_http(served: Client, tmp_path: Path) -> None:
    """The bundle is a download that the verifier accepts, and it continues an older checkpoint."""
    old = await served.text("/history/checkpoint")
    (tmp_path / "old").write_text(old, encoding="utf-8")
    for number in range(300):
        await served.webhook(f"OTHER{number}")
    await served.webhook("KOM 1/ä", "Selesai")
    await until_signed(served, 305)
    key = (await served.text("/history/key")).strip()
    bundle, headers = await served.get_with_headers(f"{ORDER}/proof?since={read_size(old)}")
    assert headers["Content-Disposition"] == 'attachment; filename="KOM_1__.proof.json"'
    result = verify(bundle, key, tmp_path, "--since", str(tmp_path / "old"))
    assert result.code == 0, result.text
    assert "events: 4" in result.text
    opened = await served.get(f"{ORDER}/proof?bodies=true")
    assert [json.loads(event["opened"]["body"])["status"] for event in opened["events"]] == [
        *STATUSES,
        "Selesai",
    ]
    assert '"status": "Selesai"' in verify(opened, key, tmp_path).text


async def test_the_pages_of_a_long_proof(
    served: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long order's proof has several files. One alone is not complete, and all together are valid."""
    key = (await served.text("/history/key")).strip()
    monkeypatch.setattr("service.features.proofs.api.make_bundle", partial(make_bundle, events_max=2))
    first, headers = await served.get_with_headers(f"{ORDER}/proof")
    await served.webhook("KOM 1/ä", "Selesai")
    await until_signed(served, 5)
    link = f"{ORDER}/proof?since={read_size(first['checkpoint'])}&from_version=3"
    assert headers["Link"] == f'<{link}>; rel="next"'
    second, headers = await served.get_with_headers(link)
    assert "Link" not in headers
    alone = verify(first, key, tmp_path)
    assert (alone.code, "pass all files" in alone.text) == (1, True)
    both = verify(first, key, tmp_path, others=(second,))
    assert (both.code, "events: 4" in both.text) == (0, True), both.text
    assert verify(second, key, tmp_path).code == 1


async def test_a_proof_waits_for_a_position(
    served: Client, connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``after_position``, the proof includes the report of a receipt at once, whatever the version that it
    begins with; if the history is not signed in time, or cannot be signed, the problem has the reason.
    """
    key = (await served.text("/history/key")).strip()
    for version in (4, 5):
        receipt = await served.webhook("KOM 1/ä", "Selesai")
        bundle = await served.get(f"{ORDER}/proof?after_position={receipt['position']}")
        assert [event["index"] for event in bundle["events"]][-1] == receipt["position"]
        result = verify(bundle, key, tmp_path)
        assert (result.code, f"events: {version}" in result.text) == (0, True), result.text
        path = f"{ORDER}/proof?from_version={version}&after_position={receipt['position']}"
        assert len((await served.get(path))["events"]) == 1
    monkeypatch.setattr("service.features.proofs.api.AFTER_POSITION_SECONDS_MAX", 0.2)
    async with connection.transaction():
        await connection.execute(storage.LOCK)
        receipt = await served.webhook("OTHER")
        path = f"{ORDER}/proof?after_position={receipt['position']}"
        problem, headers = await served.get_with_headers(path, 503)
        assert problem["position"] == receipt["position"] - 1
        assert int(headers["Retry-After"]) > 0
    await until_signed(served, receipt["position"] + 1)
    (tmp_path / "history.signed").unlink()
    assert (await served.get(path, 503))["type"] == "/problems/history-halted"


async def test_tiles_and_entries(served: Client, tmp_path: Path) -> None:
    """The tiles have the hashes of the entries, up to the signed size, and the verifier can scan them."""
    for number in range(300):
        await served.webhook(f"OTHER{number}")
    size = read_size(await until_signed(served, 304))
    entries: list[bytes] = []
    for number in range(-(-size // 256)):
        width = min(256, size - 256 * number)
        name = f"{number:03}" + (f".p/{width}" if width < 256 else "")
        async with served.session.get(served.url(f"/history/tile/entries/{name}")) as response:
            assert (response.status, response.headers["Content-Type"]) == (200, "application/octet-stream")
            assert "immutable" in response.headers["Cache-Control"]
            data = await response.read()
        file = tmp_path / "tile/entries" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        while data:
            end = 2 + int.from_bytes(data[:2])
            entries.append(data[2:end])
            data = data[end:]
    leaves = [hash_leaf(entry) for entry in entries]
    async with served.session.get(served.url("/history/tile/0/000")) as response:
        assert await response.read() == b"".join(leaves[:256])
    async with served.session.get(served.url("/history/tile/1/000.p/1")) as response:
        assert await response.read() == root_of(leaves[:256])
    key = (await served.text("/history/key")).strip()
    bundle = await served.get(f"{ORDER}/proof")
    for source in (str(tmp_path), str(served.url("/history"))):
        scanned = await asyncio.to_thread(verify, bundle, key, tmp_path, "--scan", source)
        assert scanned.code == 0, scanned.text
    checkpoint = read_checkpoint(await served.text("/history/checkpoint"))
    assert checkpoint.root == root_of(leaves)


async def test_the_verifier_takes_its_key_to_no_other_address(
    served: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A redirect of a scan is an error: the API key is sent to the address of the command line alone."""
    monkeypatch.setenv("HISTORY_API_KEY", "otk_secret")
    received: list[str] = []

    async def respond(request: web.BaseRequest) -> web.Response:
        received.append(request.headers["Authorization"])
        return web.Response(status=302, headers={"Location": f"http://localhost:{port}/elsewhere"})

    await until_signed(served, 4)
    key, bundle = (await served.text("/history/key")).strip(), await served.get(f"{ORDER}/proof")
    async with RawTestServer(respond) as server:
        port = server.port
        scan = ("--scan", f"http://127.0.0.1:{port}/history")
        scanned = await asyncio.to_thread(verify, bundle, key, tmp_path, *scan)
    assert (scanned.code, "cannot verify: HTTP Error 302" in scanned.text) == (2, True), scanned.text
    assert received == ["Bearer otk_secret"]


@pytest.mark.parametrize(
    "tile",
    [
        *("0/001", "0/000.p/99", "0/000.p/0", "0/000.p/256", "1/000.p/1", "0/0", "0/x000/000", "64/000.p/1"),
        *(
            "00/000.p/1",
            "-1/000",
            "0/999.p/1",
            "0/%D9%A0%D9%A0%D9%A0.p/1",
            "entries/001",
            "entries/000",
            "entries/x",
            "0/000.p/1/2",
        ),
    ],
)
async def test_a_tile_beyond_the_signed_history_is_unknown(served: Client, tile: str) -> None:
    """Neither a tile that the signed history is too small for, nor a malformed path, is served."""
    problem = await served.get(f"/history/tile/{tile}", 404)
    assert problem["type"] == "/problems/no-such-tile"


async def test_a_tile_that_lacks_hashes_is_not_served(served: Client, owner_dsn: str) -> None:
    """Caches would keep a part of a tile for good."""
    for number in range(TILE_HASHES):
        await served.webhook(f"OTHER{number}")
    await until_signed(served, TILE_HASHES + 4)
    async with connected(owner_dsn) as owner:
        await owner.execute("ALTER TABLE history_tiles DISABLE TRIGGER USER")
        await owner.execute(
            "UPDATE history_tiles SET hashes = substr(hashes, 1, 64) WHERE level = 0 AND tile = 0"
        )
        await owner.execute("DELETE FROM history_tiles WHERE level = 1")
    for tile in ("0/000", "1/000.p/1"):
        assert (await served.get(f"/history/tile/{tile}", 503))["type"] == "/problems/history-halted"


async def test_the_proof_of_one_event(served: Client) -> None:
    """It is a C2SP tlog-proof; its extra data is the entry."""
    lines = (await served.text(f"{ORDER}/events/2/proof")).split("\n")
    assert lines[0] == "c2sp.org/tlog-proof@v1"
    entry = base64.b64decode(lines[1].removeprefix("extra "))
    assert (lines[2], json.loads(entry)["version"]) == ("index 2", 2)
    assert "\n".join(lines[lines.index("") + 1 :]) == await served.text("/history/checkpoint")
    for version in ("0", "4", "x", "99999999999999999999"):
        problem = await served.get(f"{ORDER}/events/{version}/proof", 404)
        assert problem["type"] == "/problems/not-in-the-history"


async def test_wrong_requests(served: Client) -> None:
    """Each names the value and what was expected."""
    assert (await served.get("/orders/UNKNOWN/proof", 404))["type"] == "/problems/not-in-the-history"
    problem = await served.get(f"{ORDER}/proof?since=99", 400)
    assert (problem["parameter"], "4 signed entries" in problem["detail"]) == ("since", True)
    assert (await served.get(f"{ORDER}/proof?since=0", 400))["parameter"] == "since"
    problem = await served.get(f"{ORDER}/proof?after_position=99", 410)
    assert problem["type"] == "/problems/beyond-the-head"
    assert (await served.get(f"{ORDER}/proof?from_version=0", 400))["parameter"] == "from_version"
    assert (await served.get(f"{ORDER}/proof?from_version=4", 404))["type"] == "/problems/not-in-the-history"


async def test_before_the_first_event(dsn: str, tmp_path: Path) -> None:
    """Nothing is signed yet, which is not an error of the reader."""
    async with serving_client(dsn, state_dir=tmp_path) as client:
        assert (await client.get("/history/checkpoint", 503))["type"] == "/problems/temporarily-unavailable"
        await client.get("/orders/KOM1/proof", 503)
        await client.get("/history/tile/0/000", 503)
        assert "history_entries 0.0" in await client.text("/metrics")


async def test_only_what_is_public_needs_no_key(dsn: str, tmp_path: Path) -> None:
    """With HISTORY_PUBLIC, strangers read what has no order in it; proofs and entries need a key."""
    public = (
        "/history/checkpoint",
        "/history/key",
        "/history/tile/0/000.p/1",
        "/history/verify.py",
        "/history/verify.html",
    )
    private = ("/history/tile/entries/000.p/1", "/orders/KOM1/proof", "/orders/KOM1/events/1/proof")
    tokens = {"webhook_tokens": ("a-token-of-this-test-0123456789",)}
    for is_public in (False, True):
        async with serving_client(dsn, state_dir=tmp_path, history_public=is_public, **tokens) as client:
            body = b'{"order_no":"KOM1","status":"Dikirim"}'
            path = f"/webhook/{tokens['webhook_tokens'][0]}"
            assert await client.status("PUT", path, body) == 200
            if is_public:
                await until_signed(client, 2)
            assert [await client.status("GET", one) for one in public] == [200 if is_public else 401] * 5
            assert [await client.status("GET", one) for one in private] == [401] * 3


async def test_a_reader_serves_the_checkpoint_and_no_proof(served: Client, dsn: str, tmp_path: Path) -> None:
    """Its standby may be behind what was signed, so it says who gives proofs, and is not halted."""
    async with serving_client(dsn, state_dir=tmp_path, read_only=True, database_url=dsn) as reader:
        assert await reader.text("/history/checkpoint") == await served.text("/history/checkpoint")
        assert await reader.text("/history/key") == await served.text("/history/key")
        async with reader.session.get(reader.url("/history/tile/0/000.p/4")) as response:
            assert response.status == 200
        problem = await reader.get(f"{ORDER}/proof", 503)
        assert (problem["type"], "ask one that records" in problem["detail"]) == (
            "/problems/temporarily-unavailable",
            True,
        )
        assert "history_halted 0.0" in await reader.text("/metrics")
        page = await reader.text("/track/KOM%201%2F%C3%A4?lang=en")
        assert ("does not sign it" in page, "/proof" in page) == (True, False)


async def test_a_reader_of_bodies_needs_the_scope(dsn: str, owner_dsn: str, tmp_path: Path) -> None:
    """A key with the scope read gets proofs without bodies alone."""
    async with connected(owner_dsn) as connection:
        scopes: dict[str, Scope] = {"a": "read", "b": "read:bodies"}
        keys = [await create_key(connection, name, scope, None) for name, scope in scopes.items()]
    async with serving_client(dsn, state_dir=tmp_path) as client:
        await client.webhook("KOM1")
        headers = [{"Authorization": f"Bearer {key}"} for key in keys]
        path = "/orders/KOM1/proof?bodies=true"

        async def is_signed() -> bool:
            return await client.status("GET", "/orders/KOM1/proof", headers=headers[0]) == 200

        await until_async(is_signed)
        assert [await client.status("GET", path, headers=one) for one in headers] == [403, 200]


# Forgeries.


def reencoded(entry: str, **changed: Any) -> str:
    return json.dumps({**json.loads(entry), **changed}, separators=(",", ":"), sort_keys=True)


def change_entry(bundle: Any, **changed: Any) -> None:
    bundle["events"][1]["entry"] = reencoded(bundle["events"][1]["entry"], **changed)


def change_checkpoint(bundle: Any) -> None:
    origin, size, *rest = bundle["checkpoint"].split("\n")
    bundle["checkpoint"] = "\n".join([origin, str(int(size) + 1), *rest])


def swap(bundle: Any) -> None:
    events = bundle["events"]
    events[1], events[2] = events[2], events[1]


def leave_out_the_end(bundle: Any) -> None:
    del bundle["events"][-1], bundle["last"]


# Changes of a bundle of four events.
FORGERIES: dict[str, Callable[[Any], object]] = {
    "body": lambda bundle: bundle["events"][1]["opened"].update(body="{}"),
    "salt": lambda bundle: bundle["events"][1]["opened"].update(salt=bundle["events"][0]["opened"]["salt"]),
    "status": lambda bundle: change_entry(bundle, event={"status": "completed"}),
    "index": lambda bundle: bundle["events"][1].update(index=3),
    "order": lambda bundle: change_entry(bundle, order_no="KOM2"),
    "order of the bundle": lambda bundle: bundle.update(order_no="KOM2"),
    "origin": lambda bundle: bundle.update(origin="other.example"),
    "checkpoint": change_checkpoint,
    "proof": lambda bundle: bundle["events"][1]["proof"].reverse(),
    "longer proof": lambda bundle: bundle["events"][1]["proof"].append(bundle["events"][1]["proof"][0]),
    "header": lambda bundle: bundle["log"].update(entry=reencoded(bundle["log"]["entry"], existing=9)),
    "first left out": lambda bundle: bundle["events"].pop(0),
    "middle left out": lambda bundle: bundle["events"].pop(1),
    "last left out": lambda bundle: bundle["events"].pop(),
    "last left out with the statement": leave_out_the_end,
    "all left out": lambda bundle: bundle["events"].clear(),
    "two swapped": swap,
    "one twice": lambda bundle: bundle["events"].insert(1, bundle["events"][0]),
    "another statement": lambda bundle: bundle.update(last=bundle["checkpoint"]),
    "wrong since": lambda bundle: bundle["since"]["proof"].pop(),
    "since of another size": lambda bundle: bundle["since"].update(size=4),
    "unknown member": lambda bundle: bundle.update(more=1),
}


@pytest.mark.parametrize("kind", FORGERIES)
async def test_a_forgery_is_found(history: History, tmp_path: Path, kind: str) -> None:
    """Each change of a bundle is refused, with a reason."""
    await record(history, "KOM1", "Diajukan", "Dikirim")
    await history.build()
    (tmp_path / "old").write_text(await checkpoint_of(history), encoding="utf-8")
    await record(history, "KOM1", "Diterima", "Selesai")
    await record(history, "KOM2", "Diajukan")
    await history.build()
    bundle = await prove(history, "KOM1", with_bodies=True, since=3)
    options = ("--since", str(tmp_path / "old"))
    genuine = verify(bundle, key_of(history), tmp_path, *options)
    assert genuine.code == 0, genuine.text
    forged = copy.deepcopy(bundle)
    FORGERIES[kind](forged)
    assert forged != bundle
    result = verify(forged, key_of(history), tmp_path, *options)
    assert result.code == 1
    assert result.text.startswith("NOT VALID: ")
    assert len(result.text) > len("NOT VALID: x\n")


async def test_a_lying_operator_is_refuted(history: History, tmp_path: Path) -> None:
    """A bundle that was cut and signed again is valid by itself. The other party's bundle refutes it."""
    await record(history, "KOM1", *STATUSES)
    await history.build()
    honest = await prove(history, "KOM1")
    lie = copy.deepcopy(honest)
    del lie["events"][-1]
    signed = await history.signer.read_signed(history.connection)
    lie["last"] = history.signer.state_last(signed, 1, 2, 2)
    assert verify(lie, key_of(history), tmp_path).code == 0
    (tmp_path / "other.json").write_text(json.dumps(honest), encoding="utf-8")
    result = verify(lie, key_of(history), tmp_path, "--against", str(tmp_path / "other.json"))
    assert (result.code, "contradict each other" in result.text) == (1, True)
    assert verify(honest, key_of(history), tmp_path, "--against", str(tmp_path / "other.json")).code == 0


async def test_a_proof_of_swapped_versions_is_not_valid(history: History, tmp_path: Path) -> None:
    """A superuser swaps the versions of two events. The proof is given, and refused."""
    await record(history, "KOM1", *STATUSES)
    await history.build()
    await history.connection.execute(
        """
        ALTER TABLE order_events DISABLE TRIGGER order_events_immutable;
        UPDATE order_events SET originator_version = 9 WHERE notification_id = 3;
        UPDATE order_events SET originator_version = 3 WHERE notification_id = 2;
        UPDATE order_events SET originator_version = 2 WHERE notification_id = 3;
        """
    )
    bundle = await prove(history, "KOM1")
    assert [event["index"] for event in bundle["events"]] == [1, 3, 2]
    assert verify(bundle, key_of(history), tmp_path).code == 1


async def test_a_changed_character_changes_nothing_or_is_found(history: History, tmp_path: Path) -> None:
    """Of 650 changes of one character, each is refused, or the verified output is the same."""
    await record(history, "KOM1", *STATUSES, "Wat")
    await record(history, "KOM2", *STATUSES)
    await history.build()
    text = json.dumps(await prove(history, "KOM1", with_bodies=True, since=2))
    keys = verifier.read_keys(key_of(history))
    genuine = verifier.describe(verifier.join([verifier.verify(text, keys)]), Namespace())
    choose = random.Random(2)
    refused = 0
    for _ in range(650):
        at = choose.randrange(len(text))
        changed = text[:at] + choose.choice('aZ09+/=",:{}[] \\\u00e9') + text[at + 1 :]
        try:
            shown = verifier.describe(verifier.join([verifier.verify(changed, keys)]), Namespace())
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            refused += 1
        else:
            assert shown == genuine
    assert refused > 500
    file = tmp_path / "changed"
    file.write_text(text[:-1], encoding="utf-8")
    assert verifier.main([str(file), "--key", key_of(history)]) == verifier.INVALID


async def test_keys_and_checkpoints_are_those_of_the_format(served: Client) -> None:
    """The key's name is the origin, and the checkpoint names it too."""
    key = read_verifier_key(await served.text("/history/key"))
    assert key.name == read_checkpoint(await served.text("/history/checkpoint")).origin
    assert key.name.startswith("order-tracking.invalid/")


async def test_the_pages(served: Client) -> None:
    """An order's page shows that it is signed; the page Verify has the key and the verifiers."""
    page = await served.text("/track/KOM%201%2F%C3%A4?lang=en")
    assert "In the log up to entry 4, signed." in page
    assert f'href="{ORDER}/proof?after_position=' in page
    assert f'href="{ORDER}/proof?bodies=true&amp;after_position=' in page
    page = await served.text("/verify?lang=en")
    assert (await served.text("/history/key")).strip() in page
    assert 'href="/history/verify.html"' in page
