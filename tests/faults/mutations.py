"""The mutations: faults of a mutant, or of a server that breaks its promise. Each must turn out red."""

from dataclasses import replace
from functools import partial
from typing import Final

from tests.faults import mutants
from tests.faults.deliveries import EVENTS, KILL_SECONDS, TWO_SERVICES, deliver, kill_a_service
from tests.faults.fault import GIVEN, OWN, PROXIED, Fault
from tests.faults.maintenance import erase_beside_vacuum
from tests.faults.network import IDLE_SECONDS, cut, drop_idle, stall_readers
from tests.faults.operator import Told
from tests.faults.processes import kill_service, stop_immediately
from tests.faults.proxy import Cut
from tests.faults.replication import fail_over, fail_over_under_load, restore_backup
from tests.faults.server_settings import NOTIFY_SETTINGS, change_defaults, fill_notification_queue
from tests.faults.stalls import STALLS_PER_SECOND, hold_append_lock
from tests.faults.world import Layout, World

STALLED: Final = Layout(per_second=STALLS_PER_SECOND)
# Longer than a report's time.
STALL_SECONDS: Final = (3.1,)
LOCK_TABLE_TO_ERASE: Final = """
    ALTER PROCEDURE erase_order RENAME TO erase_order_at_last;
    CREATE PROCEDURE erase_order(order_no text, reason text) LANGUAGE plpgsql AS $$
    BEGIN
        LOCK TABLE order_events IN SHARE ROW EXCLUSIVE MODE;
        CALL erase_order_at_last(order_no, reason);
    END $$
"""


async def stop_before_the_log_is_written(world: World) -> int:
    """Stop the server while acknowledged commits are only in its memory.

    The history's commits also bring earlier ones to the disk, once a second, so one stop may lose nothing.
    """
    times = 0
    for _ in range(3):
        connection = await world.connect()
        # Everything up to this point is on disk.
        await connection.execute("CHECKPOINT")
        await connection.close()
        await world.load.recovered()
        times += await stop_immediately(world)
    return times


async def excuse_nothing(world: World) -> int:
    """Fail over to a standby that lacks commits, as if it had been synchronous."""
    times = await fail_over(world)
    world.missing.clear()
    return times


async def lock_table_to_erase(world: World) -> int:
    """Erase with a lock on the table, which waits for VACUUM."""
    connection = await world.connect()
    await connection.execute(LOCK_TABLE_TO_ERASE)
    await connection.close()
    return await erase_beside_vacuum(world)


MUTATIONS: Final = (
    Fault(
        "asynchronous-commit",
        "synchronous_commit=off and an immediate stop",
        Layout(given_postgres=True, server_settings={"synchronous_commit": "off", "wal_writer_delay": "10s"}),
        stop_before_the_log_is_written,
        is_short=True,
    ),
    Fault(
        "early-acknowledgement",
        "an acknowledgement before the commit, and kill -9",
        replace(GIVEN, command=mutants.command(mutants.acknowledge_early)),
        kill_service,
        is_short=True,
    ),
    Fault(
        "asynchronous-standby",
        "a failover that is believed to be synchronous",
        replace(PROXIED, standby="asynchronous"),
        excuse_nothing,
    ),
    Fault(
        "keep-memory",
        "a restore under a service that keeps what it remembers",
        replace(GIVEN, command=mutants.command(mutants.keep_memory)),
        restore_backup,
        is_short=True,
    ),
    Fault(
        "believe-positions",
        "a restore under a service that believes every position",
        replace(GIVEN, command=mutants.command(mutants.believe_positions)),
        restore_backup,
    ),
    Fault(
        "retry-blindly",
        "a connection cut after COMMIT, and a retry without a search",
        replace(PROXIED, command=mutants.command(mutants.retry_blindly)),
        partial(cut, Cut.AFTER_COMMIT),
    ),
    Fault(
        "use-defaults",
        "other defaults of the database, which reach the service",
        replace(OWN, command=mutants.command(mutants.use_defaults)),
        change_defaults,
    ),
    Fault(
        "require-notifications",
        "a full notification queue, which fails each append",
        Layout(
            given_postgres=True,
            server_settings=NOTIFY_SETTINGS,
            command=mutants.command(mutants.require_notifications),
        ),
        fill_notification_queue,
    ),
    Fault(
        "use-first-time-limit",
        "a stall, and a batch with the time limit of its first report",
        replace(STALLED, command=mutants.command(mutants.use_first_time_limit)),
        partial(hold_append_lock, STALL_SECONDS),
    ),
    Fault(
        "stay-silent",
        "a stall, and a service that does not report it",
        replace(STALLED, command=mutants.command(mutants.stay_silent)),
        partial(hold_append_lock, STALL_SECONDS),
        Told(("lock_held",), is_ready=True),
    ),
    Fault(
        "trust-connections",
        "idle connections dropped, and not probed",
        replace(PROXIED, command=mutants.command(mutants.trust_connections)),
        partial(drop_idle, IDLE_SECONDS),
    ),
    Fault(
        "hold-much",
        "readers that read nothing, and large slices for each",
        replace(OWN, command=mutants.command(mutants.hold_much)),
        stall_readers,
    ),
    Fault(
        "forget-held",
        "a subscription that forgets its held orders, and kill -9",
        replace(TWO_SERVICES, command=mutants.command(mutants.forget_held)),
        partial(deliver, EVENTS, KILL_SECONDS, kill_a_service),
    ),
    Fault(
        "pass-held",
        "a subscription whose later events pass a held one",
        replace(TWO_SERVICES, command=mutants.command(mutants.pass_held)),
        partial(deliver, EVENTS, KILL_SECONDS, kill_a_service),
    ),
    Fault(
        "forget-delivered",
        "a failover that loses delivered events, and a service that forgets that it delivered them",
        Layout(
            given_postgres=True,
            standby="asynchronous",
            has_shop=True,
            command=mutants.command(mutants.forget_delivered),
        ),
        fail_over_under_load,
    ),
    Fault(
        "sign-anything",
        "a restore under a service whose guard lets everything pass",
        replace(GIVEN, command=mutants.command(mutants.sign_anything)),
        restore_backup,
    ),
    Fault("lock-table-to-erase", "an erasure with a lock on the table", OWN, lock_table_to_erase),
)
