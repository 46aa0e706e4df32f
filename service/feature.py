"""What a feature may contribute to the service. The core knows this page, and no feature by name.

A feature is a package of ``service.features`` with two parts. Its declaration, a ``Feature``, is static, and
used without a running service. Its run is an async context manager that gets the core's parts and yields a
``Contribution``. When it exits, the feature is gone; when the feature is off, nothing of it is imported but the
declaration. So a declaration names its parts by locations, such as ``service.features.NAME.run:run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from aiohttp import web
    from prometheus_client import Metric

    from domain.order import Order
    from projections.postgres import Connection
    from service.database.api_keys import Scope
    from service.http.endpoints import Api, OutgoingRequest


class Command(NamedTuple):
    """A command: its name and summary, and the location of its function or its Typer.

    ``works_always`` if it needs neither a database nor the feature to be on.
    """

    name: str
    summary: str
    location: str
    works_always: bool = False


class Option(NamedTuple):
    """A flag that a feature adds to a command of the core."""

    command: str
    name: str
    help: str


@dataclass(frozen=True, kw_only=True)
class Feature:
    """The declaration of a feature.

    Attributes:
        name: its name in ``ORDER_TRACKING_FEATURES``.
        run: the location of its run; empty for a feature of commands alone, which has no switch.
        is_default: whether it is on unless a list of features says otherwise.
        settings: the location of its settings.
        commands: its commands.
        options: the flags that it adds to commands of the core. Its steps get the names of those that are set.
        problems: the location of its problem types.
        use: an SQL query for what a database has of the feature: a text, or no row. Such a database keeps a
            feature on that is off by default, unless a list says otherwise.
        while_off: what becomes of that while the feature is off.
        check: the location of a function of a connection, the settings and the options, which yields findings.
        restore: the location of a function of the settings, whether the feature may be on, and the options,
            which returns the part of a dump that may be left out (``service.maintenance.backup.Part``).
        files: the location of a function of the settings, which returns the files that it needs at a new place.
    """

    name: str
    run: str = ""
    is_default: bool = True
    settings: str = ""
    commands: Sequence[Command] = ()
    options: Sequence[Option] = ()
    problems: str = ""
    use: str = ""
    while_off: str = ""
    check: str = ""
    restore: str = ""
    files: str = ""

    def load(self, part: str) -> Any:
        """Return the object at the location of a part, None if the feature does not have the part."""
        location = getattr(self, part)
        return resolve_name(location) if location else None


class Shown(NamedTuple):
    """What a page shows.

    Attributes:
        template: the name of its template.
        variables: the template's variables.
        path: the page's path, percent-encoded; empty for that of the request.
        status: the status of the response.
        stream: the path of the event stream that updates the page; empty for a page without updates.
    """

    template: str
    variables: Mapping[str, Any]
    path: str = ""
    status: int = 200
    stream: str = ""


class Page(NamedTuple):
    """A page, or the target of a form.

    Attributes:
        method: GET, or POST for a form.
        path: the path, in aiohttp's pattern.
        scope: the scope of the API key that it needs.
        handle: gets the request and the fields of its form. Returns what to show, or a path to redirect to.
        has_query: whether ``handle`` reads the parameters of the query. Otherwise it has only the common ones.
    """

    method: str
    path: str
    scope: Scope
    handle: Callable[[web.Request, Mapping[str, str]], Awaitable[Shown | str]]
    has_query: bool = False


class MenuEntry(NamedTuple):
    """An entry of the pages' menu: its path, the name of its text, and the scope that sees it."""

    path: str
    text: str
    scope: Scope


@dataclass(frozen=True, kw_only=True)
class Pages:
    """The pages of a feature.

    Attributes:
        folder: has the folder ``templates``, and the texts in ``messages.toml``.
        pages: the pages.
        menu: their entries in the menu.
        read_card: reads what the page of an order shows, from the database and the order's page; its template
            is included there.
    """

    folder: Path
    pages: Sequence[Page] = ()
    menu: Sequence[MenuEntry] = ()
    read_card: Callable[[Connection, web.Request], Awaitable[Shown]] | None = None


class Task(NamedTuple):
    """A supervised background task."""

    name: str
    work: Callable[[], Awaitable[object]]


def _ignore(*_arguments: object) -> None:
    """Do nothing."""


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """What a running feature contributes.

    Attributes:
        tasks: its background tasks, which end before its run exits.
        apis: the objects with its endpoints.
        outgoing: the requests that it sends to other systems.
        prepare: called with the web application, to which it adds routes.
        pages: its pages, None if it has none.
        measure: returns the metrics of this process at a scrape.
        read_metrics: reads those that all processes share.
        on_commit: called after each commit of this process with the events and their positions.
        wake: wakes its follower when the log may have grown; None if it follows nothing.
    """

    tasks: Sequence[Task] = ()
    apis: Sequence[Api] = ()
    outgoing: Sequence[OutgoingRequest] = ()
    prepare: Callable[[web.Application], None] = _ignore
    pages: Pages | None = None
    measure: Callable[[], Iterable[Metric]] = tuple
    read_metrics: Callable[[Connection], Awaitable[Iterable[Metric]]] | None = None
    on_commit: Callable[[Sequence[Order.StatusReported], Sequence[int]], None] = _ignore
    wake: Callable[[], None] | None = None
