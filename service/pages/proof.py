"""The page that explains proofs, with the verifiers and the public key."""

from typing import Final

from aiohttp import web

from service.database.connections import ConnectionPool
from service.history.signer import Signer
from service.history.status import read_status
from service.http.parameters import read_query
from service.pages.orders import CommonQuery
from service.pages.render import render_page

PATH: Final = "/verify"


class ProofPages:
    """The page *Verify*.

    Args:
        pool: the connections to read with.
        signer: the key and its guard.
    """

    def __init__(self, pool: ConnectionPool, signer: Signer) -> None:
        self._pool = pool
        self.signer = signer

    async def show(self, request: web.Request) -> web.Response:
        """Show how to verify a proof, the public keys, and how far the history is signed."""
        read_query(CommonQuery, request)
        async with self._pool.connection() as connection:
            status = await read_status(self.signer, connection)
        return render_page(
            request,
            "verify.html",
            PATH,
            keys=[str(key) for key in self.signer.find_verifiers(status.tree)],
            proven=status,
        )
