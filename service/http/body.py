"""Request bodies: read within a time limit and a size limit, and decompressed."""

import asyncio
import zlib
from typing import Final

from aiohttp import StreamReader, hdrs, web

from service.http.budgets import BODY_BYTES_FREE
from service.http.connections import Connection, connection
from service.http.problems import ProblemError, ProblemType

# Compressors write one member. Each further member costs a copy of the rest.
GZIP_MEMBERS_MAX: Final = 16

_CODINGS: Final = ("", "identity", "gzip")


async def read_body(request: web.Request, bytes_max: int | None = None) -> bytes:
    """Return the body of a request, decompressed.

    Args:
        request: the request.
        bytes_max: the size limit, before and after decompression; None for the application's.

    Raises:
        ProblemError: the body is too large (413), too slow (408), broken (400), or in an unknown coding (415).
        OverBudgetError: too many bytes of bodies are arriving (429).
    """
    limit = request.client_max_size if bytes_max is None else bytes_max
    coding = ",".join(request.headers.getall(hdrs.CONTENT_ENCODING, ())).strip().lower()
    if coding not in _CODINGS:
        detail = "Supported content codings: gzip, identity."
        raise ProblemError(ProblemType.UNKNOWN_CODING, detail, headers={"Accept-Encoding": "gzip"})
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    try:
        if request.content.is_eof():
            body = await request.content.readany()
            if len(body) > limit:
                raise _too_large(limit)
        else:
            client = connection(request)
            seconds_max = client.all_open.limits.body_seconds_max
            async with asyncio.timeout(seconds_max):
                body = await _read_arriving(request.content, limit, client)
        return body if coding != "gzip" else _gunzip(body, limit)
    except TimeoutError:
        detail = f"the body took longer than {seconds_max:g} s"
        raise ProblemError(ProblemType.BODY_TIMEOUT, detail, headers={hdrs.CONNECTION: "close"}) from None
    except zlib.error as error:
        raise ProblemError(ProblemType.BAD_BODY, f"the body is not valid gzip: {error}") from None
    except (web.RequestPayloadError, ConnectionError):
        # The transfer was corrupt, or the sender has left and reads no response.
        raise ProblemError(ProblemType.BAD_BODY, "the body cannot be read to its end") from None


async def _read_arriving(content: StreamReader, limit: int, client: Connection) -> bytes:
    """Read a body piece by piece, so that it holds no more of the budget than has arrived."""
    budget = client.all_open.budgets.bodies
    body = bytearray()
    held = 0
    try:
        while piece := await content.readany():
            body += piece
            if len(body) > limit:
                raise _too_large(limit)
            if (more := len(body) - BODY_BYTES_FREE - held) > 0:
                budget.take(client.holder, more)
                held += more
        return bytes(body)
    finally:
        budget.give_back(client.holder, held)


def _gunzip(body: bytes, limit: int) -> bytes:
    """Decompress up to the end of the last member. aiohttp would accept a truncated stream as complete."""
    content = b""
    for _ in range(GZIP_MEMBERS_MAX):
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        content += member.decompress(body, limit + 1 - len(content))
        if len(content) > limit:
            raise _too_large(limit)
        if not member.eof:
            raise zlib.error("it is truncated")
        body = member.unused_data
        if not body:
            return content
    raise zlib.error(f"it has more than {GZIP_MEMBERS_MAX} members")


def _too_large(limit: int) -> ProblemError:
    return ProblemError(ProblemType.TOO_LARGE, f"a body may have at most {limit} bytes")
