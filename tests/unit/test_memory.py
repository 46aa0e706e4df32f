"""What outlives a transaction: each attribute that remembers something of the log, and what fences it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.folders import ROOT
from tests.support.ways_out import EXPERIMENTS, READS

# The packages that see the log. Whatever the others keep is of requests, settings or connections.
PACKAGES: Final = (
    *("projections", "service/event_log", "service/ingest", "service/projecting", "service/features/proofs"),
    *("service/features/subscriptions", "service/maintenance", "service/api"),
)
# Not of the log: time, load, counts, errors, tasks and requests.
OWN: Final = "not of the log"

FENCES: Final = {
    # service/projecting
    "Projector": {"_behind_since _failures _leads _look_at _stands_in": OWN},
    "ViewPosition": {"wake _age_seconds _observed_at": OWN},
    "Rebuilder": {"_were_current": "only which views had this release's definition"},
    "AwaitedPosition": {
        "position": "each step reads it again, POLL_SECONDS apart at most, and moves it back with the view",
        "_moved _readers": OWN,
    },
    # service/event_log
    "HeardErasures": {
        "_last _recent _versions _is_proved": "each read proves the last one",
        "_beginning _heard_at": OWN,
    },
    "Memory": {
        "_events _characters": "each append proves the commit before it, so this is one log. A view, a tree "
        "and a subscription prove the last event that they take",
        "changes": OWN,
    },
    "Log": {"_batch _batch_after _batch_changes": "it was one statement, and a view proves its last event"},
    "Followers": {"_wakes": OWN},
    "Tail": {
        "_begins_after _by_order _bytes _last _memory": "each read proves the last event of the one before",
        "_erasures last_erasure_id _heard_up_to": "see HeardErasures",
        "_readers _task is_ended losses": OWN,
    },
    # service/ingest
    "OrderStates": {"_old _young": "each append proves the last commit, which is as new as any of these"},
    "Recorder": {
        "_last": "each append proves it",
        "_states": "see OrderStates",
        "_shared_until": "it only causes further reads",
        "_batch_began _claim_began _claimed_trouble _claimed_waiting _prepared_in _trouble": OWN,
        "_warn_at _went_back losses": OWN,
    },
    "Refusals": {"_diagnose_at _diagnosis counts": OWN},
    "Quarantine": {"_next_log_at kept last_kept refused": OWN},
    "IngestMetrics": {"_last_received": "only shown"},
    "HourlyBytes": {"_recent _step_bytes _step_ends _steps bytes_total": OWN},
    "WebhookAuth": {"_tokens": OWN},
    # service/features/proofs
    "Follower": {
        "_edge _edge_of _last_leaf": "where it is added to, the tree has this size and this last entry",
        "_signed _full_at": "they only save a step: the tree is read before it is signed",
        "_has_full_batch _is_full _problem _sign_at": OWN,
    },
    "Edge": {"_hashes size": "see Follower"},
    "_Tile": {"_levels": "of one proof"},
    "HistoryApi": {"_is_damage_logged": OWN},
    # service/features/subscriptions
    "Delivery": {
        "_reached _work": "each save proves the last event that was read",
        "has_lost_events revision": OWN,
        "_busy _dirty _ending _failure _has_ended _interrupted _is_full _is_stopping": OWN,
        "_outcomes _responses _saved _saving _space _tasks _urgent _wake": OWN,
    },
    "LatestResponses": {"_attempts _save_at is_changed": "what an endpoint said: the log does not prove it"},
    "Holding": {"_held _probed _unsaved": "see Delivery"},
    "Endpoint": {"_failing _failing_since _failures _probe_at _probe_seconds": OWN},
    "Dispatcher": {
        "_committed _reached": "proved on each new session; a loss pauses every subscription",
        "_deliveries _failures _has_lost_events _is_stopping _losses _proved_in _recorder_losses": OWN,
        "changed outcomes": OWN,
    },
    "Window": {"_bytes _entries _lanes _ready read started": "see Delivery"},
    "Pace": {"_busy_until _due": OWN},
    "Sender": {"_closing _sessions": OWN},
    "EndpointConnection": {"_address _has_head _held _interim _received": OWN},
    # service/maintenance
    "Retention": {"_after": "a place in a list that begins again", "erased_orders last_pass_at": OWN},
    "PendingReports": {
        "_is_decodable _order_no _pending _state undecodable": "of one snapshot. Each rejudgement is a claim, "
        "which is decided under the append lock",
    },
    "TableAudit": {"_order_no _state": "of one snapshot"},
    "_Batch": {"result": "of one transaction"},
    # service/api
    "Starting": {"_is_decided _log_at _logged _successor cause refused": OWN},
}
# Those that hold text of reports, with the experiment that shows how it is erased.
TEXTS: Final = {
    "Memory": "the memory of commits",
    "Log": "test_a_batch_of_before_an_erasure_is_not_shared",
    "Tail": "live streams",
    "Delivery": "test_what_waits_for_an_endpoint_that_is_down_is_erased",
    "LatestResponses": "test_what_waits_for_an_endpoint_that_is_down_is_erased",
    "Holding": "test_what_waits_for_an_endpoint_that_is_down_is_erased",
    "Window": "test_what_waits_for_an_endpoint_that_is_down_is_erased",
}
# Numbers, times, states and ids; and words that are known by now, which no erasure erases.
TEXTLESS: Final = frozenset(
    {
        *("Projector", "ViewPosition", "Rebuilder", "AwaitedPosition", "HeardErasures", "Followers"),
        *("OrderStates", "Recorder", "Refusals", "Quarantine", "IngestMetrics", "HourlyBytes", "WebhookAuth"),
        *("Follower", "Edge", "_Tile", "HistoryApi", "Dispatcher", "Pace", "Sender", "EndpointConnection"),
        *("Retention", "TableAudit", "_Batch", "Starting", "PendingReports", "Endpoint"),
    }
)
MUTATORS: Final = frozenset(
    {
        *("add", "append", "appendleft", "clear", "discard", "extend", "pop"),
        *("popleft", "remove", "set", "setdefault", "update"),
    }
)


def mutable_attributes(node: ast.ClassDef) -> Iterator[str]:
    """Yield the attributes of a class that a method other than ``__init__`` sets or changes."""
    methods = [
        method
        for method in node.body
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and method.name != "__init__"
    ]
    for each in (inner for method in methods for inner in ast.walk(method)):
        targets: list[ast.expr] = []
        if isinstance(each, ast.Assign | ast.Delete):
            targets = each.targets
        elif isinstance(each, ast.AugAssign | ast.AnnAssign):
            targets = [each.target]
        elif isinstance(each, ast.Call) and isinstance(each.func, ast.Attribute) and each.func.attr in MUTATORS:
            targets = [each.func.value]
        for target in targets:
            for one in target.elts if isinstance(target, ast.Tuple) else [target]:
                if (name := _attribute(one)) is not None:
                    yield name


def _attribute(target: ast.expr) -> str | None:
    while isinstance(target, ast.Subscript | ast.Starred):
        target = target.value
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
        return target.attr
    return None


def classes() -> dict[str, set[str]]:
    """Return the mutable attributes of each class in the packages that see the log."""
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for file in sorted(Path(ROOT / package).glob("*.py")):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and (names := {*mutable_attributes(node)}):
                    found.setdefault(node.name, set()).update(names)
    return found


FOUND: Final = classes()


@pytest.mark.parametrize("name", sorted(FOUND))
def test_every_memory_has_a_fence(name: str) -> None:
    """Each attribute that outlives a transaction is listed, with what proves that the log still has it."""
    listed = {attribute for attributes in FENCES.get(name, {}) for attribute in attributes.split()}
    assert {*FOUND[name]} - listed == set()


def test_every_memory_hears_of_erasures() -> None:
    """Each class that outlives a transaction has no text of a report, or an experiment that erases it."""
    assert {*FOUND} == {*TEXTS} | TEXTLESS
    tests = " ".join(file.read_text(encoding="utf-8") for file in Path(ROOT / "tests/integration").glob("*.py"))
    for name, experiment in TEXTS.items():
        assert experiment in {*EXPERIMENTS, *READS} or f"async def {experiment}(" in tests, name


def test_no_fence_is_out_of_date() -> None:
    """Each listed attribute exists."""
    for name, fences in FENCES.items():
        assert {attribute for attributes in fences for attribute in attributes.split()} <= FOUND.get(
            name, set()
        ), name
