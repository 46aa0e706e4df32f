"""The run of the pages: it connects them to the core and to the pages of other features."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from service.core import Core
from service.feature import Contribution
from service.features.pages.handlers import Pages
from service.features.pages.render import RENDERER, Renderer
from service.features.pages.settings import PagesSettings
from service.features.pages.share import SharePages
from service.features.pages.share_links import ShareLinks
from service.features.pages.shares import SharesApi


@asynccontextmanager
async def run(core: Core) -> AsyncIterator[Contribution]:
    """Serve the pages until the block ends."""
    settings = core.settings_as(PagesSettings)
    secret = settings.share_secret.get_secret_value()
    links = ShareLinks(secret) if secret else None
    others = [one.pages for one in core.contributions.values() if one.pages is not None]
    renderer = Renderer(settings.zone, others, is_reader=core.is_reader)
    pages = Pages(
        *(core.pool, core.access, core.positions, core.recorder, core.refusals, core.vocabulary),
        links=links,
        others=others,
    )
    share_pages = SharePages(
        *(core.pool, core.positions, renderer, links),
        budget=core.budgets.shares,
        proxies=settings.trusted_proxies,
        refusals=core.auth_refusals,
        is_open=settings.is_open,
    )

    def prepare(app: web.Application) -> None:
        app[RENDERER] = renderer
        app.add_routes(pages.routes())
        app.add_routes(share_pages.routes())

    yield Contribution(apis=(SharesApi(core.pool, links, is_reader=core.is_reader),), prepare=prepare)
