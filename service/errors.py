"""The base of errors that an operator can fix."""


class OperatorError(Exception):
    """``str()`` says on one line what is wrong and what to do: a command prints it, and exits."""
