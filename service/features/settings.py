"""All settings: those of the core and of every feature, whether it is on or off."""

from typing import Self

from pydantic import model_validator

from service.features import DEFAULT, SWITCHED
from service.features.pages.settings import PagesSettings
from service.features.proofs.settings import ProofsSettings
from service.features.subscriptions.settings import SubscriptionsSettings
from service.settings import NO_FEATURE, PREFIX, CoreSettings, read, refuse_unknown


class Settings(PagesSettings, ProofsSettings, SubscriptionsSettings):
    """The operator's settings."""

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        for name in self.features or ():
            if name not in SWITCHED:
                known = ", ".join(sorted(SWITCHED))
                raise ValueError(
                    f"{PREFIX}FEATURES: {name!r} is not a feature. Expected some of {known}, separated by "
                    f"commas, or {NO_FEATURE}; the default is {','.join(DEFAULT)}"
                )
        return self

    def find_set(self, model: type[CoreSettings] | None) -> list[str]:
        """Return the names of the settings of a feature that are set, in their order."""
        own = (model or CoreSettings).model_fields
        names = [name for name in own if name not in CoreSettings.model_fields]
        return [f"{PREFIX}{name.upper()}" for name in names if name in self.model_fields_set]


def read_settings() -> Settings:
    """Read all settings.

    Raises:
        SettingsError: as by ``service.settings.refuse_unknown`` and ``read``.
    """
    refuse_unknown(Settings)
    return read(Settings)
