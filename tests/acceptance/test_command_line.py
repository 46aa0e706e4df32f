"""The command line as its users run it: what it prints, and how it ends."""

import asyncio
import contextlib
import json
import resource
import shlex
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import aiohttp
import pytest

from domain.order import Order, Report
from service import event_store
from service.database import connect
from service.embedded_postgres import EmbeddedPostgres
from service.version import VERSION
from tests.acceptance.running import ROOT, RunningService, environment, run_command, whole_log


def report_to(service: RunningService, order_no: str, status: str, cnote: str = "AWB1") -> int:
    url = f"{service.url}/webhook"
    return run_command(service.state_dir, "send", order_no, cnote, status, "--url", url).returncode


def test_send_prints_the_receipt_and_ends_by_the_verdict(service: RunningService) -> None:
    """0 for advanced and repeated, 1 for late, refused, unrecognised, and where nobody listens."""
    assert [report_to(service, "KOM1", status) for status in ("Batal", "batal", "Diterima", "Antar Ulang")] == [
        0,
        0,
        1,
        1,
    ]
    sent = run_command(service.state_dir, "send", "KOM1", "AWB1", "Sent", "--url", f"{service.url}/webhook")
    assert json.loads(sent.stdout)["outcome"] == "refused"
    nobody = run_command(service.state_dir, "send", "KOM1", "AWB1", "Sent", "--url", "http://127.0.0.1:9/")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert nobody.stderr.startswith("cannot send to http://127.0.0.1:9")


def test_audit_prints_every_transition_and_its_reason(service: RunningService) -> None:
    """Skipped stages, repeats and the reason of a refusal stand in the table; an unknown order is exit 1."""
    for status in ("Diajukan", "Dikirim", "Dikirim", "Batal"):
        report_to(service, "KOM1", status)
    audit = run_command(service.state_dir, "audit", "KOM1")
    assert audit.returncode == 0
    for text in (
        "advanced",
        "skipped packed, picked_up",
        "repeats version 2",
        "refused",
        "cancelled contradicts",
    ):
        assert text in audit.stdout
    unknown = run_command(service.state_dir, "audit", "ABSENT")
    assert (unknown.returncode, unknown.stderr) == (1, "nothing was reported of ABSENT\n")
    assert run_command(service.state_dir, "audit").returncode == 2
    assert run_command(service.state_dir, "audit", "KOM1", "--rejudge").returncode == 2


def test_rejudge_lists_what_todays_table_would_say_and_what_follows_from_it(service: RunningService) -> None:
    """A verdict that today's table would not give is listed, and so is every later one that hangs on it."""
    for status in ("Diajukan", "Diterima"):
        report_to(service, "KOM1", status)
    agreed = run_command(service.state_dir, "audit", "--rejudge")
    assert (agreed.returncode, agreed.stdout.strip()) == (
        0,
        "today's table judges every report as it was judged",
    )

    async def record_as_judged_by_another_table() -> None:
        connection = await connect(service.dsn)
        order = Order.unheard("KOM2")
        now = datetime.now(UTC)
        order.report(Report(str(uuid4()), "KOM2", "Dikirim", None, "{}"), now)
        # A table that took a cancellation on the way for a legal move; then the parcel arrived.
        cancelled = order.report(Report(str(uuid4()), "KOM2", "Batal", None, "{}"), now)
        moved = {"verdict": "advanced", "status": "cancelled", "status_version": 2, "reason": None}
        object.__setattr__(cancelled, "__dict__", {**vars(cancelled), **moved})
        await event_store.append(connection, order.pending_events)  # type: ignore[arg-type]
        after = Order.unheard("KOM2")
        for event in order.pending_events:
            event.mutate(after)
        refused = after.report(Report(str(uuid4()), "KOM2", "Diterima", None, "{}"), now)
        assert refused.verdict == "refused"
        await event_store.append(connection, [refused])
        await connection.close()

    asyncio.run(record_as_judged_by_another_table())
    changed = run_command(service.state_dir, "audit", "--rejudge")
    assert changed.returncode == 1
    rows = [line.replace("│", "|").split("|") for line in changed.stdout.splitlines() if "KOM2" in line]
    assert [[cell.strip() for cell in row[1:-1]] for row in rows] == [
        ["KOM2", "2", "Batal", "advanced", "refused", "in_transit"],
        ["KOM2", "3", "Diterima", "refused", "advanced", "delivered"],
    ]


def test_replay_rebuilds_while_the_service_goes_on(service: RunningService) -> None:
    """It swaps both views in, with --view one of them, --verify says that they are equal."""
    report_to(service, "KOM1", "Dikirim")
    replayed = run_command(service.state_dir, "replay")
    assert replayed.returncode == 0, replayed.stderr
    assert "current_status: rebuilt and swapped in" in replayed.stdout
    assert "timeline: rebuilt and swapped in" in replayed.stdout
    one = run_command(service.state_dir, "replay", "--view", "timeline")
    assert "current_status" not in one.stdout
    verified = run_command(service.state_dir, "replay", "--verify")
    assert (verified.returncode, "timeline: equal" in verified.stdout) == (0, True)
    assert run_command(service.state_dir, "replay", "--view", "weather").returncode == 2
    assert report_to(service, "KOM1", "Diterima") == 0


def test_replay_tells_a_difference_and_a_replay_that_runs_already(service: RunningService) -> None:
    """Exit 1 where a live view differs from its rebuild, and where another replay is running."""
    report_to(service, "KOM1", "Dikirim")

    async def forge() -> None:
        connection = await connect(service.dsn)
        async with asyncio.timeout(10):
            forge_row = "UPDATE current_status.orders SET cnote = 'forged'"
            # Until the projection has made the row.
            while await connection.execute(forge_row) != "UPDATE 1":  # noqa: ASYNC110 - in another process
                await asyncio.sleep(0.01)
        await connection.close()

    asyncio.run(forge())
    different = run_command(service.state_dir, "replay", "--verify")
    assert (different.returncode, "current_status: 2 rows differ" in different.stdout) == (1, True)

    async def with_a_replay_running() -> "subprocess.CompletedProcess[str]":
        connection = await connect(service.dsn)
        await connection.execute("SELECT pg_advisory_lock(hashtextextended('rebuild', 0))")
        try:
            return await asyncio.to_thread(run_command, service.state_dir, "replay")
        finally:
            await connection.close()

    second = asyncio.run(with_a_replay_running())
    assert (second.returncode, second.stderr) == (1, "a replay is running already, or a backup\n")


def test_check_says_what_is_in_order_and_what_is_not(service: RunningService) -> None:
    """0 with everything in order; 1 with one line for a trigger that was weakened."""
    in_order = run_command(service.state_dir, "check")
    assert (in_order.returncode, "WRONG" in in_order.stdout) == (0, False)
    assert "PostgreSQL" in in_order.stdout

    async def weaken() -> None:
        connection = await connect(service.dsn)
        await connection.execute("ALTER TABLE order_events ENABLE TRIGGER order_events_immutable")
        await connection.close()

    asyncio.run(weaken())
    weakened = run_command(service.state_dir, "check")
    wrong = [line for line in weakened.stdout.splitlines() if line.startswith("WRONG")]
    assert weakened.returncode == 1
    assert wrong == ["WRONG  trigger order_events_immutable is not ENABLE ALWAYS: the log can be changed"]


def test_commands_start_the_database_where_no_service_runs(state_dir: Path) -> None:
    """Without a running service a command starts the database for itself; it makes none."""
    RunningService(state_dir).start().end()
    unknown = run_command(state_dir, "audit", "KOM1")
    assert (unknown.returncode, "KOM1" in unknown.stderr) == (1, True)
    checked = run_command(state_dir, "check")
    assert checked.returncode == 0
    assert f"the database is the one in {state_dir}; " in checked.stdout
    elsewhere = state_dir / "elsewhere"
    empty = run_command(state_dir, "check", STATE_DIR=str(elsewhere))
    assert empty.returncode == 1
    assert empty.stderr.startswith(f"there is no database in {elsewhere} yet: 'serve' makes one; ")
    assert not elsewhere.exists()


def test_a_signature_closes_the_webhook_as_well(state_dir: Path) -> None:
    """Where one is asked for, neither the start nor the check says that it stands open."""
    guards = {"WEBHOOK_HMAC_SECRET": "a-secret-of-16-characters", "HOST": "0.0.0.0"}  # noqa: S104 - as on the open internet
    service = RunningService(state_dir, **guards).start()
    try:
        assert "ANYBODY" not in service.output
        assert "asks for a signature" in run_command(state_dir, "check", **guards).stdout
    finally:
        service.end()


async def test_what_was_written_of_an_order_is_erased_on_demand(service: RunningService) -> None:
    """By one command, with a reason: bodies and addresses go, what was judged stays."""
    async with aiohttp.ClientSession() as session:
        body = {"order_no": "KOM1", "status": "Dikirim", "buyer": "a name"}
        async with session.put(f"{service.url}/webhook", json=body) as answer:
            assert answer.status == 200
    for arguments, code, said in (
        (("KOM1", " "), 2, "an erasure has a reason"),
        (("KOM9", "asked for"), 1, "nothing was recorded of the order KOM9"),
        (("KOM1", "asked for"), 0, "erased"),
    ):
        done = await asyncio.to_thread(run_command, service.state_dir, "erase", *arguments)
        assert (done.returncode, said in done.stdout + done.stderr) == (code, True), done
    (event,) = await whole_log(service.url)
    assert (event["data"]["body"], event["data"]["remote"]) == ("", None)
    assert (event["data"]["verdict"], event["data"]["status"]) == ("advanced", "in_transit")
    verified = await asyncio.to_thread(run_command, service.state_dir, "replay", "--verify")
    assert verified.returncode == 0, verified.stdout


def test_connections_are_as_many_as_the_system_allows(state_dir: Path) -> None:
    """Not the thousand files that a login usually has: idle ones keep nobody out."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    service = RunningService(state_dir)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        service.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    host, port = service.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as idle:
        idle.callback(service.end)
        for _ in range(400):
            idle.enter_context(socket.create_connection((host, int(port))))
        assert (
            run_command(state_dir, "send", "KOM1", "AWB1", "Sent", "--url", f"{service.url}/webhook").returncode
            == 0
        )
    assert "Too many open files" not in service.output


def test_the_version_is_told(state_dir: Path) -> None:
    """As pyproject.toml has it."""
    assert run_command(state_dir, "--version").stdout == f"{VERSION}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PORT": "x"}, "ORDER_TRACKING_PORT: "),
        ({"PORT": "70000"}, "ORDER_TRACKING_PORT: "),
        ({"DATABASE_URL": "mysql://x"}, "ORDER_TRACKING_DATABASE_URL: it must begin with postgresql://"),
        ({"BODY_BYTES_MAX": "1"}, "ORDER_TRACKING_BODY_BYTES_MAX: "),
        ({"PROT": "8080"}, "ORDER_TRACKING_PROT is no setting; there are "),
        ({"prot": "8080"}, "ORDER_TRACKING_PROT is no setting; there are "),
        ({"HOST": "x" * 64}, "ORDER_TRACKING_HOST: it must be an IP address or a host name"),
        ({"HOST": "999.1.1.1"}, "ORDER_TRACKING_HOST: it must be an IP address or a host name"),
        ({"WEBHOOK_TOKENS": "short"}, "ORDER_TRACKING_WEBHOOK_TOKENS: each must have 16 or more "),
        (
            {"WEBHOOK_TOKENS": "has/a/slash-in-it-1234"},
            "ORDER_TRACKING_WEBHOOK_TOKENS: each must have 16 or more ",
        ),
        ({"WEBHOOK_TOKENS": ","}, "ORDER_TRACKING_WEBHOOK_TOKENS: there is nothing between its commas"),
        ({"WEBHOOK_HMAC_SECRET": "short"}, "ORDER_TRACKING_WEBHOOK_HMAC_SECRET: it must have 16 or more "),
        ({"TRUSTED_PROXIES": "10.0.0.0/8,x"}, "ORDER_TRACKING_TRUSTED_PROXIES: "),
        ({"ENV_FILE": "/nowhere/at/all"}, "ORDER_TRACKING_ENV_FILE names /nowhere/at/all, which is no file"),
    ],
)
def test_a_wrong_setting_is_one_clear_line(state_dir: Path, settings: dict[str, str], message: str) -> None:
    """It names the setting, and the exit code is that of misuse."""
    ended = run_command(state_dir, "serve", **settings)
    assert ended.returncode == 2
    assert ended.stderr.startswith(message)
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:9/webhook/a-token-of-16-characters", 1),
        ("http://x:99999/webhook/a-token-of-16-characters", 2),
        ("ftp://127.0.0.1/webhook/a-token-of-16-characters", 2),
        ("a-token-of-16-characters", 2),
        ("http://[::1/webhook/a-token-of-16-characters", 2),
    ],
)
def test_send_never_says_the_token(state_dir: Path, url: str, code: int) -> None:
    """Whatever is wrong with the address, it is one line without the path."""
    ended = run_command(state_dir, "send", "KOM1", "AWB1", "Sent", "--url", url)
    assert ended.returncode == code
    assert ended.stderr.count("\n") == 1
    assert "a-token" not in ended.stderr + ended.stdout


def test_send_finds_the_service_by_its_settings(state_dir: Path) -> None:
    """With a token, signed, and on an IPv6 address, without any of it on the command line."""
    guards = {"WEBHOOK_TOKENS": "a-token-of-16-characters", "WEBHOOK_HMAC_SECRET": "a-secret-of-16-characters"}
    service = RunningService(state_dir, HOST="::1", **guards).start()
    try:
        settings = {"HOST": "::1", "PORT": service.url.rpartition(":")[2], **guards}
        assert run_command(state_dir, "send", "KOM1", "AWB1", "Sent", **settings).returncode == 0
        assert "a-token" not in service.output
    finally:
        service.end()


def test_a_setting_may_stand_in_a_file(state_dir: Path) -> None:
    """It counts like the environment, which comes before it, and a name that is no setting is told as well."""
    file = state_dir / ".env"
    for line, message in [
        ("ORDER_TRACKING_LOG_FORMAT=loud", "ORDER_TRACKING_LOG_FORMAT: "),
        ("ORDER_TRACKING_PROT=8091", "ORDER_TRACKING_PROT is no setting; there are "),
        # What a reader of such files would pass over, and with it what keeps strangers out.
        (
            "#\nORDER_TRACKING_WEBHOOK_TOKENS='abcdefghijklmnopqrst",
            f"{file}, line 2, is no setting: ",
        ),
        ("ORDER_TRACKING_WEBHOOK_TOKENS", f"{file}, line 1, is no setting: NAME=value"),
    ]:
        (state_dir / ".env").write_text(f"{line}\n", encoding="utf-8")
        ended = run_command(state_dir, "serve", ENV_FILE=str(state_dir / ".env"))
        assert (ended.returncode, ended.stderr.startswith(message)) == (2, True), ended.stderr


def test_a_port_that_is_taken_is_one_clear_line(state_dir: Path) -> None:
    """Exit 1, and the setting that chooses another port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run_command(state_dir, "serve", PORT=str(port))
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"cannot listen on 127.0.0.1 port {port}: ")
    assert "ORDER_TRACKING_PORT" in ended.stderr


def test_a_state_folder_in_use_is_one_clear_line(service: RunningService) -> None:
    """A second service on one state folder is refused, and the first goes on."""
    second = run_command(service.state_dir, "serve")
    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert report_to(service, "KOM1", "Dikirim") == 0


def test_a_database_that_cannot_be_reached_is_one_clear_line(state_dir: Path) -> None:
    """A command that needs a database of the user's says that it cannot be used."""
    ended = run_command(state_dir, "check", DATABASE_URL="postgresql://nobody@127.0.0.1:9/absent")
    assert (ended.returncode, "the database cannot be used" in ended.stdout) == (1, True)


def test_it_can_be_stopped_while_it_waits_for_its_database(state_dir: Path) -> None:
    """SIGTERM ends a service whose database is not there yet: at once, and with exit code 0."""
    waiting = subprocess.Popen(
        [sys.executable, "-m", "service", "serve"],
        env=environment(state_dir, DATABASE_URL="postgresql://nobody@127.0.0.1:9/absent"),
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        assert waiting.stderr is not None
        assert b"waiting for the database" in waiting.stderr.readline()
        waiting.terminate()
        assert waiting.wait(5) == 0
    finally:
        waiting.kill()
        waiting.communicate()


def test_a_database_of_the_users_own(state_dir: Path, dsn: str, server: EmbeddedPostgres) -> None:
    """With a URL that database is used and none is started; two processes may share it."""
    assert server.pid is not None
    services = [RunningService(state_dir, DATABASE_URL=dsn).start() for _ in range(2)]
    try:
        assert report_to(services[0], "KOM1", "Diajukan") == 0
        assert report_to(services[1], "KOM1", "Dikirim") == 0
        audit = run_command(state_dir, "audit", "KOM1", DATABASE_URL=dsn)
        assert audit.stdout.count("advanced") == 2
        assert not (state_dir / "postgres").exists()
        assert "ORDER_TRACKING_DATABASE_URL" in services[0].output
    finally:
        for service in services:
            service.end()


def test_a_database_of_a_later_release_is_refused(state_dir: Path, owner_dsn: str) -> None:
    """A schema version that this release does not know is a clear error, and nothing is touched."""

    async def age() -> None:
        connection = await connect(owner_dsn)
        await connection.execute("INSERT INTO schema_version (version) VALUES (99)")
        await connection.close()

    asyncio.run(age())
    ended = run_command(state_dir, "serve", DATABASE_URL=owner_dsn)
    assert ended.returncode == 1
    assert ended.stderr.startswith("the database has schema version 99, this release knows up to 1")


def test_it_says_where_it_listens_where_its_data_is_and_what_to_try(service: RunningService) -> None:
    """The greeting's own line can be pasted into a shell, and works."""
    lines = service.output.splitlines()
    assert lines[0] == f"order-tracking listens on {service.url}"
    assert lines[1] == f"  its data is in {service.state_dir}"
    tried = subprocess.check_output(shlex.split(lines[2].removeprefix("  try: ")), timeout=20)
    assert json.loads(tried)["outcome"] == "advanced"
    shown = subprocess.check_output(shlex.split(lines[3]), timeout=20)
    assert json.loads(shown)["order_no"] == "TRY1"


def test_logs_are_json_where_that_is_asked_for_and_say_nothing_of_single_requests(state_dir: Path) -> None:
    """Each line is an object, and a request leaves none behind."""
    service = RunningService(state_dir, LOG_FORMAT="json").start()
    try:
        before = service.output
        for status in ("Diajukan", "Dikirim", "Batal"):
            report_to(service, "KOM1", status)
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as bad,
        ):
            bad.sendall(b"NOT HTTP\r\n\r\n")
            bad.recv(1_000)
        assert service.output == before
        service.process.send_signal(signal.SIGTERM)
        service.process.wait(15)
        logged = [line for line in service.output.splitlines() if line.startswith("{")]
        assert all("event" in json.loads(line) for line in logged)
    finally:
        service.end()


def test_the_schema_is_applied_once_by_whoever_comes_first(state_dir: Path, empty_dsn: str) -> None:
    """Several services that start at once on an empty database all come up, on one schema."""
    starting = [
        subprocess.Popen(
            [sys.executable, "-m", "service", "serve"],
            env=environment(state_dir, DATABASE_URL=empty_dsn),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(3)
    ]
    try:
        for process in starting:
            assert process.stdout is not None
            assert b"order-tracking listens on" in process.stdout.readline()
    finally:
        for process in starting:
            process.terminate()
        for process in starting:
            process.communicate(timeout=15)
    assert [process.returncode for process in starting] == [0, 0, 0]


async def test_what_is_logged_of_a_request_has_its_id(state_dir: Path) -> None:
    """The caller's own where it can be one, else one of ours; a path, which may hold a token, is not logged."""
    service = RunningService(state_dir, LOG_FORMAT="json", LOG_REQUESTS="true").start()
    asked = (("/livez", "shop-17"), ("/orders/ABSENT?limit=a-secret", "not one"), ("/livez", None))
    ids = []
    try:
        async with aiohttp.ClientSession(service.url) as session:
            for path, given in asked:
                async with session.get(path, headers={"X-Request-Id": given} if given else {}) as answer:
                    ids.append(answer.headers.get("X-Request-Id"))
    finally:
        service.end()
    lines = [json.loads(line) for line in service.output.splitlines() if '"request"' in line]
    assert ids[0] == "shop-17"
    assert ids[1] == str(UUID(ids[1]))
    assert ids[2] is None
    assert [line["request_id"] for line in lines[:2]] == ids[:2]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("GET", "/livez", 200),
        ("GET", "/orders/{order_no}", 400),
        ("GET", "/livez", 200),
    ]
    assert all(line["ms"] >= 0 for line in lines)
    assert "a-secret" not in service.output
    assert "ABSENT" not in service.output
