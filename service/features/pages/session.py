"""Browser sessions: an API key opens one, and its random id is in a cookie that scripts cannot read."""

import re
from typing import Final
from urllib.parse import parse_qs, urlsplit, urlunsplit

from aiohttp import hdrs, web

from service.database.api_keys import SCOPES, Scope
from service.database.sessions import DURATION_MAX
from service.features.pages.render import render_page
from service.http.access import SAFE_METHODS, Access, is_local_host, session_cookie
from service.http.body import read_body
from service.http.budgets import FORM_BYTES_MAX
from service.http.problems import ProblemError, ProblemType
from service.http.responses import response

KEY_CHARACTERS_MAX: Final = 200
FORM_FIELDS_MAX: Final = 8
# A second slash or backslash would begin the name of another host.
_LOCAL_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x7e]*", re.ASCII)


async def change_session(access: Access, request: web.Request) -> web.Response:
    """Open a session for the submitted key, or end the session; then redirect to the page that needs it.

    Raises:
        ProblemError: 400, the body is not a form; 403, another site sent the request.
    """
    access.refuse_other_sites(request)
    form = await read_form(request)
    name, is_local = session_cookie(request), is_local_host(request)
    if "forget" in form:
        await access.end_session(request)
        ending = redirect("/")
        ending.del_cookie(name, secure=not is_local, httponly=True, samesite="Strict")
        return ending
    key = form.get("key", "").strip()
    next_path = local_path(form.get("next", "/"))
    session_id = await access.open_session(request, key) if len(key) <= KEY_CHARACTERS_MAX else None
    if session_id is None:
        # The form sends back the scope that its page needs.
        scope: Scope = next((scope for scope in SCOPES if scope == form.get("scope")), "read")
        return render_key_form(request, next_path, scope, is_wrong=True)
    opening = redirect(next_path)
    # Without https, a browser keeps the cookie only for its own machine.
    opening.set_cookie(
        name,
        session_id,
        max_age=int(DURATION_MAX.total_seconds()),
        secure=not is_local,
        httponly=True,
        samesite="Strict",
    )
    return opening


async def read_form(request: web.Request, bytes_max: int = FORM_BYTES_MAX) -> dict[str, str]:
    """Return the fields of a form, each with its first value.

    Args:
        request: the request.
        bytes_max: the size limit. Only an admitted operator may have more than the default.

    Raises:
        ProblemError: 400, the body is not a form; 413, it is too large.
    """
    try:
        form = parse_qs((await read_body(request, bytes_max)).decode(), max_num_fields=FORM_FIELDS_MAX)
    except ValueError:
        raise ProblemError(ProblemType.BAD_BODY, "the body is not a valid form") from None
    return {name: values[0] for name, values in form.items()}


def render_key_form(request: web.Request, next_path: str, scope: Scope, *, is_wrong: bool) -> web.Response:
    """Return the form for an API key, with status 401.

    Args:
        request: The request that lacks a valid key.
        next_path: The path and query to open after the form.
        scope: The scope that the page needs.
        is_wrong: Whether a submitted key was invalid.
    """
    is_secure = is_local_host(request) or is_https(request)
    return render_page(
        request,
        "key.html",
        request.rel_url.raw_path if request.method in SAFE_METHODS else "/",
        status=401,
        next=next_path,
        scope=scope,
        is_wrong=is_wrong,
        is_secure=is_secure,
    )


def is_https(request: web.Request) -> bool:
    """Return whether the browser uses https. Any client may set the header; it changes only a hint."""
    protocol = request.headers.get("X-Forwarded-Proto", request.scheme)
    return protocol.partition(",")[0].strip().lower() == "https"


def local_path(path: str) -> str:
    """Return a path and query of this service, or "/" if a browser could read it as another host."""
    return path if _LOCAL_PATH.fullmatch(path) else "/"


def referring_path(request: web.Request) -> str | None:
    """Return the path and query of the page of this service that led to a request; None if unknown."""
    try:
        referrer = urlsplit(request.headers.get(hdrs.REFERER, ""))
    except ValueError:
        return None
    if not referrer.netloc or referrer.netloc.lower() != request.headers.get(hdrs.HOST, "").lower():
        return None
    path = local_path(urlunsplit(("", "", referrer.path, referrer.query, "")))
    # A link of the page to itself, such as the choice of a language, leads no way back.
    return path if path.partition("?")[0] != request.rel_url.raw_path else None


def redirect(path: str) -> web.Response:
    """Return a redirect to a path of this service, which the browser then opens with GET."""
    return response(status=303, headers={hdrs.LOCATION: path})
