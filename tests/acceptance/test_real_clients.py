"""The client samples of Komerce's documentation send reports to a running service."""

import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import pytest

from tests.support.processes import RunningService
from tests.support.waiting import PATIENCE_SECONDS

CNOTE = "JX1234567890"

# The samples are verbatim except for the placeholders, which the test fills in like the sender.
CURL = """\
curl --location --request PUT 'your_webhook_handler_url' \\
--header 'accept: application/json' \\
--header 'Content-Type: application/json' \\
--data '{
"order_no": "{{ order.no }}",
"cnote": "{{ awb.no }}",
"status": "{{ status }}"
}'
"""
FETCH = """\
const myHeaders = new Headers();
myHeaders.append("accept", "application/json");
myHeaders.append("Content-Type", "application/json");
const raw = JSON.stringify({
"order_no": "{{ order.no }}",
"cnote": "{{ awb.no }}",
"status": "{{ status }}"
});
const requestOptions = {
method: "PUT",
headers: myHeaders,
body: raw,
redirect: "follow"
};
fetch("your_webhook_handler_url", requestOptions)
.then((response) => response.text())
.then((result) => console.log(result))
.catch((error) => console.error(error));
"""
AXIOS = """\
const axios = require('axios');
let data = JSON.stringify({
"order_no": "{{ order.no }}",
"cnote": "{{ awb }}",
"status": "{{ status }}"
});
let config = {
method: 'put',
maxBodyLength: Infinity,
url: 'your_webhook_handler_url',
headers: {
'accept': 'application/json',
'Content-Type': 'application/json'
},
data : data
};
axios.request(config)
.then((response) => {
console.log(JSON.stringify(response.data));
})
.catch((error) => {
console.log(error);
});
"""
PHP = """\
<?php
$curl = curl_init();
curl_setopt_array($curl, array(
CURLOPT_URL => 'your_webhook_handler_url',
CURLOPT_RETURNTRANSFER => true,
CURLOPT_ENCODING => '',
CURLOPT_MAXREDIRS => 10,
CURLOPT_TIMEOUT => 0,
CURLOPT_FOLLOWLOCATION => true,
CURLOPT_HTTP_VERSION => CURL_HTTP_VERSION_1_1,
CURLOPT_CUSTOMREQUEST => 'PUT',
CURLOPT_POSTFIELDS =>'{
"order_no": "{{ order_no }}",
"cnote": "{{ awb }}",
"status": "{{ status }}"
}',
CURLOPT_HTTPHEADER => array(
'accept: application/json',
'Content-Type: application/json'
),
));
$response = curl_exec($curl);
curl_close($curl);
echo $response;
"""
GO = """\
package main
import (
"fmt"
"strings"
"net/http"
"io"
)
func main() {
url := "your_webhook_handler_url"
method := "PUT"
payload := strings.NewReader(`{
"order_no": "{{ order.no }}",
"cnote": "{{ awb }}",
"status": "{{ status }}"
}`)
client := &http.Client {
}
req, err := http.NewRequest(method, url, payload)
if err != nil {
fmt.Println(err)
return
}
req.Header.Add("accept", "application/json")
req.Header.Add("Content-Type", "application/json")
res, err := client.Do(req)
if err != nil {
fmt.Println(err)
return
}
defer res.Body.Close()
body, err := io.ReadAll(res.Body)
if err != nil {
fmt.Println(err)
return
}
fmt.Println(string(body))
}
"""
PLACEHOLDERS = {
    "{{ order.no }}": "%(order)s",
    "{{ order_no }}": "%(order)s",
    "{{ awb.no }}": "%(awb)s",
    "{{ awb }}": "%(awb)s",
    "{{ status }}": "%(status)s",
}
# The body that JSON.stringify makes, and the body that the other clients send as written.
COMPACT = '{"order_no":"%s","cnote":"%s","status":"%s"}'
WRITTEN = '{\n"order_no": "%s",\n"cnote": "%s",\n"status": "%s"\n}'


class Sample(NamedTuple):
    """A sample of the documentation, its file name, and the function that runs it."""

    client: Callable[[Path, str], str]
    file: str
    text: str


def run(folder: Path, *command: str, seconds_max: float = PATIENCE_SECONDS) -> str:
    """Run a client, and return its output."""
    done = subprocess.run(
        command,
        cwd=folder,
        # Keep the environment, so that Go finds its usual cache and does not build its library again.
        env={name: value for name, value in os.environ.items() if not name.startswith("ORDER_TRACKING_")},
        capture_output=True,
        text=True,
        timeout=seconds_max,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program} here")


def curl(folder: Path, file: str) -> str:
    need("curl")
    return run(folder, "sh", file)


def fetch(folder: Path, file: str) -> str:
    need("node")
    if run(folder, "node", "-p", "typeof fetch").strip() != "function":
        pytest.skip("this Node.js has no fetch")
    return run(folder, "node", file)


def axios(folder: Path, file: str) -> str:
    need("node", "npm")
    if not (folder / "node_modules").exists():
        try:
            run(
                folder,
                *("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", ".", "axios"),
                seconds_max=PATIENCE_SECONDS,
            )
        except (AssertionError, subprocess.TimeoutExpired):
            pytest.skip("axios cannot be installed from the registry")
    return run(folder, "node", file)


def php(folder: Path, file: str) -> str:
    need("php")
    if "curl" not in run(folder, "php", "-m").split():
        pytest.skip("this PHP has no curl")
    # Newer versions of PHP print a notice that curl_close has no effect.
    return run(folder, "php", "-d", "display_errors=0", file)


def go(folder: Path, file: str) -> str:
    need("go")
    return run(folder, "go", "run", file)


@pytest.mark.parametrize(
    ("sample", "body"),
    [
        pytest.param(Sample(curl, "push.sh", CURL), WRITTEN, id="curl"),
        pytest.param(Sample(fetch, "push.js", FETCH), COMPACT, id="fetch"),
        pytest.param(Sample(axios, "push.js", AXIOS), COMPACT, id="axios"),
        pytest.param(Sample(php, "push.php", PHP), WRITTEN, id="php"),
        pytest.param(Sample(go, "push.go", GO), WRITTEN, id="go"),
    ],
)
def test_a_documented_client_is_understood_and_gets_its_receipt(
    shared_service: RunningService, tmp_path: Path, sample: Sample, body: str
) -> None:
    """Each sample works by PUT as documented and by POST as in the tips, and its exact body is recorded."""
    order_no = f"KOM-{uuid4().hex[:8]}"
    for version, (method, status) in enumerate([("PUT", "Dijemput"), ("POST", "Dikirim")], 1):
        text = sample.text.replace("PUT", method).replace("'put'", f"'{method.lower()}'")
        text = text.replace("your_webhook_handler_url", f"{shared_service.url}/webhook")
        for placeholder, value in PLACEHOLDERS.items():
            text = text.replace(placeholder, value % {"order": order_no, "awb": CNOTE, "status": status})
        (tmp_path / sample.file).write_text(text, encoding="utf-8")
        receipt = json.loads(sample.client(tmp_path, sample.file))
        assert (receipt["outcome"], receipt["order_no"], receipt["version"]) == ("advanced", order_no, version)
        with urllib.request.urlopen(f"{shared_service.url}/orders/{order_no}/events") as response:  # noqa: S310 - our own
            recorded = json.load(response)["events"][-1]["data"]
        assert recorded["body"] == body % (order_no, CNOTE, status)
