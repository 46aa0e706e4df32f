"""Text that somebody else wrote, made fit to be shown."""


def printable(text: str) -> str:
    """Return a sender's text fit for a terminal: what is not printable is spelled out, never acted on."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
