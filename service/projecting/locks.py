"""The advisory locks of views. Any role that can connect to the database could take them too.

Their keys begin with the service's name, since the other applications of a database share the same keys.
"""

from typing import Final

# Only the process that holds this lock writes the view. A later statement reads the position, so that its
# snapshot is newer than the lock. A row lock on the position would not do: after a swap, a waiting process
# would continue with the old tables. Both statements take one round trip, so the view's name is filled in.
BEGIN_WITH_VIEW_LOCK: Final = (
    "BEGIN; SELECT pg_advisory_xact_lock(hashtextextended('order_tracking view {view}', 0))"
)
TAKE_VIEW_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended('order_tracking view ' || $1, 0))"
# The session of the process that leads the view holds this lock. It only saves the other processes work: a
# process that writes the view also takes the lock above, which is the fence.
TRY_LEAD: Final = "pg_try_advisory_lock(hashtextextended('order_tracking projector {view}', 0))"
GIVE_UP_LEAD: Final = "SELECT pg_advisory_unlock_all()"
# Until the connection is closed.
HOLD_VIEW_LOCK: Final = "SELECT pg_advisory_lock(hashtextextended('order_tracking view ' || $1, 0))"

# Erasures take turns with this lock, which ``erase_order`` takes too. Until the connection is closed.
HOLD_ERASURE_LOCK: Final = "SELECT pg_advisory_lock(hashtextextended('order_tracking erasure', 0))"

# One rebuild or backup at a time, until the connection is closed.
HOLD_REBUILD_LOCK: Final = "SELECT pg_advisory_lock(hashtextextended('order_tracking rebuild', 0))"
RELEASE_REBUILD_LOCK: Final = "SELECT pg_advisory_unlock(hashtextextended('order_tracking rebuild', 0))"
TRY_REBUILD_LOCK: Final = "SELECT pg_try_advisory_lock(hashtextextended('order_tracking rebuild', 0))"

# The transaction that swaps a view holds this lock. A rebuild waits for it before it drops tables, since the
# connection with the rebuild lock may have been lost while another process was swapping.
TAKE_SWAP_LOCK: Final = "SELECT pg_advisory_xact_lock(hashtextextended('order_tracking swap', 0))"
