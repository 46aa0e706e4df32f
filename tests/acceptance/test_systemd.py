"""The units of docs/operations run the service and its backup, hardened, under a real systemd."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

import pytest

from tests.support.folders import ROOT, temporary_folder

OPERATIONS: Final = ROOT / "docs" / "operations"
MACHINE: Final = ROOT / "tests" / "support" / "systemd_machine.sh"
# Ten times the highest exposure level that systemd-analyze may compute; the units have about 14.
EXPOSURE_MAX: Final = 30
# What an operator does, and what may happen. Every command must succeed.
SCRIPT: Final = """\
set -ex
trap 'journalctl --no-pager; cat /var/lib/order-tracking/postgres.log' EXIT
order_tracking() {
    setpriv --reuid=order-tracking --regid=order-tracking --clear-groups \\
        env ORDER_TRACKING_ENV_FILE=/etc/order-tracking.env /opt/order-tracking/.venv/bin/order-tracking "$@"
}
until_recorded() {
    for attempt in $(seq 100); do order_tracking send KOM1 AWB1 Dikirim && return; done
    return 1
}
until_ready() {
    for attempt in $(seq 100); do
        /opt/order-tracking/.venv/bin/python -c "
import urllib.request
urllib.request.urlopen('http://127.0.0.1:$1/readyz')" && return
        sleep 0.1
    done
    return 1
}
install -d -m 700 -o order-tracking /var/backups/order-tracking
install -d -m 755 -o order-tracking /var/lib/node_exporter

cat >/run/client.py <<'PY'
import pathlib, time, urllib.request
number = 0
while not pathlib.Path("/run/done").exists():
    number += 1
    body = b'{"order_no":"KOM2","cnote":"%d","status":"Dikirim"}' % number
    # Any other response than 200 raises an error.
    urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8080/webhook", body, method="PUT")).close()
    time.sleep(0.01)
PY
await_client() {
    : >/run/done
    wait "$client"
    rm /run/done
}

systemctl start order-tracking
until_recorded
service=$(systemctl show --property=MainPID --value order-tracking)
server=$(pgrep --parent "$service" postgres)
cat "/proc/$service/status" "/proc/$server/status" >/host/status-of-processes
order_tracking simulate --orders 20 --rate 0
order_tracking replay
systemctl start order-tracking-backup

: PostgreSQL is killed, and then the service
kill -KILL "$server"
until_recorded
kill -KILL "$service"
until_recorded

: The socket unit keeps the port open, so that a restart refuses nothing
/opt/order-tracking/.venv/bin/python /run/client.py & client=$!
systemctl restart order-tracking
until_recorded
systemctl restart order-tracking
until_recorded
await_client

: Several services share the socket, here on the PostgreSQL of the first one
sockets=$(dirname "$(find /var/lib/order-tracking -name '.s.PGSQL.5432')")
cp /etc/systemd/system/order-tracking.service /etc/systemd/system/order-tracking@.service
mkdir /etc/systemd/system/order-tracking@.service.d
cat >/etc/systemd/system/order-tracking@.service.d/own.conf <<UNIT
[Service]
Environment=ORDER_TRACKING_METRICS_PORT=909%i
Environment=ORDER_TRACKING_DATABASE_URL=postgresql://order_tracking@/order_tracking?host=$sockets
UNIT
systemctl daemon-reload
systemctl start order-tracking@1 order-tracking@2
until_recorded
/opt/order-tracking/.venv/bin/python /run/client.py & client=$!
systemctl restart order-tracking@1
until_ready 9091
systemctl kill --signal=STOP order-tracking@2
until_recorded
systemctl kill --signal=CONT order-tracking@2
until_ready 9092
await_client
systemctl stop order-tracking@1 order-tracking@2

: The unit leaves nothing behind, and the backup starts PostgreSQL itself
systemctl stop order-tracking
test "$(systemctl show --property=Result --value order-tracking)" = success
test -z "$(pgrep --euid order-tracking)"
systemctl start order-tracking-backup
test "$(find /var/backups/order-tracking -name '*.dump' | wc -l)" = 2
test -s /var/lib/node_exporter/order_tracking.prom
"""


@pytest.mark.parametrize("name", ["order-tracking.service", "order-tracking-backup.service"])
def test_systemd_finds_the_unit_hardened(name: str) -> None:
    """The exposure level that systemd computes for each unit is low."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("this machine has no systemd")
    options = ["security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager"]
    done = subprocess.run(
        [analyze, *options, str(OPERATIONS / name)], capture_output=True, text=True, check=False
    )
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd is older than 250 and analyses no file")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hardened_units_run_the_service_and_its_backup() -> None:
    """A real systemd runs both units unchanged, with the embedded PostgreSQL: reports, a rebuild, a backup with
    and without the service, restarts after kills, and an orderly stop. No call that they need is forbidden.

    The test takes about 15 s, because it boots systemd, creates a database and starts PostgreSQL four times.
    """
    if not Path("/lib/systemd/systemd").exists() or os.geteuid() != 0:
        pytest.skip("this machine has no systemd, or the tests do not run as root")
    if subprocess.run(["sh", MACHINE, "--probe"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no namespaces in which a systemd could run")
    with temporary_folder() as folder:
        (folder / "script").write_text(SCRIPT, encoding="utf-8")
        packages = sysconfig.get_path("purelib")
        done = subprocess.run(
            ["sh", MACHINE, folder / "script", folder, ROOT, sys.base_prefix, packages],
            capture_output=True,
            text=True,
            check=False,
        )
        console, output = (
            (folder / name).read_text(encoding="utf-8") if (folder / name).exists() else ""
            for name in ("console", "output")
        )
        assert done.returncode == 0, done.stderr + console + output
        assert "not permitted" not in output
        processes = (folder / "status-of-processes").read_text(encoding="utf-8")
    for line in ("Umask:\t0077", "NoNewPrivs:\t1", "Seccomp:\t2", f"CapBnd:\t{0:016x}", f"CapEff:\t{0:016x}"):
        assert processes.count(line) == 2, line
