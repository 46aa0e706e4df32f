"""Examples for property tests: how many of them, and recorded events of every kind."""

import os
from datetime import timedelta, timezone
from typing import Final, get_args

from hypothesis import settings
from hypothesis import strategies as st

from domain.order import Order
from domain.statuses import STATUSES
from domain.transitions import Leg, Verdict

_GIVEN: Final = os.environ.get("TEST_EXAMPLES")
# Every run uses the same examples. If TEST_EXAMPLES is set, as in `make test-long`, a run tries that many
# random examples instead.
MANY: Final = settings(deadline=None, derandomize=_GIVEN is None, max_examples=int(_GIVEN or 100))

# Characters that JSON writers encode differently: controls, quotes, line separators, DEL, byte order marks, and
# characters beyond the BMP.
ODD = (
    '\x00\x01\b\t\n\f\r\x1b\x1f"\\/\x7f\x80\x85\x9f\u00a0\u2028\u2029\u202e\ufeff\ufffe\uffff'
    "😀👩‍🚀\U0010ffff<&'"
)
TEXT = st.text(st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"])), max_size=40)
TIMES = st.datetimes(
    timezones=st.builds(
        lambda seconds: timezone(timedelta(seconds=seconds)), st.integers(-86399, 86399) | st.just(0)
    )
)

STATUS = st.none() | st.sampled_from(STATUSES)
BIGINT = st.integers(1, 2**63 - 1)
EVENTS = st.builds(
    Order.StatusReported,
    originator_id=TEXT,
    originator_version=BIGINT,
    timestamp=TIMES,
    report_id=st.uuids().map(str),
    body=TEXT,
    reported_status=TEXT,
    reported_cnote=st.none() | TEXT,
    occurred_at=st.none() | TIMES,
    remote=st.none() | TEXT,
    quarantine_id=st.none() | BIGINT,
    verdict=st.sampled_from(get_args(Verdict)),
    recognised=STATUS,
    previous_status=STATUS,
    previous_since=st.none() | TIMES,
    status=STATUS,
    status_version=st.none() | BIGINT,
    leg=st.none() | st.sampled_from(get_args(Leg)),
    cnote=st.none() | TEXT,
    skipped=st.lists(st.sampled_from(STATUSES), max_size=4),
    repeats=st.none() | BIGINT,
    reason=st.none() | TEXT,
    token_name=st.none() | TEXT,
    rejudges=st.none() | BIGINT,
    reported_at=st.none() | TIMES,
    imported_at=st.none() | TIMES,
    traceparent=st.none() | TEXT,
)
