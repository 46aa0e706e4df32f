"""The state of the history, for metrics, pages and the check of an installation."""

from typing import NamedTuple

from projections.postgres import Connection
from service.event_log import store
from service.features.proofs import storage
from service.features.proofs.signer import KeyFileError, NotSigningError, Signed, Signer
from service.features.proofs.storage import HistoryHaltedError, Tree


class Status(NamedTuple):
    """The state of the history.

    Attributes:
        tree: its tree; None before it has begun.
        published: its last signed checkpoint; None before the first.
        lag_seconds: the age of the oldest event that is not signed, 0 if all are.
        halted: why it is not signed until an operator acts; else None.
        unsigned: why this machine does not sign it; else None.
        fault: why this machine's key cannot sign it; else None.
    """

    tree: Tree | None
    published: Signed | None
    lag_seconds: float
    halted: str | None = None
    unsigned: str | None = None
    fault: str | None = None

    @property
    def entries(self) -> int:
        """The number of its entries, 0 before it has begun."""
        return 0 if self.tree is None else self.tree.size

    @property
    def signed(self) -> int:
        """The number of those that are signed."""
        return 0 if self.published is None else self.published.checkpoint.size


async def read_status(signer: Signer, connection: Connection) -> Status:
    """Return the state of the history.

    Args:
        signer: the key and its guard.
        connection: a connection outside any transaction.
    """
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        halted = unsigned = fault = None
        try:
            await signer.read_signed(connection)
        except HistoryHaltedError as error:
            halted = str(error)
        except NotSigningError as error:
            unsigned = str(error)
        except KeyFileError as error:
            fault = str(error)
        tree = await storage.read_tree(connection)
        status = Status(tree, signer.find_published(tree), 0.0, halted, unsigned, fault)
        lag_seconds = await store.read_lag_seconds(connection, max(0, status.signed - 1))
    return status._replace(lag_seconds=lag_seconds)
