"""The key of a person's browser: asked for once, kept in a cookie that no script can read."""

import re
from typing import Final
from urllib.parse import parse_qs

from aiohttp import hdrs, web

from service.http.access import KEY_COOKIE, Access, refuse_other_sites
from service.http.problems import Kind, ProblemError
from service.http.server import read_body
from service.pages.render import page

# A key that is revoked is refused wherever it is kept.
KEY_COOKIE_SECONDS: Final = 90 * 86_400
KEY_CHARACTERS_MAX: Final = 200
FORM_FIELDS_MAX: Final = 8
# Two slashes, or what a browser takes for one, would begin the name of another host.
_OWN_PATH: Final = re.compile(r"/(?![/\\])[\x21-\x7e]*", re.ASCII)


class Sessions:
    """Begins and ends them.

    Args:
        access: who may read.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def begin(self, request: web.Request) -> web.Response:
        """Keep a key in a cookie, or forget it; then go on to what was asked for."""
        refuse_other_sites(request)
        try:
            form = parse_qs((await read_body(request)).decode(), max_num_fields=FORM_FIELDS_MAX)
        except ValueError:
            raise ProblemError(Kind.BAD_BODY, "the body is no form") from None
        if "forget" in form:
            response = see_other("/")
            response.del_cookie(KEY_COOKIE, path="/", httponly=True, samesite="Strict")
            return response
        key = form.get("key", [""])[0].strip()
        onward = own_path(form.get("next", ["/"])[0])
        if len(key) > KEY_CHARACTERS_MAX or not await self._access.is_valid(key):
            return key_form(request, onward, is_wrong=True)
        response = see_other(onward)
        response.set_cookie(
            KEY_COOKIE,
            key,
            max_age=KEY_COOKIE_SECONDS,
            path="/",
            secure=_came_by_tls(request),
            httponly=True,
            samesite="Strict",
        )
        return response


def _came_by_tls(request: web.Request) -> bool:
    """Tell by what a proxy says, whoever it is: who says it falsely keeps its own key from its own service."""
    said = request.headers.get("X-Forwarded-Proto", request.scheme)
    return said.partition(",")[0].strip().lower() == "https"


def key_form(request: web.Request, onward: str, *, is_wrong: bool) -> web.Response:
    """Ask for a key.

    Args:
        request: that needs one.
        onward: the path and query to go on to.
        is_wrong: whether one was given that is not good.
    """
    return page(request, "key.html", "/", status=401, next=onward, is_wrong=is_wrong)


def own_path(path: str) -> str:
    """Return a path and query of this service, the root where it could lead elsewhere."""
    return path if _OWN_PATH.fullmatch(path) else "/"


def see_other(path: str) -> web.Response:
    """Lead a browser on."""
    return web.Response(status=303, headers={"Server": "order-tracking", hdrs.LOCATION: path})
