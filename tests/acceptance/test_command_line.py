"""The command line as users run it: its output and its exit codes."""

import asyncio
import contextlib
import json
import os
import pwd
import resource
import shlex
import signal
import socket
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import aiohttp
import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from domain.order import Order
from service import VERSION
from service.database.connections import connect
from service.database.embedded_postgres import ACCOUNT
from service.event_log import store
from service.features.pages.share_links import ShareLinks, identify
from service.projecting.locks import HOLD_REBUILD_LOCK
from service.version import build_info
from tests.support.commands import call_command
from tests.support.databases import TestServer
from tests.support.processes import RunningService, background_command, run_command, running_service
from tests.support.reports import report
from tests.support.waiting import PATIENCE_SECONDS, until

# The server's user if root runs the tests.
IS_NOBODYS = os.geteuid() == 0 and not any(user.pw_name == ACCOUNT for user in pwd.getpwall())
NOBODY = "http://127.0.0.1:9"
AGREED = "reports that --apply would judge again: 0\n"
RUNNING = "a replay or a backup is already running: try again when it has finished\n"
Send = Callable[..., int]


@pytest.fixture
def order_no() -> str:
    """Return the number of a new order, so that tests can share a service."""
    return f"KOM-{uuid4().hex[:8]}"


@pytest.fixture
def send(shared_service: RunningService) -> Send:
    """Return a function that sends reports through the command line and returns the last exit code."""

    def send(order_no: str, *statuses: str) -> int:
        code = -1
        for status in statuses:
            url = f"{shared_service.url}/webhook"
            code = call_command(
                shared_service.state_dir, "send", order_no, "AWB1", status, "--url", url
            ).returncode
        return code

    return send


def test_help_lists_every_command_and_each_has_its_own(tmp_path: Path) -> None:
    """The list and the help of each command have the same summary, and an unknown command is a usage error."""
    listed = run_command(tmp_path, "--help").stdout
    for command, summary in {
        "audit": "Print an order's transitions.",
        "keys": "Create, list and revoke API keys.",
    }.items():
        assert summary in listed
        assert summary in call_command(tmp_path, command, "--help").stdout
    unknown = call_command(tmp_path, "frobnicate")
    assert (unknown.returncode, "No such command 'frobnicate'" in unknown.stderr) == (2, True)


def test_the_version_is_printed(tmp_path: Path) -> None:
    """``--version`` prints VERSION, which another test compares with pyproject.toml, and the commit."""
    assert run_command(tmp_path, "--version").stdout == f"{VERSION} (commit {build_info()['commit']})\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("audit",),
        ("audit", "KOM1", "KOM2"),
        ("rejudge",),
        ("import-reports",),
        ("reconcile", "--days", "-1"),
        ("replay", "--view", "weather"),
        ("keys", "create"),
    ],
)
def test_wrong_usage_is_exit_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Wrong arguments end a command with exit code 2, before it opens a database."""
    assert call_command(tmp_path, *arguments).returncode == 2


def test_send_prints_the_receipt_and_exits_by_the_verdict(
    shared_service: RunningService, send: Send, order_no: str
) -> None:
    """``send`` exits with 0 for advanced and repeated, and with 1 for other verdicts or without a response."""
    assert [send(order_no, status) for status in ("Batal", "batal", "Diterima", "Antar Ulang")] == [0, 0, 1, 1]
    url = f"{shared_service.url}/webhook"
    sent = run_command(shared_service.state_dir, "send", order_no, "AWB1", "Sent", "--url", url)
    assert (sent.returncode, json.loads(sent.stdout)["outcome"]) == (1, "refused")
    unsent = run_command(shared_service.state_dir, "send", order_no, "AWB1", "Sent", "--url", NOBODY)
    assert (unsent.returncode, unsent.stdout) == (1, "")
    assert unsent.stderr.startswith(f"cannot send to {NOBODY}")


def test_share_prints_a_link(shared_service: RunningService, send: Send, order_no: str) -> None:
    """``share`` prints a path or a URL, ``unshare`` revokes it, and each names a mistake in one line."""
    send(order_no, "Dikirim")
    secret = "a-secret-of-16-characters"  # noqa: S105 - of this test

    def share(*arguments: str, **settings: str) -> tuple[int, str]:
        done = call_command(shared_service.state_dir, "share", *arguments, **settings)
        assert (done.stdout.count("\n"), done.stderr.count("\n")) == (0 if done.returncode else 1, 1)
        return done.returncode, done.stdout or done.stderr

    links = ShareLinks(secret)
    code, path = share(order_no, SHARE_SECRET=secret)
    for days, found in ((179, order_no), (181, None)):
        assert links.read(path.strip()[3:], datetime.now(UTC) + timedelta(days=days)) == found
    assert code == 0
    share_id = identify(path.strip()[3:])
    for link, settings in (
        (f"https://tracking.example{path.strip()}", {"SHARE_SECRET": secret}),
        (share_id, {}),
    ):
        done = call_command(shared_service.state_dir, "unshare", link, **settings)
        assert (done.returncode, done.stdout) == (0, f"revoked: {share_id}\n")
    done = call_command(shared_service.state_dir, "unshare", "0" * 32)
    assert (done.returncode, done.stderr.startswith("there is no such share link: pass the whole link")) == (
        1,
        True,
    )
    code, url = share(order_no, "--days", "30", "--base-url", "https://tracking.example/", SHARE_SECRET=secret)
    assert (code, url.startswith("https://tracking.example/t/")) == (0, True)
    token = url.strip().removeprefix("https://tracking.example/t/")
    for days, found in ((29, order_no), (31, None)):
        assert links.read(token, datetime.now(UTC) + timedelta(days=days)) == found
    code, message = share(order_no)
    assert (code, message.startswith("ORDER_TRACKING_SHARE_SECRET is not set")) == (2, True)
    code, message = share("ABSENT", SHARE_SECRET=secret)
    assert (code, message) == (1, "the log has no events for order ABSENT: check the order number\n")
    code, message = share(order_no, "--base-url", "tracking.example", SHARE_SECRET=secret)
    assert (code, message.startswith("'tracking.example' is not the address of a service")) == (2, True)
    code, message = share(order_no, SHARE_SECRET="short")  # noqa: S106 - too short for a secret
    assert (code, message.startswith("ORDER_TRACKING_SHARE_SECRET: the secret must have 16 or more")) == (
        2,
        True,
    )


@pytest.mark.parametrize(
    ("url", "code"),
    [
        (f"{NOBODY}/webhook/a-token-of-16-characters", 1),
        ("http://x:99999/webhook/a-token-of-16-characters", 2),
        ("ftp://127.0.0.1/webhook/a-token-of-16-characters", 2),
        ("a-token-of-16-characters", 2),
        ("http://[::1/webhook/a-token-of-16-characters", 2),
    ],
)
def test_send_never_prints_the_token(tmp_path: Path, url: str, code: int) -> None:
    """Every error of ``send`` about a URL is one line that does not contain the URL's path."""
    ended = call_command(tmp_path, "send", "KOM1", "AWB1", "Sent", "--url", url)
    assert ended.returncode == code
    assert ended.stderr.count("\n") == 1
    assert "a-token" not in ended.stderr + ended.stdout


def test_audit_prints_every_transition_and_its_reason(
    shared_service: RunningService, send: Send, order_no: str
) -> None:
    """The table shows skipped stages, repeats and reasons of refusals; an unknown order gives exit code 1."""
    send(order_no, "Diajukan", "Dikirim", "Dikirim", "Batal")
    audit = run_command(shared_service.state_dir, "audit", order_no)
    assert audit.returncode == 0
    for text in (
        "advanced",
        "skipped packed, picked_up",
        "repeats version 2",
        "refused",
        "cancelled contradicts",
    ):
        assert text in audit.stdout
    unknown = call_command(shared_service.state_dir, "audit", "ABSENT")
    assert (unknown.returncode, unknown.stderr) == (
        1,
        "the log has no events for order ABSENT: check the order number\n",
    )


def test_rejudge_lists_changed_verdicts_and_those_that_follow(state_dir: Path, owner_dsn: str) -> None:
    """``rejudge --dry-run`` lists each verdict that today's table would change, and each later one that depends
    on it. A recorded verdict stays.
    """

    async def record_by_another_table() -> None:
        connection = await connect(owner_dsn)
        order = Order.new("KOM2")
        order.report(report("KOM2", "Dikirim"))
        # Simulate a table that allows a cancellation in transit; then the parcel arrives.
        cancelled = order.report(report("KOM2", "Batal"))
        changes = {"verdict": "advanced", "status": "cancelled", "status_version": 2, "reason": None}
        object.__setattr__(cancelled, "__dict__", {**vars(cancelled), **changes})
        await store.append(connection, order.pending_events)  # type: ignore[arg-type]
        after = Order.new("KOM2")
        for event in order.pending_events:
            event.mutate(after)
        refused = after.report(report("KOM2", "Diterima"))
        assert refused.verdict == "refused"
        await store.append(connection, [refused])
        await connection.close()

    agreed = call_command(state_dir, "rejudge", "--dry-run", DATABASE_URL=owner_dsn)
    assert (agreed.returncode, agreed.stdout) == (0, AGREED)
    asyncio.run(record_by_another_table())
    changed = run_command(state_dir, "rejudge", "--dry-run", DATABASE_URL=owner_dsn)
    assert changed.returncode == 1
    assert changed.stdout.endswith("verdicts that today's table would change: 2; they stay as they are\n")
    rows = [line.replace("│", "|").split("|") for line in changed.stdout.splitlines() if "KOM2" in line]
    assert [[cell.strip() for cell in row[1:-1]] for row in rows] == [
        ["KOM2", "2", "Batal", "advanced", "refused", "in_transit"],
        ["KOM2", "3", "Diterima", "refused", "advanced", "delivered"],
    ]


def test_replay_rebuilds_while_the_service_runs(
    shared_service: RunningService, send: Send, order_no: str
) -> None:
    """``replay`` swaps in every view, or only the one of --view, and --verify finds the views equal."""
    send(order_no, "Dikirim")
    replayed = run_command(shared_service.state_dir, "replay")
    assert replayed.returncode == 0, replayed.stderr
    for view in ("current_status", "timeline", "statistics"):
        assert f"{view}: rebuilt and swapped in" in replayed.stdout
    one = call_command(shared_service.state_dir, "replay", "--view", "timeline")
    assert (one.returncode, "current_status" in one.stdout) == (0, False)
    verified = call_command(shared_service.state_dir, "replay", "--verify")
    assert (verified.returncode, "timeline: equal" in verified.stdout) == (0, True)
    assert send(order_no, "Diterima") == 0


def test_replay_finds_a_difference_and_another_replay(service: RunningService) -> None:
    """``replay`` exits with 1 if a live view differs from its rebuild, or if another replay is running."""
    url = f"{service.url}/webhook"
    assert call_command(service.state_dir, "send", "KOM1", "AWB1", "Dikirim", "--url", url).returncode == 0
    with psycopg.connect(service.dsn, autocommit=True) as connection:
        forge = "UPDATE current_status.orders SET cnote = 'forged'"
        until(lambda: connection.execute(forge).rowcount == 1)
        different = call_command(service.state_dir, "replay", "--verify")
        assert (different.returncode, "current_status: 2 rows differ" in different.stdout) == (1, True)
        connection.execute(HOLD_REBUILD_LOCK)
        second = call_command(service.state_dir, "replay")
    assert (second.returncode, second.stderr) == (1, RUNNING)


def test_replay_prints_only_its_results(service: RunningService) -> None:
    """The log lines of a replay go to the standard error, so that the output can be piped."""
    with psycopg.connect(service.dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO order_events (originator_id, originator_version, topic, state) "
            "VALUES ('KOM1', 1, 'unknown', 'x')"
        )
    replayed = call_command(service.state_dir, "replay")
    assert replayed.stderr.count("order parked") == 3
    views = [line.partition(":")[0] for line in replayed.stdout.splitlines() if "parked" in line]
    assert views == ["current_status", "timeline", "statistics"]
    assert "order parked" not in replayed.stdout


def test_replay_of_one_order_resumes_it(service: RunningService) -> None:
    """``replay --order`` applies the waiting events, and exits with 1 if a view still cannot apply one."""
    with psycopg.connect(service.dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO order_events (originator_id, originator_version, topic, state) "
            "VALUES ('KOM1', 1, 'unknown', 'x')"
        )
        views = ("current_status", "timeline", "statistics")
        for view in views:
            parked = SQL("SELECT count(*) FROM {}.parked_orders").format(Identifier(view))
            until(lambda parked=parked: connection.execute(parked).fetchone() == (1,))  # type: ignore[misc]
    failed = call_command(service.state_dir, "replay", "--order", "KOM1")
    assert (failed.returncode, failed.stdout.count("still parked, from version 1 on: ")) == (1, 3)
    other = call_command(service.state_dir, "replay", "--order", "KOM2")
    assert (other.returncode, other.stdout) == (0, "KOM2 is parked in no view\n")
    both = call_command(service.state_dir, "replay", "--order", "KOM1", "--verify")
    assert (both.returncode, both.stderr) == (2, "pass either --order or --verify\n")


def test_check_finds_a_weakened_trigger(service: RunningService) -> None:
    """``check`` exits with 0 if everything is in order, and with 1 and a line for a weakened trigger."""
    in_order = run_command(service.state_dir, "check")
    assert (in_order.returncode, "WRONG" in in_order.stdout) == (0, False)
    assert "the embedded PostgreSQL is" in in_order.stdout
    with psycopg.connect(service.dsn) as connection:
        connection.execute("ALTER TABLE order_events ENABLE TRIGGER order_events_immutable")
    weakened = call_command(service.state_dir, "check")
    wrong = [line for line in weakened.stdout.splitlines() if line.startswith("WRONG")]
    assert weakened.returncode == 1
    assert [
        line for line in wrong if "state of trigger order_events_immutable of order_events is" in line
    ] == wrong


def test_commands_start_the_database_if_no_service_runs(state_dir: Path) -> None:
    """Without a running service, a command starts the existing database, but never creates one."""
    unknown = run_command(state_dir, "audit", "KOM1")
    assert (unknown.returncode, "KOM1" in unknown.stderr) == (1, True)
    checked = call_command(state_dir, "check")
    assert checked.returncode == 0, checked.stdout
    assert f"the database is the one in {state_dir}; " in checked.stdout
    elsewhere = state_dir / "elsewhere"
    empty = call_command(state_dir, "check", STATE_DIR=str(elsewhere))
    assert empty.returncode == 1
    assert empty.stderr.startswith(f"there is no database in {elsewhere} yet: run 'serve' to create one, ")
    assert not elsewhere.exists()


@pytest.mark.skipif(not IS_NOBODYS, reason="only root without the account runs the server as nobody")
def test_a_database_of_nobody_is_noticed(shared_service: RunningService, tmp_path: Path, dsn: str) -> None:
    """The start and ``check`` name the command that creates the account, unless the database is your own."""
    command = "useradd --system --home-dir /var/lib/order-tracking order-tracking"
    assert shared_service.output.count(command) == 1
    notes = [
        line
        for line in call_command(shared_service.state_dir, "check").stdout.splitlines()
        if "user nobody" in line
    ]
    assert [(line.startswith("note "), command in line) for line in notes] == [(True, True)]
    assert "user nobody" not in call_command(tmp_path, "check", DATABASE_URL=dsn).stdout


def test_a_readable_settings_file_is_noticed(state_dir: Path) -> None:
    """The start and ``check`` name the command that makes a file with secrets private, and never a secret."""
    secret = "a-secret-of-16-characters"  # noqa: S105 - not a real secret
    file = state_dir / "the settings.env"
    file.write_text(f"ORDER_TRACKING_WEBHOOK_HMAC_SECRET={secret}\n", encoding="utf-8")
    file.chmod(0o644)
    command = f"chmod 600 '{file}'"
    with running_service(state_dir, ENV_FILE=str(file)) as service:
        checked = call_command(state_dir, "check", ENV_FILE=str(file))
        (wrong,) = [line for line in checked.stdout.splitlines() if str(file) in line]
        assert (checked.returncode, wrong.startswith("WRONG  "), command in wrong) == (1, True, True)
        subprocess.run(["sh", "-c", command], check=True)
        assert str(file) not in call_command(state_dir, "check", ENV_FILE=str(file)).stdout
        assert service.output.count(command) == 1
        assert secret not in service.output + checked.stdout


def test_a_signature_also_closes_the_webhook(state_dir: Path) -> None:
    """With a secret, neither the start nor ``check`` warns about an open webhook, and ``send`` signs its
    reports.
    """
    guards = {"WEBHOOK_HMAC_SECRET": "a-secret-of-16-characters", "HOST": "0.0.0.0"}  # noqa: S104 - as on the open internet
    with running_service(state_dir, **guards) as service:
        assert "THE WEBHOOK IS OPEN" not in service.output
        assert "requires a signature" in call_command(state_dir, "check", **guards).stdout
        sent = call_command(state_dir, "send", "KOM1", "AWB1", "Sent", PORT=str(service.port), **guards)
        assert sent.returncode == 0, sent.stderr


async def test_erase_removes_bodies_and_keeps_verdicts(service: RunningService) -> None:
    """``erase`` requires a reason, removes bodies and addresses, and leaves views that equal a replay."""
    async with aiohttp.ClientSession() as session:
        body = {"order_no": "KOM1", "status": "Dikirim", "buyer": "a name"}
        async with session.put(f"{service.url}/webhook", json=body) as response:
            assert response.status == 200
        for arguments, code, message in (
            (("KOM1", " "), 2, "the reason is empty"),
            (("KOM9", "asked for"), 1, "no event was recorded for the order KOM9"),
            (("KOM1", "asked for"), 0, "erased"),
        ):
            done = await asyncio.to_thread(call_command, service.state_dir, "erase", *arguments)
            assert (done.returncode, message in done.stdout + done.stderr) == (code, True), done
        async with session.get(f"{service.url}/events") as response:
            (event,) = (await response.json())["events"]
    assert (event["data"]["body"], event["data"]["remote"]) == ("", None)
    assert (event["data"]["verdict"], event["data"]["status"]) == ("advanced", "in_transit")
    verified = await asyncio.to_thread(call_command, service.state_dir, "replay", "--verify")
    assert verified.returncode == 0, verified.stdout


def test_keys_are_listed_and_revoked(state_dir: Path, owner_dsn: str) -> None:
    """The list shows the name of a key but not its secret, and a name can be used and revoked only once."""

    def keys(*arguments: str) -> tuple[int, str]:
        done = call_command(state_dir, "keys", *arguments, DATABASE_URL=owner_dsn)
        return done.returncode, done.stdout + done.stderr

    code, printed = keys("create", "the shop", "--days", "7")
    assert code == 0
    (secret,) = [word for word in printed.split() if word.startswith("otk_")]
    code, listed = keys("list")
    assert (code, "the shop" in listed, secret in listed) == (0, True, False)
    assert keys("create", "the shop")[0] != 0
    assert keys("revoke", "the shop") == (0, "revoked\n")
    assert keys("revoke", "the shop")[0] == 1


def test_idle_connections_exceed_the_usual_limit_of_files(state_dir: Path) -> None:
    """The service raises its own limit of open files, so idle connections do not block a sender."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    service = RunningService(state_dir)
    with contextlib.ExitStack() as opened:
        opened.callback(service.end)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
            service.launch()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        service.wait_until_it_answers()
        for _ in range(400):
            opened.enter_context(socket.create_connection(("127.0.0.1", service.port)))
        url = f"{service.url}/webhook"
        assert call_command(state_dir, "send", "KOM1", "AWB1", "Sent", "--url", url).returncode == 0
    assert "Too many open files" not in service.output


def test_a_wrong_setting_is_one_clear_line(tmp_path: Path) -> None:
    """An invalid setting ends the service with exit code 2 and one line that names the setting."""
    ended = run_command(tmp_path, "serve", PORT="x")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("ORDER_TRACKING_PORT: ")


def test_a_port_that_is_taken_is_one_clear_line(state_dir: Path, owner_dsn: str) -> None:
    """A taken port ends the service with exit code 1 and one line that names the port and its setting."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_command(state_dir, "serve", PORT=str(port), DATABASE_URL=owner_dsn)
    assert ended.returncode == 1
    # The server of the tests is not durable, and the service says so.
    *warnings, line = ended.stderr.splitlines()
    assert all("can lose acknowledged reports" in warning for warning in warnings)
    assert line.startswith(f"cannot listen on 127.0.0.1 port {port}: ")
    assert "ORDER_TRACKING_PORT" in ended.stderr


def test_a_state_folder_in_use_is_one_clear_line(
    shared_service: RunningService, send: Send, order_no: str
) -> None:
    """A second service on one state folder is refused, and the first one keeps running."""
    second = run_command(shared_service.state_dir, "serve")
    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert send(order_no, "Dikirim") == 0


def test_a_database_that_cannot_be_reached_is_one_clear_line(tmp_path: Path) -> None:
    """``check`` reports an unreachable database, and exits with 1."""
    ended = call_command(tmp_path, "check", DATABASE_URL="postgresql://nobody@127.0.0.1:9/absent")
    assert (ended.returncode, "the database cannot be used" in ended.stdout) == (1, True)


def test_it_can_be_stopped_while_it_waits_for_its_database(tmp_path: Path) -> None:
    """SIGTERM stops a service whose database is unreachable, with exit code 0. Its output has no secret."""
    unreachable = "postgresql://nobody:secret@127.0.0.1:9/absent"
    with background_command(tmp_path, "serve", DATABASE_URL=unreachable) as waiting:
        assert waiting.stdout is not None
        logged, printed = waiting.stdout.readline(), waiting.stdout.readline()
        assert "waiting for the database" in logged
        assert printed == "order-tracking waits for the database at 127.0.0.1:9\n"
        waiting.terminate()
        assert "secret" not in logged + printed + waiting.stdout.read()
        assert waiting.wait(PATIENCE_SECONDS) == 0


def test_two_processes_share_your_own_database(tmp_path: Path, dsn: str, server: TestServer) -> None:
    """With a database URL, the service uses that database and does not start another one."""
    assert server.pid
    with (
        running_service(tmp_path, DATABASE_URL=dsn) as one,
        running_service(tmp_path, DATABASE_URL=dsn) as other,
    ):
        for service, status in ((one, "Diajukan"), (other, "Dikirim")):
            url = f"{service.url}/webhook"
            sent = call_command(tmp_path, "send", "KOM1", "AWB1", status, "--url", url)
            assert (sent.returncode, json.loads(sent.stdout)["outcome"]) == (0, "advanced")
        assert "ORDER_TRACKING_DATABASE_URL" in one.output
    audit = call_command(tmp_path, "audit", "KOM1", DATABASE_URL=dsn)
    assert audit.stdout.count("advanced") == 2
    assert not (tmp_path / "postgres").exists()


def test_a_database_of_a_later_release_is_refused(tmp_path: Path, owner_dsn: str) -> None:
    """A database with a newer schema version is refused with one line."""
    with psycopg.connect(owner_dsn) as connection:
        connection.execute("INSERT INTO schema_version (version) VALUES (99)")
    ended = run_command(tmp_path, "serve", DATABASE_URL=owner_dsn)
    assert ended.returncode == 1
    assert ended.stderr.startswith("the database has schema version 99")


def test_the_greeting_has_commands_that_work(shared_service: RunningService) -> None:
    """The greeting names the address and the data folder, and its commands work when pasted into a shell."""
    lines = shared_service.output.splitlines()
    assert lines[0] == f"order-tracking is listening on {shared_service.url}"
    assert lines[1] == f"  its data is in {shared_service.state_dir}"
    receipt = subprocess.check_output(shlex.split(lines[2].removeprefix("  try: ")), timeout=PATIENCE_SECONDS)
    assert json.loads(receipt)["order_no"] == "TRY1"
    show = shlex.split(lines[3])

    def shows_it() -> bool:
        return b'"order_no":"TRY1"' in subprocess.check_output(show, timeout=PATIENCE_SECONDS)

    until(shows_it)


async def test_a_logged_request_has_its_id_and_no_secret(state_dir: Path) -> None:
    """Log lines are JSON without path and query. They have the caller's request id, or a new one if it is
    invalid.
    """
    requests = (("/livez", "shop-17"), ("/orders/ABSENT?limit=a-secret", "not one"), ("/livez", None))
    ids = []
    service = RunningService(state_dir, LOG_FORMAT="json", LOG_REQUESTS="true").start()
    try:
        async with aiohttp.ClientSession(service.url) as session:
            for path, request_id in requests:
                async with session.get(
                    path, headers={"X-Request-Id": request_id} if request_id else {}
                ) as response:
                    ids.append(response.headers.get("X-Request-Id"))
        assert service.terminate(signal.SIGTERM) == 0
    finally:
        service.end()
    lines = [json.loads(line) for line in service.output.splitlines()]
    assert all("event" in line for line in lines)
    # The first request is the one with which the test waited for the service.
    logged = [line for line in lines if line["event"] == "request"][1:]
    assert ids[0] == "shop-17"
    assert ids[1] == str(UUID(ids[1]))
    assert ids[2] is None
    assert [line["request_id"] for line in logged[:2]] == ids[:2]
    assert [(line["method"], line["route"], line["status"]) for line in logged] == [
        ("GET", "/livez", 200),
        ("GET", "/orders/{order_no}", 400),
        ("GET", "/livez", 200),
    ]
    assert all(line["ms"] >= 0 for line in logged)
    assert "a-secret" not in service.output
    assert "ABSENT" not in service.output
