"""The registry: the one place that names the features."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from service.features import pages, proofs, simulator, subscriptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from projections.postgres import Connection
    from service.feature import Feature
    from service.settings import CoreSettings

# The pages are last, since they show what the others contribute.
FEATURES: Final[tuple[Feature, ...]] = (
    proofs.FEATURE,
    subscriptions.FEATURE,
    simulator.FEATURE,
    pages.FEATURE,
)
# Those that can be switched on and off.
SWITCHED: Final = {feature.name: feature for feature in FEATURES if feature.run}
DEFAULT: Final = tuple(sorted(name for name, feature in SWITCHED.items() if feature.is_default))


def load_all(part: str) -> Iterator[tuple[Feature, Any]]:
    """Yield each feature that declares a part, with the part."""
    for feature in FEATURES:
        if (loaded := feature.load(part)) is not None:
            yield feature, loaded


class Chosen(NamedTuple):
    """The features of a service.

    Attributes:
        on: the names of those that are on, in the order of FEATURES.
        used_but_off: what the database has of the others, by their names.
    """

    on: Sequence[str]
    used_but_off: Mapping[str, str]


async def choose_features(settings: CoreSettings, connection: Connection) -> Chosen:
    """Return which features are on: those of the list, or else the default and what the database uses.

    Args:
        settings: the settings.
        connection: a connection outside any transaction.
    """
    used: dict[str, str | None] = {}
    for name, feature in SWITCHED.items():
        if feature.use and _matters(settings, name):
            used[name] = await connection.fetchval(feature.use)
    listed = settings.features
    default = (*DEFAULT, *(name for name, use in used.items() if use is not None))
    on = [name for name in SWITCHED if name in (default if listed is None else listed)]
    return Chosen(on, {name: use for name, use in used.items() if use is not None and name not in on})


def _matters(settings: CoreSettings, name: str) -> bool:
    """Return whether it matters what the database has of a feature."""
    return name not in (DEFAULT if settings.features is None else settings.features)
