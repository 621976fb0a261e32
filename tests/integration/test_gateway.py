"""A real nginx with the gateway's configuration, before the real service."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import shutil
import socket
import ssl
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from serving.schema import MAX_BODY_BYTES
from tests.integration.test_bento import NOW, ROOT, make_events, make_predictor, start

KEY = "0f" * 32
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin:/usr/local/sbin")

if not (NGINX and shutil.which("openssl")):
    pytest.skip("needs nginx and openssl: make system", allow_module_level=True)


@dataclass(frozen=True)
class Gateway:
    port: int
    folder: Path

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        key: str | None = KEY,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        trust = ssl.create_default_context(cafile=str(self.folder / "tls.crt"))
        connection = http.client.HTTPSConnection("localhost", self.port, context=trust, timeout=60)
        sent = {"Content-Type": "application/json"} if body is not None else {}
        sent |= {"Authorization": f"Bearer {key}"} if key is not None else {}
        try:
            connection.request(method, path, body=body, headers=sent | (headers or {}))
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()
        finally:
            connection.close()


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def run_nginx(folder: Path, service_port: int) -> Iterator[Gateway]:
    """Run nginx with the gateway's configuration, only the ports changed."""
    port = find_port()
    text = (ROOT / "deploy/gateway/nginx.conf").read_text()
    for old, new in (("127.0.0.1:3000", f"127.0.0.1:{service_port}"), ("8443", str(port))):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (folder / "nginx.conf").write_text(text)
    (folder / "keys.conf").write_text(f'"Bearer {KEY}" shop;\n')
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run(command, check=True, capture_output=True)
    # nginx opens its compiled-in error log before it has read the configuration.
    nginx = [str(NGINX), "-p", f"{folder}/", "-c", "nginx.conf", "-e", "stderr"]
    check = subprocess.run([*nginx, "-t"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr
    with (folder / "error.log").open("w") as log:
        process = subprocess.Popen([*nginx, "-g", "daemon off;"], stderr=log)
    try:
        found = Gateway(port=port, folder=folder)
        for _ in range(100):
            try:
                found.ask("GET", "/metrics")
                break
            except OSError:
                time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("gateway")
    (folder / "model").mkdir()
    make_predictor().save(folder / "model")
    with (
        start(folder / "model", folder) as service,
        run_nginx(folder, service.port) as found,
    ):
        yield found


def request(users: int = 1, events: int = 5) -> bytes:
    rng = np.random.default_rng(1)
    shoppers = [{"user_id": f"u{i}", "events": make_events(rng, events)} for i in range(users)]
    return json.dumps({"users": shoppers, "now": NOW.isoformat()}).encode()


def code(content: bytes) -> str:
    return str(json.loads(content)["error"]["code"])


def test_a_client_with_a_key_is_served_over_tls(gateway: Gateway) -> None:
    status, headers, content = gateway.ask("POST", "/predict", request())
    assert status == 200, content
    assert json.loads(content)["predictions"][0]["user_id"] == "u0"
    assert "strict-transport-security" in headers
    assert headers.get("server") == "nginx"


@pytest.mark.parametrize("key", [None, "", "wrong", KEY[:-1], KEY.upper() + "0"])
def test_without_the_key_nothing_is_served(gateway: Gateway, key: str | None) -> None:
    status, headers, content = gateway.ask("POST", "/predict", request(), key=key)
    assert (status, code(content)) == (401, "unauthorized")
    assert headers["www-authenticate"] == "Bearer"
    assert gateway.ask("GET", "/livez", key=key)[0] == 200


def test_measurements_stay_inside(gateway: Gateway) -> None:
    for path in ("/metrics", "/metrics/", "//metrics", "/x/../metrics", "/%6detrics"):
        assert gateway.ask("GET", path)[0] in (404, 405), path


def test_old_tls_and_plain_text_are_refused(gateway: Gateway) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(gateway.folder / "tls.crt")
    old.set_ciphers("DEFAULT@SECLEVEL=0")
    old.minimum_version = ssl.TLSVersion.TLSv1
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("127.0.0.1", gateway.port)) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        old.wrap_socket(plain, server_hostname="localhost")
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
    connection.request("GET", "/livez")
    assert connection.getresponse().status == 400


def test_large_bodies_end_at_the_gateway(gateway: Gateway) -> None:
    status, _, content = gateway.ask("POST", "/predict", b"{" + b" " * MAX_BODY_BYTES)
    assert (status, code(content)) == (413, "too_large")
    # The largest that is allowed gets through to the service, which tells what is wrong with it.
    status, _, content = gateway.ask("POST", "/predict", b"{" + b" " * (MAX_BODY_BYTES - 1))
    assert (status, code(content)) == (400, "malformed_json")


def test_too_many_requests_are_refused_in_the_services_form(gateway: Gateway) -> None:
    body = request()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: gateway.ask("POST", "/predict", body), range(600)))
    counts = Counter(status for status, _, _ in answers)
    assert set(counts) == {200, 429}, counts
    assert counts[200] >= 100
    refused = next(a for a in answers if a[0] == 429)
    assert code(refused[2]) == "too_many_requests"
    assert refused[1]["retry-after"] == "1"


def test_the_log_tells_no_keys_and_no_shoppers(gateway: Gateway) -> None:
    time.sleep(2)  # until the client's allowance of the test before is back
    gateway.ask("GET", "/readyz?user=ada-lovelace@example.com")
    status, _, content = gateway.ask("GET", "/users/ada%2Flovelace%20%C3%BC/prediction")
    assert (status, code(content)) == (404, "not_found")
    time.sleep(0.5)
    log = (gateway.folder / "access.log").read_text()
    assert " shop POST /predict 200 " in log
    assert " shop GET /users/ 404 " in log
    assert KEY not in log
    assert "lovelace" not in log


def test_a_service_that_is_away_is_told(tmp_path: Path) -> None:
    with run_nginx(tmp_path, find_port()) as gateway:
        status, _, content = gateway.ask("POST", "/predict", request())
    assert (status, code(content)) == (503, "unavailable")
