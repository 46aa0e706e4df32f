from typing import Annotated

import typer

from service.history import verify as verifier


def verify(
    bundle: Annotated[
        list[str], typer.Argument(help="The file of a proof; all of its files if it has several.")
    ],
    *,
    key: Annotated[str, typer.Option(help="The operator's public key, or a file with it.")],
    since: Annotated[
        str | None, typer.Option(help="A file with an older checkpoint, which the history must continue.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another proof, which must not contradict this one.")
    ] = None,
    scan: Annotated[
        str | None, typer.Option(help="The history's URL, or a folder with its tiles: read every entry.")
    ] = None,
) -> int:
    options = {"--key": key, "--since": since, "--against": against, "--scan": scan}
    given = [f"{name}={value}" for name, value in options.items() if value is not None]
    return verifier.main([*given, "--", *bundle])
