"""The page that explains proofs, with verifiers and public keys, and the card on the page of an order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from aiohttp import web

from projections.postgres import Connection
from service.database.connections import ConnectionPool
from service.feature import MenuEntry, Page, Pages, Shown
from service.features.proofs.bundles import EVENTS_MAX
from service.features.proofs.signer import Signer
from service.features.proofs.status import read_status

PATH: Final = "/verify"


class ProofPages:
    """The page *Verify*, and the card.

    Args:
        pool: the connections to read with.
        signer: the key and its guard.
    """

    def __init__(self, pool: ConnectionPool, signer: Signer) -> None:
        self._pool = pool
        self._signer = signer

    def pages(self) -> Pages:
        """Return the page and the card."""
        return Pages(
            folder=Path(__file__).parent,
            pages=[Page("GET", PATH, "read", self.show)],
            menu=[MenuEntry(PATH, "verify", "read")],
            read_card=self.read_card,
        )

    async def show(self, _request: web.Request, _form: Mapping[str, str]) -> Shown:
        """Show how to verify a proof, the public keys, and how far the history is signed."""
        async with self._pool.connection() as connection:
            status = await read_status(self._signer, connection)
        keys = [str(key) for key in self._signer.find_verifiers(status.tree)]
        return Shown("verify_page.html", {"keys": keys, "proven": status})

    async def read_card(self, connection: Connection, _request: web.Request) -> Shown:
        """Show on the page of an order how far the history is signed, and where its proof is."""
        proven = await read_status(self._signer, connection)
        return Shown("proof_card.html", {"proven": proven, "proof_events_max": EVENTS_MAX})
