"""The history over HTTP: checkpoint, keys and tiles as in C2SP tlog-tiles, and proofs of orders and events."""

import re
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Final

import structlog
from aiohttp import hdrs, web
from pydantic import Field

from service.database.connections import ConnectionPool
from service.event_log.follow import AwaitedPosition
from service.features.proofs import bundles, storage
from service.features.proofs.bundles import (
    Bundle,
    NotInHistoryError,
    NotSignedYetError,
    SinceError,
    is_last,
    make_bundle,
    make_event_proof,
)
from service.features.proofs.notes import Checkpoint, read_checkpoint
from service.features.proofs.problems import HistoryProblem, history_halted
from service.features.proofs.signer import KeyFileError, NotSigningError, Signed, Signer
from service.features.proofs.status import read_status
from service.features.proofs.storage import DAMAGED, HistoryHaltedError
from service.features.proofs.tree import TILE_HASHES, TileId, width_of
from service.http.access import has_scope
from service.http.endpoints import HTML, OCTETS, TEXT, Endpoint, PathParameters, Tag
from service.http.parameters import Position, Query, Version, order_path, parse_number, parse_order_no
from service.http.problems import ProblemError, ProblemType, bad_parameter, unavailable
from service.http.responses import json_response, response
from service.projecting.position import AFTER_POSITION_SECONDS_MAX

# The paths below which the resources of tlog-tiles lie.
PREFIX: Final = "/history"
PUBLIC: Final = "ORDER_TRACKING_HISTORY_PUBLIC"
# A tile or an entry never changes.
IMMUTABLE: Final = "private, max-age=31536000, immutable"
IMMUTABLE_PUBLIC: Final = "public, max-age=31536000, immutable"
LEVEL_MAX: Final = 63
# 1234067 is x001/x234/067. A partial tile ends with its width.
_TILE_PATH: Final = re.compile(r"((?:x\d{3}/){0,5}\d{3})(?:\.p/([1-9]\d{0,2}))?", re.ASCII)
ENTRY_LENGTH_BYTES: Final = 2

logger = structlog.get_logger()

_FOLDER: Final = Path(__file__).resolve().parent
VERIFY_PY: Final = _FOLDER / "verify.py"
VERIFY_HTML: Final = _FOLDER / "verify.html"
PLAIN: Final = "text/plain; charset=utf-8"


class ProofQuery(Query):
    """What the proof of an order has."""

    bodies: bool = Field(
        default=False, description="with the reports' bodies; needs a key of the scope `read:bodies`"
    )
    since: int | None = Field(
        default=None, ge=1, description="with a proof that the history continues that of this size"
    )
    from_version: Version = Field(default=1, description="begin with this version of the order")
    after_position: Position | None = Field(
        default=None,
        description="wait until timelines and the signed history have reached this position of the log",
    )


class HistoryApi:
    """Serves the history.

    Args:
        pool: the connections to read with.
        signer: the key and its guard.
        signed: the last position that this process knows to be signed.
        wait_for_view: waits until the view of timelines has reached a position; raises a problem otherwise.
        is_public: whether checkpoint, keys, tiles and verifiers need no API key.
    """

    path_parameters: ClassVar[PathParameters] = {
        "level": {
            "schema": {"type": "integer", "minimum": 0, "maximum": LEVEL_MAX},
            "description": "the tile's level",
        },
        "tile": {
            "schema": {"type": "string", "minLength": 3},
            "description": "the tile's number, and its width if it is partial: `x001/067.p/8` (tlog-tiles)",
        },
    }
    tag = Tag("history", "Proofs of orders that anyone verifies offline: see docs/proof.md.")

    def __init__(
        self,
        pool: ConnectionPool,
        signer: Signer,
        signed: AwaitedPosition,
        wait_for_view: Callable[[int], Awaitable[None]],
        *,
        is_public: bool,
    ) -> None:
        self._pool = pool
        self._signer = signer
        self._signed = signed
        self._wait_for_view = wait_for_view
        self._is_damage_logged = False
        self.is_public = is_public
        self._immutable: dict[str, str] = {hdrs.CACHE_CONTROL: IMMUTABLE_PUBLIC if is_public else IMMUTABLE}

    @Endpoint(
        "GET",
        "/history/checkpoint",
        str,
        media=TEXT,
        problems=(HistoryProblem.HISTORY_HALTED,),
        public_setting=PUBLIC,
    )
    async def get_checkpoint(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the last signed checkpoint of the history: its origin, size and root hash."""
        async with self._pool.connection() as connection:
            status = await read_status(self._signer, connection)
        if status.halted is not None:
            # The published one is then older than the last that was signed.
            raise self._halted(status.halted)
        if status.published is None:
            raise _no_checkpoint()
        return response(status.published.note.encode(), PLAIN)

    @Endpoint("GET", "/history/key", str, media=TEXT, public_setting=PUBLIC)
    async def get_verifier_keys(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the public keys of the history, one on each line. Verifiers must know them from elsewhere too."""
        async with self._pool.connection() as connection:
            keys = self._signer.find_verifiers(await storage.read_tree(connection))
        if not keys:
            raise unavailable("the history has no key yet")
        return response("".join(f"{key}\n" for key in keys).encode(), PLAIN)

    @Endpoint(
        "GET",
        "/history/tile/entries/{tile}",
        bytes,
        media=OCTETS,
        problems=(HistoryProblem.NO_SUCH_TILE,),
        has_path_rest=True,
    )
    async def get_entry_bundle(self, request: web.Request, _query: Query) -> web.Response:
        """Get up to 256 entries of the history, each after its length in two bytes."""
        signed = await self._read_published()
        tile, width = _parse_tile(request, 0, signed.checkpoint)
        start = tile.number * TILE_HASHES
        async with self._pool.connection() as connection, connection.transaction(isolation="repeatable_read"):
            entries = await bundles.read_range(connection, signed.tree, start, start + width)
        body = b"".join(len(entry).to_bytes(ENTRY_LENGTH_BYTES) + entry for entry in entries)
        return response(body, OCTETS, headers={hdrs.CACHE_CONTROL: IMMUTABLE})

    @Endpoint(
        "GET",
        "/history/tile/{level}/{tile}",
        bytes,
        media=OCTETS,
        problems=(HistoryProblem.NO_SUCH_TILE, HistoryProblem.HISTORY_HALTED),
        has_path_rest=True,
        public_setting=PUBLIC,
    )
    async def get_tile(self, request: web.Request, _query: Query) -> web.Response:
        """Get up to 256 hashes of one level of the history."""
        signed = await self._read_published()
        text = request.match_info["level"]
        level = int(text) if re.fullmatch(r"0|[1-9]\d?", text, re.ASCII) else LEVEL_MAX + 1
        tile, width = _parse_tile(request, level, signed.checkpoint)
        try:
            async with self._pool.connection() as connection:
                hashes = await storage.read_tile(connection, signed.tree.number, tile, width)
        except HistoryHaltedError as error:
            raise self._halted(str(error)) from None
        return response(hashes, OCTETS, headers=self._immutable)

    @Endpoint("GET", "/history/verify.py", str, media=TEXT, public_setting=PUBLIC)
    async def get_verifier(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the verifier: one file for Python 3.9 or newer, which needs nothing else. Keep it."""
        return response(VERIFY_PY.read_bytes(), PLAIN, headers=_attachment(VERIFY_PY.name))

    @Endpoint("GET", "/history/verify.html", str, media=HTML, public_setting=PUBLIC)
    async def get_verifier_page(self, _request: web.Request, _query: Query) -> web.Response:
        """Get the verifier as a page that works offline in a browser. Keep it."""
        return response(
            VERIFY_HTML.read_bytes(), f"{HTML}; charset=utf-8", headers=_attachment(VERIFY_HTML.name)
        )

    @Endpoint(
        "GET",
        "/orders/{order_no}/proof",
        Bundle,
        query=ProofQuery,
        problems=(HistoryProblem.NOT_IN_HISTORY, HistoryProblem.HISTORY_HALTED),
    )
    async def get_order_proof(self, request: web.Request, query: ProofQuery) -> web.Response:
        """Get the proof of an order's timeline, at most 1,000 events, which verify.py verifies offline."""
        order_no = parse_order_no(request)
        if query.bodies and not has_scope(request, "read:bodies"):
            raise ProblemError(ProblemType.FORBIDDEN, "bodies=true needs an API key with the scope read:bodies")
        if query.after_position is not None:
            await self._wait_for_view(query.after_position)
        with self._problems(order_no):
            try:
                bundle = await self._make_bundle(order_no, query)
            except NotSignedYetError:
                await self._signed.wait_for(query.after_position or 0, AFTER_POSITION_SECONDS_MAX)
                bundle = await self._make_bundle(order_no, query)
        headers = _attachment(f"{_suggest_name(order_no)}.proof.json")
        if not is_last(bundle):
            # The next file must show that its history continues this one's.
            version, size = (
                query.from_version + len(bundle["events"]),
                read_checkpoint(bundle["checkpoint"]).size,
            )
            path = order_path(order_no, f"proof?since={size}&from_version={version}")
            headers["Link"] = f'<{path}{"&bodies=true" if query.bodies else ""}>; rel="next"'
        return json_response(bundle, headers=headers)

    @Endpoint(
        "GET",
        "/orders/{order_no}/events/{version}/proof",
        str,
        media=TEXT,
        problems=(HistoryProblem.NOT_IN_HISTORY, HistoryProblem.HISTORY_HALTED),
    )
    async def get_event_proof(self, request: web.Request, _query: Query) -> web.Response:
        """Get the proof of one event in the format of C2SP tlog-proof; its extra data is the entry."""
        order_no, version = parse_order_no(request), parse_number(request.match_info["version"])
        with self._problems(order_no):
            if not version:
                raise NotInHistoryError
            async with self._pool.connection() as connection:
                proof = await make_event_proof(connection, self._signer, order_no, version)
        return response(
            proof.encode(), PLAIN, headers=_attachment(f"{_suggest_name(order_no)}-{version}.tlog-proof")
        )

    async def _make_bundle(self, order_no: str, query: ProofQuery) -> Bundle:
        async with self._pool.connection() as connection:
            return await make_bundle(
                connection,
                self._signer,
                order_no,
                with_bodies=query.bodies,
                since=query.since,
                from_version=query.from_version,
                after_position=query.after_position,
            )

    @contextmanager
    def _problems(self, order_no: str) -> Iterator[None]:
        try:
            yield
        except NotInHistoryError:
            detail = (
                f"the signed history has no such event of {order_no}: check the number; a new report is there "
                "after about a second"
            )
            raise ProblemError(HistoryProblem.NOT_IN_HISTORY, detail, order_no=order_no) from None
        except NotSignedYetError as error:
            raise unavailable(f"{error}: try again in a moment", position=error.position) from None
        except SinceError as error:
            raise bad_parameter("since", str(error)) from None
        except HistoryHaltedError as error:
            raise self._halted(str(error)) from None
        except KeyFileError:
            # The file's path is the operator's business.
            raise unavailable("the history's key cannot be used: see 'order-tracking check'") from None
        except NotSigningError as error:
            raise unavailable(self._without_folder(str(error))) from None

    def _halted(self, reason: str) -> ProblemError:
        if reason == DAMAGED and not self._is_damage_logged:
            # The follower logs all other reasons; it does not read these hashes.
            self._is_damage_logged = True
            logger.error("the history is damaged", reason=reason)
        return history_halted(self._without_folder(reason))

    def _without_folder(self, text: str) -> str:
        return text.replace(f"{self._signer.key_file.parent}/", "")

    async def _read_published(self) -> Signed:
        async with self._pool.connection() as connection:
            signed = self._signer.find_published(await storage.read_tree(connection))
        if signed is None:
            raise _no_checkpoint()
        return signed


def _no_checkpoint() -> ProblemError:
    return unavailable("the history has no signed checkpoint yet")


def _parse_tile(request: web.Request, level: int, checkpoint: Checkpoint) -> tuple[TileId, int]:
    """Return the tile that a path names, and how many of its hashes.

    Raises:
        ProblemError: 404, the signed history has no such tile.
    """
    match = _TILE_PATH.fullmatch(request.match_info["tile"])
    if match is not None and level <= LEVEL_MAX:
        number = int(match[1].replace("x", "").replace("/", ""))
        width = int(match[2] or TILE_HASHES)
        tile = TileId(level, number)
        is_canonical = len(match[1]) == len("000") or not match[1].startswith("x000")
        if is_canonical and width <= width_of(tile, checkpoint.size):
            return tile, width
    detail = (
        f"the signed history has {checkpoint.size} entries: expected a path of its tiles, such as 0/000.p/1"
    )
    raise ProblemError(HistoryProblem.NO_SUCH_TILE, detail)


def _suggest_name(order_no: str) -> str:
    """Return an order number as a part of a file's name: letters, digits, dots, hyphens and underscores."""
    kept = "".join(one if one.isascii() and (one.isalnum() or one in "._-") else "_" for one in order_no)
    return kept.lstrip(".") or "order"


def _attachment(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}
