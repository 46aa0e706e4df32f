"""Browser sessions: the API key in a cookie that scripts cannot read."""

import re
from typing import Final
from urllib.parse import parse_qs

from aiohttp import hdrs, web

from service.http.access import KEY_COOKIE, Access, refuse_other_sites
from service.http.body import read_body
from service.http.budgets import FORM_BYTES_MAX
from service.http.problems import ProblemError, ProblemType
from service.http.responses import response
from service.pages.render import render_page

# A revoked or expired key is refused even if a cookie still holds it.
KEY_COOKIE_SECONDS: Final = 90 * 86_400
KEY_CHARACTERS_MAX: Final = 200
FORM_FIELDS_MAX: Final = 8
# A second slash or backslash would begin the name of another host.
_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x7e]*", re.ASCII)


async def change_session(access: Access, request: web.Request) -> web.Response:
    """Store the submitted key in a cookie, or delete the cookie; then redirect to the page that needs the key.

    Raises:
        ProblemError: 400, the body is not a form; 403, another site sent the request.
    """
    refuse_other_sites(request)
    try:
        form = parse_qs((await read_body(request, FORM_BYTES_MAX)).decode(), max_num_fields=FORM_FIELDS_MAX)
    except ValueError:
        raise ProblemError(ProblemType.BAD_BODY, "the body is not a valid form") from None
    if "forget" in form:
        forgetting = redirect("/")
        forgetting.del_cookie(KEY_COOKIE, httponly=True, samesite="Strict")
        return forgetting
    key = form.get("key", [""])[0].strip()
    next_path = local_path(form.get("next", ["/"])[0])
    if len(key) > KEY_CHARACTERS_MAX or not await access.is_valid(key):
        return render_key_form(request, next_path, is_wrong=True)
    remembering = redirect(next_path)
    remembering.set_cookie(
        KEY_COOKIE, key, max_age=KEY_COOKIE_SECONDS, secure=_is_https(request), httponly=True, samesite="Strict"
    )
    return remembering


def _is_https(request: web.Request) -> bool:
    # Any client may set this header. A false value only changes the attributes of the client's own cookie.
    protocol = request.headers.get("X-Forwarded-Proto", request.scheme)
    return protocol.partition(",")[0].strip().lower() == "https"


def render_key_form(request: web.Request, next_path: str, *, is_wrong: bool) -> web.Response:
    """Return the form for an API key, with status 401.

    Args:
        request: The request that lacks a valid key.
        next_path: The path and query to open after the form.
        is_wrong: Whether a submitted key was invalid.
    """
    return render_page(request, "key.html", "/", status=401, next=next_path, is_wrong=is_wrong)


def local_path(path: str) -> str:
    """Return a path and query of this service, or "/" if a browser could read it as another host."""
    return path if _LOCAL_PATH.fullmatch(path) else "/"


def redirect(path: str) -> web.Response:
    """Return a redirect to a path of this service, which the browser then opens with GET."""
    return response(status=303, headers={hdrs.LOCATION: path})
