"""The settings of the pages."""

from typing import Annotated

from pydantic import AfterValidator, SecretStr

from service.settings import SECRET_CHARACTERS_MIN, CoreSettings


def _check_share_secret(secret: SecretStr) -> SecretStr:
    if 0 < len(secret.get_secret_value()) < SECRET_CHARACTERS_MIN:
        raise ValueError(
            f"the secret must have {SECRET_CHARACTERS_MIN} or more characters "
            "('order-tracking token' generates one)"
        )
    return secret


class PagesSettings(CoreSettings):
    """The settings of the pages."""

    share_secret: Annotated[SecretStr, AfterValidator(_check_share_secret)] = SecretStr("")
    """the secret that signs links for buyers; another one revokes all links; empty for no links"""
