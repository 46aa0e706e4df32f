"""The state of the history, for metrics, pages and the check of an installation."""

from typing import NamedTuple

from projections.postgres_errors import Connection
from service.history import storage
from service.history.signer import HistoryHaltedError, KeyFileError, NotSigningError, Signer, read_published


class Status(NamedTuple):
    """The state of the history.

    Attributes:
        entries: the number of its entries, 0 before it has begun.
        signed: the number of those that are signed.
        halted: why it is not signed until an operator acts; else None.
        unsigned: why this machine does not sign it; else None.
        fault: why this machine's key cannot sign it; else None.
    """

    entries: int
    signed: int
    halted: str | None = None
    unsigned: str | None = None
    fault: str | None = None


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
        if tree is None:
            return Status(0, 0, unsigned=unsigned, fault=fault)
        published = await read_published(connection, tree, signer.find_verifiers(tree))
    signed = published.checkpoint.size if published is not None else 0
    return Status(tree.size, signed, halted, unsigned, fault)
