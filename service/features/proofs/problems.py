"""The problem types of the history."""

from enum import Enum

from service.http.problems import RETRY_AFTER_OPERATOR_SECONDS, Explained, ProblemError


class HistoryProblem(Explained, Enum):
    """The problem types of the history."""

    NO_SUCH_TILE = 404, "No such tile", "The signed history is too small to have this tile."
    NOT_IN_HISTORY = (
        404,
        "Not in the history",
        "The signed history has no entry of this order, or of this version.",
    )
    HISTORY_HALTED = (
        503,
        "History halted",
        "The history lacks hashes, or does not continue its last checkpoint. An operator must act.",
    )


def history_halted(detail: str) -> ProblemError:
    """Return the problem for a proof that the history cannot give until an operator acts."""
    headers = {"Retry-After": str(RETRY_AFTER_OPERATOR_SECONDS)}
    return ProblemError(HistoryProblem.HISTORY_HALTED, detail, headers=headers)
