"""The faults. Each breaks something several times while the load continues."""

import signal
from dataclasses import replace
from functools import partial
from typing import Final

from tests.faults.deliveries import DELIVERIES
from tests.faults.fault import GIVEN, OWN, PROXIED, WITNESSED, Fault
from tests.faults.maintenance import maintain
from tests.faults.network import IDLE_SECONDS, cut, drop_idle, slow_sockets, stall_readers
from tests.faults.operator import Told
from tests.faults.processes import (
    crash_before_projection,
    end_postmaster,
    kill_backend,
    kill_in_turn,
    kill_listener,
    kill_service,
    stand_still,
    stop_immediately,
    terminate_service,
    upgrade_slowly,
)
from tests.faults.proxy import Cut
from tests.faults.replication import (
    cancel_waiting_commits,
    check_standby,
    fail_over,
    fail_over_synchronously,
    fail_over_under_load,
    freeze_primary,
    restore_backup,
    restore_cleanly,
    vanish_primary,
)
from tests.faults.server_settings import (
    FEW_CONNECTIONS,
    NOTIFY_SETTINGS,
    change_defaults,
    check_without_rights,
    fill_notification_queue,
    leave_full_queue,
    revoke_rights,
    use_all_connections,
    use_other_encoding,
)
from tests.faults.stalls import STALLS_PER_SECOND, STALLS_SECONDS, hold_append_lock, lock_table
from tests.faults.storage import DISK_MB, fail_fdatasync, fill_disk
from tests.faults.traffic import overload, repeat_46_times
from tests.faults.world import Layout

# A line of the log after an asynchronous failover, or a restore of an older backup.
LOST: Final = "the database has lost acknowledged reports"

# So few that each batch has a report or two: none of them may be recorded after its caller was refused.
FEW_PER_SECOND: Final = 20.0

FAULTS: Final = (
    Fault("kill-service", "kill -9 of the service", OWN, kill_service, is_short=True),
    Fault("sigterm", "SIGTERM with a half-sent body", OWN, terminate_service),
    Fault("kill-backend", "kill -9 of a database backend", OWN, kill_backend),
    Fault(
        "kill-postmaster",
        "kill -9 of the postmaster",
        OWN,
        partial(end_postmaster, signal.SIGKILL),
        is_short=True,
    ),
    Fault("stop-immediate", "pg_ctl stop -m immediate", OWN, stop_immediately),
    Fault("still-2s", "SIGSTOP of PostgreSQL for 2 s", OWN, partial(stand_still, 2.0)),
    Fault("still-10s", "SIGSTOP of PostgreSQL for 10 s", OWN, partial(stand_still, 10.0), Told(("no_answer",))),
    Fault(
        "still-8s",
        "SIGSTOP of PostgreSQL for 8 s, and few reports",
        Layout(per_second=FEW_PER_SECOND),
        partial(stand_still, 8.0),
        Told(("no_answer",)),
    ),
    Fault("lock-table", "a table lock held for 10 s", OWN, lock_table, Told(("lock_held",))),
    Fault(
        "stalls",
        "the append lock held for 0.5, 2.9, 3.1 and 10 s",
        Layout(per_second=STALLS_PER_SECOND),
        partial(hold_append_lock, STALLS_SECONDS),
        Told(("lock_held",)),
    ),
    Fault("cut-statement", "connection cut mid-statement", PROXIED, partial(cut, Cut.MID_STATEMENT)),
    Fault("cut-commit", "connection cut after COMMIT", PROXIED, partial(cut, Cut.AFTER_COMMIT), is_short=True),
    Fault("idle", "idle connections dropped by a firewall", PROXIED, partial(drop_idle, IDLE_SECONDS)),
    Fault("disk-full", "disk full", Layout(disk_mb=DISK_MB), fill_disk, Told(("disk_full",))),
    Fault("fdatasync", "fdatasync fails", OWN, fail_fdatasync),
    Fault("kill-listener", "LISTEN connection killed", OWN, kill_listener),
    Fault("before-projection", "crash between append and projection", GIVEN, crash_before_projection),
    Fault(
        "overload",
        "3 times the capacity for 20 s",
        Layout(given_postgres=True, through_proxy=True, has_load=False),
        overload,
        Told(("queue_full",), is_ready=True),
    ),
    Fault("slow-sockets", "500 slow sockets", OWN, slow_sockets),
    Fault("stalled-readers", "2,000 readers of streams that read nothing", OWN, stall_readers),
    Fault("repeats", "1,000 reports sent 46 times", Layout(has_load=False), repeat_46_times),
    Fault(
        "failover",
        "failover to an asynchronous standby that lacks commits",
        replace(WITNESSED, through_proxy=True, standby="asynchronous"),
        fail_over,
        Told(("read_only",), logged=(LOST,)),
    ),
    Fault(
        "failover-load",
        "the same failover, while reports go on",
        replace(WITNESSED, through_proxy=True, standby="asynchronous"),
        fail_over_under_load,
        Told(logged=(LOST,)),
    ),
    Fault(
        "failover-hosts",
        "the same failover, with both hosts in the DSN",
        replace(WITNESSED, standby="asynchronous"),
        fail_over_under_load,
        Told(logged=(LOST,)),
    ),
    Fault(
        "failover-frozen",
        "a suspended primary, with both hosts in the DSN",
        replace(WITNESSED, standby="synchronous"),
        freeze_primary,
    ),
    Fault(
        "failover-link",
        "a primary whose network link is down, with both hosts in the DSN",
        replace(WITNESSED, standby="synchronous", has_link=True),
        vanish_primary,
    ),
    Fault(
        "failover-sync",
        "synchronous standby lost, then the primary",
        Layout(given_postgres=True, through_proxy=True, standby="synchronous"),
        fail_over_synchronously,
        Told(("replication_wait",)),
    ),
    Fault(
        "sync-cancelled",
        "a wait for the synchronous standby cancelled, then the primary lost",
        Layout(given_postgres=True, through_proxy=True, standby="synchronous"),
        cancel_waiting_commits,
    ),
    Fault(
        "restore",
        "an older backup restored under a running service",
        WITNESSED,
        restore_backup,
        Told(logged=(LOST,)),
    ),
    Fault(
        "restore-clean",
        "an older dump restored with no connection cut",
        WITNESSED,
        restore_cleanly,
        Told(logged=(LOST,)),
    ),
    Fault("defaults", "serializable, read-only and short timeouts by default", OWN, change_defaults),
    Fault("encoding", "a start on a database not in UTF8", OWN, use_other_encoding),
    Fault(
        "notify-queue",
        "a full notification queue",
        Layout(given_postgres=True, server_settings=NOTIFY_SETTINGS),
        fill_notification_queue,
    ),
    Fault(
        "max-connections",
        "no connection left on the server",
        Layout(given_postgres=True, server_settings=FEW_CONNECTIONS),
        use_all_connections,
        Told(("too_many_connections",)),
    ),
    Fault(
        "rights",
        "the right to append revoked",
        OWN,
        revoke_rights,
        Told(("unusable",), logged=("permission denied for table order_events",)),
    ),
    Fault(
        "notify-queue-left",
        "a notification queue after it was full",
        Layout(given_postgres=True, server_settings=NOTIFY_SETTINGS),
        leave_full_queue,
    ),
    Fault(
        "check-standby",
        "check on a standby",
        Layout(given_postgres=True, through_proxy=True, standby="asynchronous"),
        check_standby,
    ),
    Fault("check-rights", "check without the right to append", OWN, check_without_rights),
    Fault("maintenance", "VACUUM, REINDEX, pg_dump, erase and replay at once", OWN, maintain),
    *DELIVERIES,
    Fault("two-services", "two services killed in turn", Layout(given_postgres=True, services=2), kill_in_turn),
    Fault(
        "two-releases",
        "two releases with different features, killed and suspended",
        replace(WITNESSED, services=2),
        upgrade_slowly,
    ),
)
