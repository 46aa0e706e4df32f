"""Rendering: templates, languages, response headers and static files."""

import codecs
import hashlib
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

from aiohttp import hdrs, web
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from domain.transitions import VERDICTS
from service.feature import MenuEntry, Pages
from service.features.pages.i18n import LANGUAGES, Locale, negotiate_language, read_locales
from service.http.access import has_scope, session_cookie
from service.http.responses import COMMON_HEADERS, has_etag
from service.http.times import to_rfc3339

FOLDER: Final = Path(__file__).resolve().parent
LANGUAGE_COOKIE: Final = "order_tracking_language"
LANGUAGE_COOKIE_SECONDS: Final = 365 * 86_400

# Only files of this service, and no inline code: even unescaped HTML in an order number could not run a script.
SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
BROWSER_HEADERS: Final = {
    **COMMON_HEADERS,
    "Content-Security-Policy": SECURITY_POLICY,
    # Other sites never see a page's path. "no-referrer" would also hide the Origin of the service's own forms.
    "Referrer-Policy": "same-origin",
}
PAGE_HEADERS: Final = {
    **BROWSER_HEADERS,
    "Content-Type": "text/html; charset=utf-8",
    "Vary": "Accept, Accept-Language, Cookie",
}
MEDIA_TYPES: Final = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# For a URL that contains the hash of the file.
IMMUTABLE: Final = "public, max-age=31536000, immutable"

DUMP_LINE_BYTES: Final = 16
# Control characters other than tab and line ends.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

_TONES: Final = {
    "delivered": "good", "completed": "good", "problem": "warn", "returning": "warn",
    "lost": "bad", "damaged": "bad", "cancelled": "muted", "returned": "muted", "": "muted", None: "muted",
}  # fmt: skip


class Asset(NamedTuple):
    """A static file. ``version`` is a hash of its body."""

    body: bytes
    media_type: str
    version: str


def _read_asset(path: Path) -> Asset:
    body = path.read_bytes()
    return Asset(body, MEDIA_TYPES[path.suffix], hashlib.sha256(body).hexdigest()[:16])


ASSETS: Final = {path.name: _read_asset(path) for path in sorted((FOLDER / "static").iterdir())}


def asset_url(name: str) -> str:
    """Return the URL of a static file, which contains the file's version."""
    return f"/static/{name}?v={ASSETS[name].version}"


async def serve_asset(request: web.Request) -> web.Response:
    """Return a static file, or 304 if the client has this version.

    Raises:
        HTTPNotFound: No static file has this name.
    """
    asset = ASSETS.get(request.match_info["name"])
    if asset is None:
        raise web.HTTPNotFound
    etag = f'"{asset.version}"'
    is_versioned = request.query.get("v") == asset.version
    headers = {**BROWSER_HEADERS, "ETag": etag, "Cache-Control": IMMUTABLE if is_versioned else "no-cache"}
    if has_etag(request, etag):
        return web.Response(status=304, headers=headers)
    headers["Content-Type"] = f"{asset.media_type}; charset=utf-8"
    return web.Response(body=asset.body, headers=headers)


def track_path(order_no: str) -> str:
    """Return the path of an order's page, percent-encoded."""
    return f"/track/{quote(order_no, safe='')}"


def isolate(text: str) -> str:
    """Return text in bidi isolates, for use outside an element, where it could reorder the text beside it."""
    return f"\u2068{text}\u2069"


def spell_out(text: str) -> str:
    """Return text with every character outside printable ASCII escaped, in quotes if it has outer spaces."""
    ascii_text = re.sub(r"[^ -~]", lambda match: f"\\u{{{ord(match[0]):x}}}", text)
    return ascii_text if ascii_text == ascii_text.strip() else f"“{ascii_text}”"


def decode_text(body: bytes) -> str | None:
    """Return a body as text; None if it is not UTF-8 or has control characters. Its end may be cut off."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(body)
    except UnicodeDecodeError:
        return None
    return None if _CONTROL.search(text) else text


def hex_dump(body: bytes) -> str:
    """Return a hex dump of a body: offset, sixteen bytes in hex, and the same bytes in ASCII."""
    lines = []
    for offset in range(0, len(body), DUMP_LINE_BYTES):
        line = body[offset : offset + DUMP_LINE_BYTES]
        text = re.sub(rb"[^ -~]", b".", line).decode()
        lines.append(f"{offset:06x}  {line.hex(' '):<{3 * DUMP_LINE_BYTES}} {text}")
    return "\n".join(lines)


def choose_tone(status: str | None) -> str:
    """Return the class of a status's colour: go, good, warn, bad or muted."""
    return _TONES.get(status, "go")


class Renderer:
    """Renders the templates of the pages and of the features that have pages.

    Args:
        zone: the time zone of all times and days on the pages.
        others: the pages of other features.
        is_reader: whether the process only reads, so that no page has a form that writes.

    Attributes:
        locales: the texts by language.
        menu: the entries that others add to the menu.
    """

    def __init__(self, zone: ZoneInfo, others: Sequence[Pages] = (), *, is_reader: bool = False) -> None:
        folders = [FOLDER, *(other.folder for other in others)]
        self.zone = zone
        self.is_reader = is_reader
        self.locales = read_locales(folders, zone)
        self.menu: list[MenuEntry] = [entry for other in others for entry in other.menu]
        self._environment = Environment(
            autoescape=True,
            loader=FileSystemLoader([folder / "templates" for folder in folders]),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            auto_reload=False,
        )
        functions = (
            *(asset_url, choose_tone, decode_text, hex_dump),
            *(isolate, spell_out, to_rfc3339, track_path),
        )
        names = {function.__name__: function for function in functions}
        self._environment.globals.update(names, verdicts=VERDICTS)

    def render(self, template: str, **variables: Any) -> bytes:
        """Return a template's text with these variables, in UTF-8."""
        return self._environment.get_template(template).render(variables).encode()


RENDERER: Final = web.AppKey("renderer", Renderer)


def choose_locale(request: web.Request) -> Locale:
    """Return the locale of a request: by its ``lang`` parameter, else by its cookie, else by its browser."""
    chosen = (request.query.get("lang"), request.cookies.get(LANGUAGE_COOKIE))
    accepted = negotiate_language(request.headers.get(hdrs.ACCEPT_LANGUAGE, ""))
    locales = request.app[RENDERER].locales
    language = next((language for language in chosen if language in locales), accepted)
    return locales[language]


def accepts_html(request: web.BaseRequest) -> bool:
    """Return whether the client is a browser rather than a program."""
    return "text/html" in request.headers.get(hdrs.ACCEPT, "")


def render_page(
    request: web.Request, template: str, path: str, *, status: int = 200, stream: str = "", **context: Any
) -> web.Response:
    """Render a page in the language of the request.

    Args:
        request: The request for the page.
        template: The file name of the template.
        path: The path of the page, percent-encoded.
        status: The HTTP status of the response.
        stream: The path of the event stream that updates the page; empty for a page without updates.
        context: The variables of the template.
    """
    locale, renderer = choose_locale(request), request.app[RENDERER]
    parameters = {key: value for key, value in request.query.items() if key not in ("lang", "after_position")}
    variables = {
        "locale": locale,
        "languages": [
            (language, f"{path}?{urlencode({**parameters, 'lang': language})}") for language in LANGUAGES
        ],
        "stream": stream,
        "status": status,
        "is_admin": has_scope(request, "admin"),
        "is_reader": renderer.is_reader,
        "may_act": has_scope(request, "admin") and not renderer.is_reader,
        "menu": [entry for entry in renderer.menu if entry.scope == "read" or has_scope(request, entry.scope)],
        "has_session": session_cookie(request) in request.cookies,
        "search": "",
        "now": datetime.now(UTC),
        **context,
    }
    body = renderer.render(template, **variables)
    response = web.Response(body=body, status=status, headers=PAGE_HEADERS)
    response.headers["Content-Language"] = locale.language
    if request.query.get("lang") == locale.language:
        response.set_cookie(
            LANGUAGE_COOKIE, locale.language, max_age=LANGUAGE_COOKIE_SECONDS, httponly=True, samesite="Lax"
        )
    return response
