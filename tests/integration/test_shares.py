"""Shared orders over HTTP: the links, and the page that a buyer reads without a key."""

import asyncio
from datetime import UTC, datetime, timedelta
from functools import partial
from urllib.parse import quote

import aiohttp
import asyncpg
import pytest
from structlog.testing import capture_logs

from domain.statuses import STATUSES
from projections.postgres import Connection
from service.database import api_keys
from service.database.connections import POOL_SETTINGS, connected
from service.database.operations import Actor, operations_page
from service.database.schema import apply_schema
from service.features.pages.share import ADVANCES_SHOWN_MAX, READS_AT_A_TIME
from service.features.pages.share_links import ShareLinks, is_revoked, make_share, revoke_share
from service.features.settings import Settings
from service.http import budgets
from service.listening import serving
from tests.support.baseline import baseline
from tests.support.client import Client, serving_client
from tests.support.databases import wait_for_locked
from tests.support.examples import LOCALES
from tests.support.waiting import PATIENCE_SECONDS, condition, until_async

TOKEN = "a-token-of-16-characters"  # noqa: S105 - of a service that lives for one test
SECRET = "a-secret-of-16-characters"  # noqa: S105
LINKS = ShareLinks(SECRET)
NOW = datetime(2026, 11, 26, 8, 30, tzinfo=UTC)
FORGED = "A" * 40
SHARING = {"share_secret": SECRET}
# As a service on the internet: buyers have no key, and come by a foreign host name.
PUBLIC = {**SHARING, "webhook_tokens": TOKEN}
HOSTILE = '<img src=x onerror="alert(1)">/%2F?#{x}\u202e 100%'


async def fetched(
    client: Client, path: str, method: str = "GET", **headers: str
) -> tuple[int, str, dict[str, str]]:
    """Return the status, the text and the headers of a response."""
    async with client.session.request(
        method, client.url(path), headers={name.replace("_", "-"): value for name, value in headers.items()}
    ) as response:
        return response.status, await response.text(), dict(response.headers)


async def sent(client: Client, order_no: str, *statuses: str, path: str = "/webhook") -> None:
    """Send reports, and wait until the views have them."""
    for status in statuses:
        body = {"order_no": order_no, "cnote": f"AWB-{order_no}"[:128], "status": status}
        async with client.session.put(client.url(path), json=body) as response:
            position = (await response.json())["position"]
    for url in (f"/orders/{quote(order_no, safe='')}", f"/orders/{quote(order_no, safe='')}/timeline"):
        if path == "/webhook":
            await client.get(f"{url}?after_position={position}")


async def test_a_link_opens_the_page_of_its_order_alone(dsn: str) -> None:
    """The page has the order, its journey and its status changes in words, and nothing for operators."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, "KOM1", "Diajukan", "Diajukan", "Dikirim", "Dijemput", "Antar Ulang", "Batal")
        await sent(client, "KOM2", "Hilang")
        share = await client.get("/orders/KOM1/share")
        expires_at = datetime.fromisoformat(share["expires_at"])
        link = LINKS.make("KOM1", expires_at - NOW, NOW)
        assert share == {"url": link.path, "share_id": link.share_id, "expires_at": share["expires_at"]}
        assert timedelta(0) <= datetime.now(UTC) + timedelta(days=180) - expires_at < timedelta(days=1)
        status, page, headers = await fetched(client, share["url"], Accept_Language="en")
        assert status == 200
        for shown in ("KOM1", "AWB-KOM1", "In transit", "Your parcel is on its way.", "Submitted"):
            assert shown in page
        hidden = [
            *("KOM2", "AWB-KOM2", "Diajukan", "Dijemput", "Antar Ulang", "Batal", "Cancelled", "127.0.0.1"),
            *("/track", "/orders", "/openapi", "/quarantined", "/operations", "<form", "<script", "stream"),
            *(LOCALES["en"].texts[name] for name in ("repeated", "late", "refused", "unrecognised", "skipped")),
            *(LOCALES["en"].texts[name] for name in ("stage_skipped", "raw_report", "search")),
        ]
        assert [word for word in hidden if word in page] == []
        assert page.count('<li class="entry') == 2
        # Newest first.
        assert page.index(">In transit</h3>") < page.index(">Submitted</h3>")
        assert page.count('class="reached') == 3
        assert '<meta name="robots" content="noindex, nofollow">' in page
        assert headers["X-Robots-Tag"] == "noindex, nofollow"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "Set-Cookie" not in headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'; style-src 'self'; img-src 'self'; form-action 'none'")
        assert (await fetched(client, share["url"], "HEAD"))[:2] == (200, "")


@pytest.mark.parametrize("language", LOCALES)
async def test_every_status_is_explained(dsn: str, language: str) -> None:
    """Each status, and an order without one, has its own explanation in both languages."""
    explanations = set()
    async with serving_client(dsn, **SHARING) as client:
        for status in STATUSES:
            await sent(client, status, status)
            _, page, _ = await fetched(client, f"{LINKS.make(status).path}?lang={language}")
            explanation = LOCALES[language].texts[f"share_status_{status}"]  # type: ignore[index]
            assert explanation in page
            explanations.add(explanation)
        await sent(client, "KOM1", "Entah")
        _, page, _ = await fetched(client, f"{LINKS.make('KOM1').path}?lang={language}")
        assert LOCALES[language].texts["share_status_none"] in page  # type: ignore[index]
    assert len(explanations) == len(STATUSES)


async def test_the_language_is_the_browsers_or_the_links(dsn: str) -> None:
    """``lang`` takes precedence; another parameter, as messengers add, or an unknown language is ignored."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, "KOM1", "Dikirim")
        path = LINKS.make("KOM1").path
        for query, accepted, language in (
            ("", "en-GB", "en"),
            ("", "de", "id"),
            ("?lang=id&fbclid=x", "en", "id"),
            ("?lang=en", "id", "en"),
            ("?lang=xx&lang=id&utm_source=a%20b", "en", "en"),
        ):
            status, page, headers = await fetched(client, path + query, Accept_Language=accepted)
            assert (status, headers["Content-Language"]) == (200, language), query
            assert f'<html lang="{language}">' in page
            assert headers["Vary"] == "Accept-Language"


async def test_every_link_that_does_not_work_looks_the_same(dsn: str, connection: Connection) -> None:
    """A forged, expired or revoked link, and one to an order that the log has lost, get equal pages, unread."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, "KOM1", "Dikirim")
        old = datetime.now(UTC) - timedelta(days=2)
        paths = [
            f"/t/{FORGED}",
            "/t/x",
            "/t/%00%ff%e9",
            f"/t/{'A' * 5_000}",
            LINKS.make("KOM1", timedelta(days=1), old).path,
            ShareLinks(f"{SECRET}.").make("KOM1").path,
            LINKS.make("KOM1").path[:-1],
        ]
        # A read of these views would wait for the lock.
        await connection.execute("BEGIN; LOCK TABLE current_status.orders, timeline.entries, order_events")
        answers = [await fetched(client, path) for path in paths]
        await connection.execute("ROLLBACK")
        answers.append(await fetched(client, LINKS.make("KOM0").path))
        for answer in answers:
            assert answer[:2] == answers[0][:2]
            same = {name: value for name, value in answer[2].items() if name not in {"X-Request-ID", "Date"}}
            assert same.items() <= answers[0][2].items()
        status, page, headers = answers[0]
        assert status == 404
        assert "Tautan tidak berlaku" in page
        assert headers["X-Robots-Tag"] == "noindex, nofollow"
    async with serving_client(dsn) as client:
        # Without a secret, no link works.
        assert (await fetched(client, LINKS.make("KOM1").path))[:2] == answers[0][:2]
        problem = await client.get("/orders/KOM1/share", 409)
        assert problem["type"] == "/problems/sharing-is-off"
        assert "ORDER_TRACKING_SHARE_SECRET" in problem["detail"]


async def test_a_link_may_expire(dsn: str) -> None:
    """``expires_in`` is a duration from now on; an unknown order and a duration of zero are refused."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, "KOM1", "Dikirim")
        before = datetime.now(UTC).replace(microsecond=0)
        share = await client.get("/orders/KOM1/share?expires_in=P30D")
        expires_at = datetime.fromisoformat(share["expires_at"])
        assert before + timedelta(days=30) <= expires_at <= datetime.now(UTC) + timedelta(days=30)
        token = share["url"].removeprefix("/t/")
        assert LINKS.read(token, expires_at - timedelta(seconds=1)) == "KOM1"
        assert LINKS.read(token, expires_at) is None
        assert (await fetched(client, share["url"]))[0] == 200
        for bad in ("P0D", "PT0S", "30", "P99999D", "-P1D", ""):
            assert (await client.get(f"/orders/KOM1/share?expires_in={bad}", 400))["parameter"] == "expires_in"
        assert (await client.get("/orders/KOM0/share", 404))["type"] == "/problems/unknown-order"


async def test_making_and_revoking_a_link_is_recorded(dsn: str, connection: Connection) -> None:
    """A link survives the revocation of the key that made it, so the record names it, and it is revoked alone.

    The id in the record suffices, and the link too, also one that an earlier release made without a record.
    """
    reader = {"Authorization": f"Bearer {await api_keys.create_key(connection, 'shop', 'read', None)}"}
    admin = {"Authorization": f"Bearer {await api_keys.create_key(connection, 'desk', 'admin', None)}"}
    async with serving_client(dsn, **PUBLIC) as client:
        await sent(client, "KOM1", "Dikirim", path=f"/webhook/{TOKEN}")
        shares = [
            await client.get(f"/orders/KOM1/share?expires_in=P{days}D", 200, reader) for days in (30, 40, 50)
        ]
        await api_keys.revoke_key(connection, "shop")
        old = LINKS.make("KOM1", None)
        paths = [*(share["url"] for share in shares), old.path]
        await until_async(partial(is_shown, client, paths[0]))
        assert [(await fetched(client, path))[0] for path in paths] == [200] * 4
        revoked = (shares[0]["share_id"], shares[1]["url"].removeprefix("/t/"), old.path.removeprefix("/t/"))
        for share in revoked:
            assert await client.status("DELETE", f"/shares/{share}", None, admin) == 204
        assert [(await fetched(client, path))[0] for path in paths] == [404, 404, 200, 404]
        for unknown in ("0" * 32, FORGED, "x"):
            assert await client.status("DELETE", f"/shares/{unknown}", None, admin) == 404
        page = await client.get("/audit/operations", 200, admin)
    recorded = [(one["actor"], one["action"], one["subject"]) for one in reversed(page["operations"])]
    assert recorded == [
        *(("shop", "share_made", share["share_id"]) for share in shares),
        *(("desk", "share_revoked", share["share_id"]) for share in shares[:2]),
        ("desk", "share_revoked", old.share_id),
    ]
    assert all(one["reason"].startswith("order KOM1") for one in page["operations"])
    assert paths[0].removeprefix("/t/") not in str(page)


async def test_a_link_made_after_a_revocation_works(connection: Connection) -> None:
    """Two links of one order that end in the same second are one link, but never one that was revoked."""
    actor = Actor("cli", "root")
    made = [await make_share(connection, LINKS, "KOM1", timedelta(days=1), actor) for _ in range(2)]
    for link in made:
        await revoke_share(connection, LINKS, f"https://tracking.example{link.path}?lang=id", actor)
    later = await make_share(connection, LINKS, "KOM1", timedelta(days=1), actor)
    assert not await is_revoked(connection, later.share_id)


async def test_the_service_cannot_take_a_revocation_back(connection: Connection, dsn: str) -> None:
    """The service's role can revoke a link, but neither change nor remove a revocation."""
    await revoke_share(connection, LINKS, LINKS.make("KOM1").path, Actor("cli", "root"))
    async with connected(dsn) as service:
        for statement in (
            "UPDATE revoked_shares SET share_id = 'x'",
            "DELETE FROM revoked_shares",
            "INSERT INTO revoked_shares VALUES ('x', now())",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await service.execute(statement)


async def test_an_upgrade_says_that_earlier_links_stay_valid(empty_dsn: str) -> None:
    """The migration adds a row to the record, since no row names a link of an earlier release."""
    async with baseline(empty_dsn) as old:
        await apply_schema(old)
        (row,) = await operations_page(old, 2**63 - 1, "shares_kept", 10)
    assert (row["actor"], row["subject"]) == ("migration", "share links")


async def test_an_order_page_makes_a_link_only_when_asked(dsn: str, connection: Connection) -> None:
    """The button on an order's page makes and records a link; a page of another site cannot press it."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, "KOM1", "Dikirim")
        assert 'action="/track/KOM1/share"' in (await fetched(client, "/track/KOM1"))[1]
        assert await connection.fetchval("SELECT count(*) FROM operations") == 0
        foreign = {"Origin": "http://evil.example"}
        assert (await fetched(client, "/track/KOM1/share", "POST", **foreign))[0] == 403
        # The response leads to the buyer's page.
        status, page, _ = await fetched(client, "/track/KOM1/share", "POST", Accept_Language="en")
        assert (status, "Your parcel is on its way." in page) == (200, True)
        assert (await fetched(client, "/track/KOM0/share", "POST"))[0] == 404
    (row,) = await operations_page(connection, 2**63 - 1, None, 10)
    assert (row["action"], "order KOM1, until " in (row["reason"] or "")) == ("share_made", True)


async def test_a_buyer_needs_neither_a_key_nor_a_local_host_name(dsn: str, connection: Connection) -> None:
    """The page is open to the internet, also through a proxy; making a link needs a key."""
    key = await api_keys.create_key(connection, "shop", "read", None)
    async with serving_client(dsn, **PUBLIC) as client:
        await sent(client, "KOM1", "Dikirim", path=f"/webhook/{TOKEN}")
        await client.get("/orders/KOM1/share", 401)
        path = (await client.get("/orders/KOM1/share", 200, {"Authorization": f"Bearer {key}"}))["url"]
        await until_async(partial(is_shown, client, path))
        for headers in (
            {"Host": "tracking.example"},
            {"Host": "tracking.example", "X_Forwarded_For": "198.51.100.1", "Sec_Fetch_Site": "cross-site"},
        ):
            assert (await fetched(client, path, **headers))[0] == 200


async def test_in_the_open_mode_the_page_is_for_this_machine(dsn: str) -> None:
    """Without a token, a request through a proxy or by a foreign host name gets 403, whatever the link."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, "KOM1", "Dikirim")
        for path in (LINKS.make("KOM1").path, f"/t/{FORGED}"):
            for headers in ({"Host": "tracking.example"}, {"X_Forwarded_For": "198.51.100.1"}):
                status, page, _ = await fetched(client, path, **headers)
                assert status == 403
                assert "webhook token" in page or "ORDER_TRACKING_WEBHOOK_TOKENS" in page
        metrics = await client.text("/metrics")
        assert 'auth_refusals_total{cause="other_machine"} 4.0' in metrics
        assert (await fetched(client, LINKS.make("KOM1").path, Host="localhost"))[0] == 200


async def test_a_token_is_in_no_log_and_in_no_metric(dsn: str) -> None:
    """Logs and metrics have the route's pattern; a token would let their readers see the order."""
    async with serving_client(dsn, **SHARING, log_requests=True) as client:
        await sent(client, "KOM1", "Dikirim")
        path = LINKS.make("KOM1").path
        with capture_logs() as lines:
            for one in (path, f"/t/{FORGED}", f"{path}?lang=en"):
                await fetched(client, one)
            await fetched(client, path, Host="tracking.example")
        assert {line["route"] for line in lines if line["event"] == "request"} == {"/t/{token}"}
        text = f"{lines}{await client.text('/metrics')}"
        assert 'http_route="/t/{token}"' in text
        assert path.removeprefix("/t/") not in text
        assert FORGED not in text
        assert SECRET not in text


async def test_a_hostile_order_number_stays_text(dsn: str) -> None:
    """HTML in an order number is escaped, and its link works."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, HOSTILE, "Dikirim")
        share = await client.get(f"/orders/{quote(HOSTILE, safe='')}/share")
        status, page, _ = await fetched(client, share["url"])
        assert status == 200
        assert "<img src=x" not in page
        assert "<bdi>&lt;img src=x" in page


async def test_a_parked_and_an_erased_order_show_the_known_part(dsn: str, connection: Connection) -> None:
    """A parked order has a note that changes may be missing; an erased order is shown like any other."""
    async with serving_client(dsn, **SHARING) as client:
        await sent(client, "KOM1", "Diajukan", "Dikirim")
        await connection.execute(
            "SET ROLE order_tracking_owner; CALL erase_order('KOM1', 'asked for'); RESET ROLE"
        )
        _, page, _ = await fetched(client, LINKS.make("KOM1").path, Accept_Language="en")
        assert "AWB-KOM1" in page
        assert page.count('<li class="entry') == 2
        note = LOCALES["en"].texts["share_delayed"]
        assert note not in page
        await connection.execute("INSERT INTO current_status.parked_orders VALUES ('KOM1', 3, 3, 'x')")
        await connection.execute("INSERT INTO current_status.parked_orders VALUES ('KOM2', 1, 4, 'x')")
        _, page, _ = await fetched(client, LINKS.make("KOM1").path, Accept_Language="en")
        assert note in page
        assert "In transit" in page
        status, page, _ = await fetched(client, LINKS.make("KOM2").path, Accept_Language="en")
        assert (status, note in page, "KOM2" in page) == (200, True, True)


async def test_a_long_history_is_cut_off(dsn: str) -> None:
    """The page has the newest status changes, and its stages are from all of them."""
    async with serving_client(dsn, **SHARING) as client:
        moves = [("Dikirim", "Diantar")[number % 2] for number in range(ADVANCES_SHOWN_MAX)]
        await sent(client, "KOM1", "Dijemput", *moves)
        _, page, _ = await fetched(client, LINKS.make("KOM1").path, Accept_Language="en")
        assert page.count('<li class="entry') == ADVANCES_SHOWN_MAX
        assert LOCALES["en"].texts["share_earlier"] in page
        assert ">Picked up</h3>" not in page
        assert ">Picked up</span>" in page


async def test_strangers_hold_a_bounded_share_of_the_database(
    dsn: str, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One address cannot keep others out, few pages are read at once, and the rest get a page with 429."""
    monkeypatch.setattr(budgets, "SHARES_PER_ADDRESS_MAX", 3)
    monkeypatch.setattr(budgets, "SHARES_MAX", 5)
    monkeypatch.setitem(POOL_SETTINGS, "statement_timeout", "59s")
    settings = Settings(
        port=0,
        share_secret=SECRET,  # type: ignore[arg-type]
        webhook_tokens=TOKEN,  # type: ignore[arg-type]
        trusted_proxies="127.0.0.1/32",  # type: ignore[arg-type]
        request_seconds_max=PATIENCE_SECONDS,
    )
    path = LINKS.make("KOM1").path
    async with serving(settings, dsn) as (port, service), aiohttp.ClientSession() as session:
        client, held = Client(session, port), service.core.budgets.shares
        await sent(client, "KOM1", "Dikirim", path=f"/webhook/{TOKEN}")
        await until_async(partial(is_shown, client, path))
        await connection.execute("BEGIN; LOCK TABLE current_status.orders")
        reading: list[asyncio.Task[tuple[int, str, dict[str, str]]]] = []
        # First the share of one address, then the total.
        for address, count, refused in (
            ("198.51.100.1", 3, "198.51.100.1"),
            ("198.51.100.2", 5, "198.51.100.3"),
        ):
            while len(reading) < count:
                reading.append(asyncio.create_task(fetched(client, path, X_Forwarded_For=address)))
                await until_async(condition(lambda: held.held == len(reading)))
            status, page, headers = await fetched(client, path, X_Forwarded_For=refused)
            assert (status, headers["Retry-After"]) == (429, "2")
            assert "Sementara tidak tersedia" in page
            # A forged link needs no database.
            assert (await fetched(client, f"/t/{FORGED}", X_Forwarded_For=refused))[0] == 404
        await wait_for_locked(connection, READS_AT_A_TIME)
        assert service.core.pool.used == READS_AT_A_TIME
        await connection.execute("ROLLBACK")
        assert [one[0] for one in await asyncio.gather(*reading)] == [200] * 5
        assert (held.held, held.refusals) == (0, 2)


async def is_shown(client: Client, path: str) -> bool:
    """Return whether the view has the order of a link."""
    return (await fetched(client, path))[0] == 200
