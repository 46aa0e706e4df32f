"""The audit of ``make lint``: it looks up the locked packages in a source of known vulnerabilities.

A source counts only if it reports the vulnerabilities of a package that has some: a mirror of the package index
may not know them. The audit fails if a package is vulnerable and, on CI, if a source responds but no package is
audited. If no source responds, the audit succeeds.
"""

import json
import os
import subprocess
import sys
import tempfile
from typing import Any, Final

from tests.support.folders import ROOT

LOCK: Final = ROOT / "requirements.lock"
TIMEOUT_SECONDS: Final = 15
SOURCES: Final[dict[str, tuple[str, ...]]] = {
    "pypi": ("--vulnerability-service=pypi",),
    "osv": ("--vulnerability-service=osv",),
}
# A package with known vulnerabilities, which is only looked up.
VULNERABLE: Final = "django"
VULNERABLE_PIN: Final = f"{VULNERABLE}==2.0 --hash=sha256:{0:064}\n"


def query(options: tuple[str, ...]) -> list[dict[str, Any]] | str:
    """Look up the vulnerable package and the locked ones in a source, and return the results or an error."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as vulnerable:
        vulnerable.write(VULNERABLE_PIN)
        vulnerable.flush()
        files = (f"--requirement={LOCK}", f"--requirement={vulnerable.name}", "--disable-pip")
        output = ("--format=json", "--desc=off", "--progress-spinner=off", f"--timeout={TIMEOUT_SECONDS}")
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *files, *output, *options],
            capture_output=True,
            text=True,
            check=False,
        )
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return done.stderr.strip().rpartition("\n")[2]
    return packages


def audit(name: str, options: tuple[str, ...]) -> bool | None:
    """Print a source's results. Return whether it audited any package; None if it is not available.

    Raises:
        SystemExit: a locked package is vulnerable.
    """
    packages = query(options)
    if isinstance(packages, str):
        sys.stdout.write(f"audit: {name} is unreachable: {packages}\n")
        return None
    known = [package for package in packages if "skip_reason" not in package]
    references = [package for package in known if package["name"] == VULNERABLE]
    locked = [package for package in known if package["name"] != VULNERABLE]
    if not references:
        sys.stdout.write(
            f"audit: {name} does not know {VULNERABLE}, so it is a mirror without vulnerabilities\n"
        )
        return None
    if not references[0]["vulns"] or not locked:
        sys.stdout.write(f"audit: {name} responds, but audits nothing\n")
        return False
    unknown = len(packages) - len(known)
    vulnerable = [package for package in locked if package["vulns"]]
    sys.stdout.write(
        f"audit: {name} audited {len(locked)} packages of {LOCK.name}; {unknown} are unknown to it; "
        f"{len(vulnerable)} are vulnerable\n"
    )
    for package in vulnerable:
        ids = ", ".join(vulnerability["id"] for vulnerability in package["vulns"])
        sys.stdout.write(f"audit: {package['name']} {package['version']} has known vulnerabilities: {ids}\n")
    if vulnerable:
        sys.exit(1)
    return True


def main() -> int:
    """Query the sources in turn until one audits something, and return the exit code.

    An argument is the URL of another OSV service, which is then the only source.
    """
    sources = SOURCES
    if len(sys.argv) > 1:
        sources = {"osv": (*SOURCES["osv"], f"--osv-url={sys.argv[1]}")}
    results = []
    for name, options in sources.items():
        results.append(audit(name, options))
        if results[-1]:
            return 0
    sys.stdout.write("audit: NOTHING WAS AUDITED\n")
    return 1 if False in results and os.environ.get("CI") else 0


if __name__ == "__main__":
    sys.exit(main())
