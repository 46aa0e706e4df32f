"""How a page is drawn and sent: templates, languages, headers, and the files beside them."""

import codecs
import hashlib
import re
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

from aiohttp import hdrs, web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from domain.statuses import SETTLED
from domain.transitions import VERDICTS
from service.http.access import KEY_COOKIE
from service.pages.i18n import IN_ALL, LANGUAGES, Language, Words, iso, preferred

FOLDER: Final = Path(__file__).resolve().parent
LANGUAGE_COOKIE: Final = "order_tracking_language"
LANGUAGE_SECONDS: Final = 365 * 86_400

# Nothing but what this service itself serves: a hostile order number could do nothing even if it got through.
SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
EVERY_HEADERS: Final = {
    "Server": "order-tracking",
    "Content-Security-Policy": SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    # To this service itself a form says where it stands.
    "Referrer-Policy": "same-origin",
}
PAGE_HEADERS: Final = {
    **EVERY_HEADERS,
    "Content-Type": "text/html; charset=utf-8",
    # What is known of orders is for nobody's cache; the same address is read in two languages.
    "Cache-Control": "no-store",
    "Vary": "Accept, Accept-Language, Cookie",
}
MEDIA: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# An address that names the very bytes never changes; any other is asked for again.
FOREVER: Final = "public, max-age=31536000, immutable"

DUMP_BYTES: Final = 16
_UNSHOWN: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

# First strong isolate and its end, where no element can help: what stands between cannot turn what is around.
_ISOLATE: Final = "\u2068{}\u2069"

_KINDS: Final = {
    "delivered": "good", "completed": "good", "problem": "warn", "returning": "warn",
    "lost": "bad", "damaged": "bad", "cancelled": "rest", "returned": "rest", "": "rest", None: "rest",
}  # fmt: skip


class Asset(NamedTuple):
    """A file that pages are made with."""

    body: bytes
    media: str
    version: str


def _read_assets() -> dict[str, Asset]:
    assets = {}
    for file in sorted((FOLDER / "static").iterdir()):
        body = file.read_bytes()
        assets[file.name] = Asset(body, MEDIA[file.suffix], hashlib.sha256(body).hexdigest()[:16])
    return assets


ASSETS: Final = _read_assets()


def asset(name: str) -> str:
    """Return the address of a file, which changes with its bytes."""
    return f"/static/{name}?v={ASSETS[name].version}"


def asset_answer(request: web.Request, name: str) -> web.Response:
    """Answer a file, or 304 where the client has it."""
    found = ASSETS.get(name)
    if found is None:
        raise web.HTTPNotFound
    etag = f'"{found.version}"'
    is_named = request.query.get("v") == found.version
    headers = {**EVERY_HEADERS, "ETag": etag, "Cache-Control": FOREVER if is_named else "no-cache"}
    if etag in {tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")}:
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = f"{found.media}; charset=utf-8"
    return web.Response(body=found.body, headers=headers)


def track_path(order_no: str) -> str:
    """Return the path of an order's page, percent-encoded."""
    return f"/track/{quote(order_no, safe='')}"


def isolated(text: str) -> str:
    """Return text that cannot turn what stands around it, for titles and attributes."""
    return _ISOLATE.format(text)


def written(text: str) -> str:
    """Return text with all but ASCII spelled out: it may be unseen, or taken for something else."""
    seen = "".join(one if one.isascii() and one.isprintable() else f"\\u{{{ord(one):x}}}" for one in text)
    return seen if seen == seen.strip() else f"“{seen}”"


def readable(body: bytes) -> str | None:
    """Return a body, cut anywhere, as text; None where it is not UTF-8, or has what cannot be shown."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(body)
    except UnicodeDecodeError:
        return None
    return None if _UNSHOWN.search(text) else text


def hex_dump(body: bytes) -> str:
    """Return a body byte by byte, sixteen a line: where the line begins, in hex, and as ASCII."""
    lines = []
    for begin in range(0, len(body), DUMP_BYTES):
        line = body[begin : begin + DUMP_BYTES]
        seen = "".join(chr(byte) if chr(byte).isascii() and chr(byte).isprintable() else "." for byte in line)
        lines.append(f"{begin:06x}  {line.hex(' '):<{3 * DUMP_BYTES}} {seen}")
    return "\n".join(lines)


def kind_of(status: str | None) -> str:
    """Return how a status is coloured: go, good, warn, bad or rest."""
    return _KINDS.get(status, "go")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.globals.update(
        asset=asset,
        iso=iso,
        isolated=isolated,
        kind_of=kind_of,
        settled=SETTLED,
        track_path=track_path,
        verdicts=VERDICTS,
    )
    return environment


def language_of(request: web.Request) -> Language:
    """Return the language that was asked for: by the address, else by the cookie, else by the browser."""
    for asked in (request.query.get("lang"), request.cookies.get(LANGUAGE_COOKIE)):
        if asked in IN_ALL:
            return IN_ALL[asked].language
    return preferred(request.headers.get(hdrs.ACCEPT_LANGUAGE, ""))


def wants_html(request: web.BaseRequest) -> bool:
    """Tell whether a person's browser asks, rather than a program."""
    return "text/html" in request.headers.get(hdrs.ACCEPT, "")


def page(  # noqa: PLR0913 - the parts of every page
    request: web.Request,
    template: str,
    here: str,
    *,
    status: int = 200,
    area: str = "",
    stream: str = "",
    **shown: Any,
) -> web.Response:
    """Return a page.

    Args:
        request: that asks for it.
        template: its file.
        here: its own path, percent-encoded.
        status: of the answer.
        area: the part of the site that it belongs to.
        stream: the path of the events that make it live.
        shown: what the template needs beside.
    """
    words: Words = IN_ALL[language_of(request)]
    asked = {name: value for name, value in request.query.items() if name not in ("lang", "after_position")}
    languages = [(language, f"{here}?{urlencode({**asked, 'lang': language})}") for language in LANGUAGES]
    context = {"q": "", "before": None, "now": datetime.now(UTC), **shown}
    body = (
        _environment()
        .get_template(template)
        .render(
            w=words,
            languages=languages,
            area=area,
            stream=stream,
            status=status,
            has_key=KEY_COOKIE in request.cookies,
            **context,
        )
    )
    response = web.Response(body=body.encode(), status=status, headers=PAGE_HEADERS)
    response.headers["Content-Language"] = words.language
    if request.query.get("lang") == words.language:
        response.set_cookie(
            LANGUAGE_COOKIE, words.language, max_age=LANGUAGE_SECONDS, path="/", httponly=True, samesite="Lax"
        )
    return response
