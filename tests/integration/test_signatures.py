"""Signed webhooks of Standard Webhooks: id, time and body are covered, so a copy cannot be used again."""

import base64
import json
import time
from typing import Any

import pytest

from projections.postgres import Connection
from service.features.settings import Settings
from service.ingest.hourly_bytes import STEP_SECONDS, HourlyBytes, VolumeFullError
from service.ingest.idempotency import KEY_BYTES_MAX
from service.ingest.signatures import ID_BYTES_MAX, StandardScheme, make_scheme
from tests.support.client import serving_client

# The example of the specification's own libraries.
EXAMPLE_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"  # noqa: S105 - published
EXAMPLE = {
    "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
    "webhook-timestamp": "1614265330",
    "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
}
BODY = b'{"order_no":"KOM1","cnote":"AWB1","status":"Dikirim"}'


def test_the_signature_is_that_of_the_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published example verifies at its time."""
    monkeypatch.setattr(time, "time", lambda: 1_614_265_330.0)
    scheme = make_scheme(EXAMPLE_SECRET, "X")
    assert isinstance(scheme, StandardScheme)
    scheme.check(EXAMPLE, b'{"test": 2432232314}')


def test_each_id_that_is_accepted_is_an_idempotency_key() -> None:
    """The signed id is what makes a copy the same report, so no id may be too long for a key."""
    assert ID_BYTES_MAX == KEY_BYTES_MAX


def signed(body: bytes = BODY, **changes: str) -> dict[str, str]:
    """Return the headers of a signed body, some of them changed."""
    scheme = make_scheme(EXAMPLE_SECRET, "X")
    assert scheme is not None
    return {**scheme.sign(body), **{name.replace("_", "-"): value for name, value in changes.items()}}


WRONG: dict[str, dict[str, str]] = {
    "no headers": {},
    "another id": signed(webhook_id="msg_another"),
    "another time": signed(webhook_timestamp=str(int(time.time()) - 60)),
    "another body": signed(b"{}"),
    "no time": signed(webhook_timestamp=""),
    "no number": signed(webhook_timestamp="1e9"),
    "a long number": signed(webhook_timestamp="9" * 400),
    "a long id": signed(webhook_id="x" * 257),
    "an id beyond ASCII": signed(webhook_id="msg_ü"),
    "no signature": signed(webhook_signature=""),
    "another version": {**signed(), "webhook-signature": signed()["webhook-signature"].replace("v1,", "v2,")},
}


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG.keys())
async def test_a_wrong_signature_records_nothing(
    dsn: str, connection: Connection, headers: dict[str, str]
) -> None:
    """Whatever of the signed parts differs, the webhook gets 401."""
    async with serving_client(dsn, webhook_hmac_secret=EXAMPLE_SECRET) as client:
        assert await client.status("PUT", "/webhook", BODY, headers) == 401
        metrics = await client.session.get(client.url("/metrics"))
        assert metrics.status == 401
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 0


async def test_a_copy_of_a_signed_webhook_adds_nothing(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within five minutes, a copy gets the first receipt again, because its id is signed; later it gets 401."""
    headers = signed()
    old = {
        **headers,
        "webhook-signature": f"v1,{base64.b64encode(b'old').decode()} {headers['webhook-signature']}",
    }
    async with serving_client(dsn, webhook_hmac_secret=EXAMPLE_SECRET) as client:
        receipts: list[Any] = []
        for sent in (headers, old):
            async with client.session.put(client.url("/webhook"), data=BODY, headers=sent) as answer:
                assert answer.status == 200
                receipts.append(await answer.json())
        assert receipts[0] == receipts[1]
        now = int(headers["webhook-timestamp"])
        for seconds, status in ((299, 200), (-299, 200), (301, 401), (-301, 401)):
            with monkeypatch.context() as clock:
                clock.setattr("service.ingest.signatures.time.time", lambda seconds=seconds: now + seconds)
                assert await client.status("PUT", "/webhook", BODY, headers) == status
    assert await connection.fetchval("SELECT count(*) FROM order_events") == 1


@pytest.mark.parametrize(
    "secret", ["whsec_", "whsec_tooshort", "whsec_not base64 at all!", "whsec_MfKQ9r8GKYqrTwjUPD8"]
)
def test_a_malformed_secret_is_refused(secret: str) -> None:
    """A secret of Standard Webhooks is base64."""
    with pytest.raises(ValueError, match="secret must"):
        Settings(webhook_hmac_secret=secret)  # type: ignore[arg-type]


async def test_the_volume_of_an_hour_is_limited(dsn: str, connection: Connection) -> None:
    """Beyond the limit, webhooks get 503 with their cause; the bytes are measured."""
    body = json.dumps({"order_no": "KOM1", "status": "Dikirim", "note": "x" * 60_000}).encode()
    async with serving_client(dsn, webhook_bytes_hourly_max=1024**2) as client:
        statuses = [await client.status("PUT", "/webhook", body) for _ in range(20)]
        fitting = 1024**2 // len(body)
        assert statuses == [200] * fitting + [503] * (20 - fitting)
        metrics = await client.text("/metrics")
        (line,) = [line for line in metrics.splitlines() if line.startswith("webhook_body_bytes_total ")]
        assert float(line.split()[1]) == fitting * len(body)
        assert f'webhook_refusals_total{{cause="volume_full"}} {float(20 - fitting)}' in metrics
        problem = await client.get("/readyz", 503)
        assert problem["cause"] == "volume_full"
    assert await connection.fetchval("SELECT count(*) FROM order_events") == fitting


def test_the_hour_slides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes count for one hour, to the minute."""
    now = 1_000.0
    monkeypatch.setattr("service.ingest.hourly_bytes.monotonic", lambda: now)
    volume = HourlyBytes(100)
    volume.accept(60)
    now += 1_800
    volume.accept(40)
    with pytest.raises(VolumeFullError):
        volume.accept(1)
    now += 1_800 + STEP_SECONDS
    volume.accept(60)
    with pytest.raises(VolumeFullError):
        volume.accept(1)
    assert volume.bytes_total == 160
