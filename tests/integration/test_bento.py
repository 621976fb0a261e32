"""The packaged Bento, served for real: one model, built once, asked over loopback."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import psutil
import pytest
import yaml
from prometheus_client import CollectorRegistry

from pipelines.config import parse_params
from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES, to_us
from pipelines.features.store import Sequences, encode_events, hash_text
from pipelines.io import digest_directory, read_json, write_json
from pipelines.model.calibration import Calibration
from pipelines.model.heads import Heads, Target
from pipelines.model.network import Network, NetworkConfig
from pipelines.model.predictor import ModelSpec, Predictor
from pipelines.model.timeline import feature_names
from pipelines.model.tokens import Vocabulary
from pipelines.stages import package
from serving.engine import Engine, assign_cores, find_count
from serving.limits import MAX_EVENTS, MAX_USERS
from serving.loading import load
from serving.metrics import Metrics
from serving.schema import MAX_BODY_BYTES
from serving.service import _split
from serving.store import Store
from serving.swap import Watcher
from tests.serving.test_stalls import run_silent_server

ROOT = Path(__file__).resolve().parents[2]
NOW = datetime(2025, 3, 1, tzinfo=UTC)

ITEMS = tuple(f"i{n}" for n in range(50))
TARGETS = (
    Target(name="purchase_14d", kind="binary", event="purchase", horizon_days=14),
    Target(name="churn_14d", kind="binary", event=None, horizon_days=14),
    Target(name="spend_14d", kind="amount", event="purchase", horizon_days=14),
)


def make_predictor(seed: int = 1) -> Predictor:
    """A model with random weights: small, but with every part of a real one."""
    import torch

    torch.manual_seed(seed)
    heads = Heads.for_targets(TARGETS)
    config = NetworkConfig(
        backbone="gpt",
        width=16,
        layers=1,
        heads=2,
        dropout=0.0,
        types=len(EVENT_TYPES) + 2,
        categories=2,
        brands=2,
        genders=2,
        regions=2,
        item_buckets=16,
        query_buckets=16,
        next_codes=32,
        features=len(feature_names()),
        fusion_width=16,
        events=len(heads.events),
        bins=len(heads.grid),
        amounts=len(heads.amounts),
        items=len(ITEMS),
    )
    spec = ModelSpec(
        network=config,
        vocabulary=Vocabulary(item=tuple(hash_text(i) for i in ITEMS), item_id=ITEMS),
        heads=heads,
        targets=TARGETS,
        context=16,
        calibration=Calibration(),
        thresholds={"purchase_14d": 0.5, "churn_14d": 0.5},
    )
    return Predictor(spec, Network(config))


def make_events(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Events of one shopper before NOW, as a request holds them."""
    minutes = np.sort(rng.integers(1, 60 * 24 * 60, count))[::-1]
    return [
        {
            "event_type": str(rng.choice(["view", "search", "add_to_cart", "purchase"])),
            "ts": (NOW - timedelta(minutes=int(m))).isoformat(),
            "item_id": f"i{rng.integers(50)}",
            "category": f"c{rng.integers(4)}",
            "price": float(rng.integers(1, 100)),
            "query": "red shoes",
        }
        for m in minutes
    ]


def encode(users: list[list[dict[str, Any]]]) -> Sequences:
    parsed = [[{**e, "ts": datetime.fromisoformat(e["ts"])} for e in events] for events in users]
    return encode_events(parsed)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder in which the package stage finds its inputs."""
    root = tmp_path_factory.mktemp("bento") / "project"
    for name in ("pipelines", "serving"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, root / name)
    rng = np.random.default_rng(3)
    (root / "data/features/sequences").mkdir(parents=True)
    everyone = encode([make_events(rng, int(n)) for n in rng.integers(1, 40, 12)])
    everyone.save(root / "data/features/sequences")
    write_json(root / "data/features/cuts.json", {"end_ts": NOW.isoformat()})
    (root / "models/gpt").mkdir(parents=True)
    make_predictor().save(root / "models/gpt")
    package.run(parse_params({"package": {"golden_users": 5}}), root)
    return root


@dataclass(frozen=True)
class Service:
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        kind: str = "application/json",
        seconds: float = 60,
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body)
            headers = {"Content-Type": kind} if body is not None else {}
            connection.request(method, path, body=content, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def is_ready(self) -> bool:
        try:
            # The port is open before, and after, a process is there that answers.
            return self.ask("GET", "/readyz", seconds=5)[0] == 200
        except OSError:
            return False

    def predict(self, body: Any, **options: Any) -> tuple[int, Any]:
        return self.post("/predict", body, **options)

    def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        status, headers, content = self.ask("POST", path, body, **options)
        assert headers["content-type"] == "application/json", content
        return status, json.loads(content)


@contextmanager
def start(
    directory: Path,
    folder: Path,
    *,
    gone: bool = False,
    refused: str | None = None,
    bare: bool = False,
) -> Iterator[Service]:
    """Serve a Bento or a model as `forecart serve` does; end it with all its children.

    Args:
        directory: a Bento or a model.
        folder: the server's own.
        gone: the test itself kills it.
        refused: what it says where it does not start, and tries again.
        bare: by `bentoml serve` itself, without what `forecart serve` tells it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import sys; from pathlib import Path; from serving.run import serve; "
        "serve(Path(sys.argv[1]), port=int(sys.argv[2]))"
    )
    command = [sys.executable, "-c", code, str(directory), str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if bare:
        command = [sys.executable, "-m", "bentoml", "serve", str(directory)]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        del environment["PYTHONPATH"]
        environment |= {"BENTOML_HOME": str(folder), "BENTOML_DO_NOT_TRACK": "True"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    service = Service(port=port, process=process, log=folder / "log")
    alive: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + 120
        while not service.is_ready():
            assert process.poll() is None, service.log.read_text()
            assert time.monotonic() < deadline, service.log.read_text()
            assert refused is None or refused not in service.log.read_text(), refused
            time.sleep(0.2)
        yield service
    finally:
        children = [] if gone else psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        finally:
            _, alive = psutil.wait_procs(children, timeout=10)
            for child in alive:
                child.kill()
            if process.poll() is None:
                process.kill()
                process.wait()
    assert not alive, "the server left children behind"


@pytest.fixture(scope="module")
def service(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The packaged Bento."""
    with start(project / "build/bento", tmp_path_factory.mktemp("service")) as running:
        yield running


def make_request(users: int, seed: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "users": [{"user_id": f"u{i}", "events": make_events(rng, 10 + i)} for i in range(users)],
        "now": NOW.isoformat(),
    }


def test_the_bento_holds_what_serving_needs_and_nothing_else(project: Path) -> None:
    bento = project / "build/bento"
    content = yaml.safe_load((bento / "bento.yaml").read_text())
    digest = digest_directory(project / "models/gpt")
    assert content["name"] == "forecart"
    assert content["version"] == digest.removeprefix("sha256:")[:12]
    assert digest_directory(bento / "src/model") == digest
    assert not list(bento.rglob("__pycache__"))
    assert not list(bento.rglob("*.pkl"))
    lines = (bento / "env/python/requirements.txt").read_text().split()
    names = {line.split("==")[0] for line in lines}
    assert {"torch", "safetensors", "numpy", "pyarrow", "pydantic", "bentoml"} <= names
    assert not names & {"mlflow", "duckdb", "apache-airflow", "dvc", "pandas"}
    assert all("==" in line for line in lines)
    assert str(project) not in (bento / "bento.yaml").read_text()


def test_equal_inputs_give_equal_bytes(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(project, other, ignore=shutil.ignore_patterns("build"))
    package.run(parse_params({"package": {"golden_users": 5}}), other)
    assert digest_directory(other / "build/bento") == digest_directory(project / "build/bento")


SLOWER = """

_predict = Predictor.predict


def _predict_slowly(*arguments, **options):
    import time

    time.sleep(0.025)
    return _predict(*arguments, **options)


Predictor.predict = _predict_slowly
"""


def test_a_packaged_model_that_is_slow_is_measured_as_one(project: Path, tmp_path: Path) -> None:
    report = read_json(project / "reports/package.json")
    assert report["model"] == digest_directory(project / "models/gpt")
    assert 0 < report["size_mb"] < 5
    assert report["p99_at_most_ms"] <= 200
    source = tmp_path / "src"
    shutil.copytree(project / "build/bento/src", source)
    with (source / "pipelines/model/predictor.py").open("a") as file:
        file.write(SLOWER)
    times = json.loads(package._run(["serving.measure"], folder=source, environment={}))
    assert times["p50_ms"] > 25
    assert package.describe("", 1.0, times["p99_ms"], 20.0)["p99_at_most_ms"] > 20


def test_a_bento_that_predicts_something_else_is_refused(project: Path, tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(project / "build/bento/src", source)
    golden = read_json(source / "golden.json")
    golden["expected"]["purchase_14d"][0] += 1e-3
    write_json(source / "golden.json", golden)
    with pytest.raises(RuntimeError, match=r"purchase_14d differs by up to 0\.001"):
        package._run(["serving.golden"], folder=source, environment={})


def test_one_user_gets_what_the_model_says(service: Service, project: Path) -> None:
    request = make_request(1)
    status, answer = service.predict(request)
    assert status == 200, answer
    sequences = encode([request["users"][0]["events"]])
    now = np.array([int(NOW.timestamp() * 1e6)])
    expected = Predictor.load(project / "models/gpt").predict(sequences, now)
    prediction = answer["predictions"][0]
    assert prediction["user_id"] == "u0"
    assert prediction["probabilities"].keys() == {"purchase_14d", "churn_14d"}
    for name, value in {**prediction["probabilities"], **prediction["expected_spend"]}.items():
        assert value == pytest.approx(float(expected[name][0]), abs=1e-5, rel=1e-5)
    assert answer["model"] == digest_directory(project / "models/gpt")


def test_many_users_get_what_each_gets_alone(service: Service) -> None:
    request = make_request(20)
    status, together = service.predict(request)
    assert status == 200, together
    assert [p["user_id"] for p in together["predictions"]] == [f"u{i}" for i in range(20)]
    for user, prediction in list(zip(request["users"], together["predictions"], strict=True))[::7]:
        _, alone = service.predict({"users": [user], "now": request["now"]})
        for name, value in alone["predictions"][0]["probabilities"].items():
            assert prediction["probabilities"][name] == pytest.approx(value, abs=1e-5)


def test_the_order_of_events_in_a_request_does_not_matter(service: Service) -> None:
    request = make_request(1)
    _, forwards = service.predict(request)
    request["users"][0]["events"].reverse()
    _, backwards = service.predict(request)
    assert forwards == backwards


def test_without_now_the_clock_of_the_service_counts(service: Service) -> None:
    event = {"event_type": "view", "ts": datetime.now(UTC).isoformat()}
    status, answer = service.predict({"users": [{"user_id": "a", "events": [event]}]})
    assert status == 200, answer
    assert datetime.fromisoformat(answer["now"]) >= datetime.fromisoformat(event["ts"])


def change(path: str, value: Any) -> dict[str, Any]:
    """A good request with one thing changed; None removes it."""
    request = make_request(2)
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    place: Any = request
    for part in parents:
        place = place[part]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return request


VIEW = {"event_type": "view", "ts": (NOW - timedelta(days=1)).isoformat()}


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("users.1.events.2.colour", "red", "users.1.events.2.colour"),
        ("users.0.events.0.price", "12.5", "users.0.events.0.price"),
        ("users.0.events.0.price", -1, "users.0.events.0.price"),
        ("users.0.events.0.event_type", "teleport", "users.0.events.0.event_type"),
        ("users.1.events.3.ts", None, "users.1.events.3.ts"),
        ("users.1.events.3.ts", "yesterday", "users.1.events.3.ts"),
        ("users.1.events.3.ts", "2025-01-01T00:00:00", "users.1.events.3.ts"),
        ("users.1.events.3.ts", 1735689600, "users.1.events.3.ts"),
        ("users.1.events.3.ts", "2025-03-01T00:00:00Z", "users.1.events.3.ts"),
        ("users.0.user_id", 7, "users.0.user_id"),
        ("users.0.user_id", "", "users.0.user_id"),
        ("users.0.profile", {"age": -3}, "users.0.profile.age"),
        ("users.0.events", [], "users.0.events"),
        ("users.0.events", [VIEW] * (MAX_EVENTS + 1), "users.0.events"),
        ("users", [], "users"),
        ("users", [{"user_id": "a", "events": [VIEW]}] * (MAX_USERS + 1), "users"),
        ("users", None, "users"),
        ("model", "another", "model"),
    ],
)
def test_a_wrong_request_is_422_and_names_the_field(
    service: Service, path: str, value: Any, field: str
) -> None:
    status, answer = service.predict(change(path, value))
    assert status == 422, answer
    assert answer["error"].keys() == {"code", "message", "field"}
    assert answer["error"]["code"] == "invalid_request"
    assert answer["error"]["field"] == field


@pytest.mark.parametrize("body", [b"{", b"users=1", b'{"users": }', b"\xff\xfe", b"[" * 100_000])
def test_malformed_json_is_400(service: Service, body: bytes) -> None:
    status, answer = service.predict(body)
    assert status == 400, answer
    assert answer["error"]["code"] == "malformed_json"


def test_a_large_body_is_413(service: Service) -> None:
    status, answer = service.predict(b" " * (MAX_BODY_BYTES + 1))
    assert status == 413
    assert answer["error"]["code"] == "too_large"


@pytest.mark.parametrize(
    "kind", ["application/vnd.bentoml+pickle", "multipart/form-data; boundary=x", "text/plain"]
)
def test_other_media_types_are_415(service: Service, kind: str) -> None:
    status, answer = service.predict(b"\x80\x04N.", kind=kind)
    assert status == 415
    assert answer["error"]["code"] == "unsupported_media_type"


def test_unknown_paths_and_methods_have_the_same_form_of_error(service: Service) -> None:
    for method, path, expected in (("GET", "/nowhere", 404), ("GET", "/predict", 405)):
        status, _, body = service.ask(method, path)
        assert status == expected
        assert json.loads(body)["error"].keys() == {"code", "message", "field"}


def test_the_next_purchase_and_items_are_told(service: Service) -> None:
    status, answer = service.predict(make_request(3) | {"next_items": 4})
    assert status == 200, answer
    for prediction in answer["predictions"]:
        told = prediction["next_items"]
        assert len({item["item_id"] for item in told} & set(ITEMS)) == 4
        chances = [item["probability"] for item in told]
        assert chances == sorted(chances, reverse=True)
        assert 0 < sum(chances) <= 1
        when = prediction["next_purchase"]
        assert (when is not None) == (prediction["probabilities"]["purchase_14d"] >= 0.5)
        assert when is None or datetime.fromisoformat(when) > NOW
    _, without = service.predict(make_request(3))
    assert [p["next_items"] for p in without["predictions"]] == [[], [], []]


def measure_memory(service: Service) -> int:
    """Return the bytes that the processes of the server hold."""
    server = psutil.Process(service.process.pid)
    return sum(p.memory_info().rss for p in [server, *server.children(recursive=True)])


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        (
            "POST",
            "/predict",
            {"users": [{"user_id": "a", "events": [{"a": 1, "b": 1}] * 2000}] * 256},
        ),
        ("POST", "/predict", {"users": [{f"k{i}": 1 for i in range(500_000)}]}),
        ("POST", "/events", {"events": [{f"k{i}": 1 for i in range(500_000)}]}),
        ("PUT", "/users/a", {f"k{i}": 1 for i in range(500_000)}),
    ],
)
def test_a_body_of_mistakes_costs_no_more_than_one(
    service: Service, method: str, path: str, body: Any
) -> None:
    content = json.dumps(body, separators=(",", ":")).encode()
    assert len(content) > 5e6
    before = measure_memory(service)
    waits = []
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(service.ask, method, path, content)
        while not answer.done():
            began = time.monotonic()
            assert service.ask("GET", "/livez")[0] == 200
            waits.append(time.monotonic() - began)
    status, _, told = answer.result()
    assert status == (200 if path == "/events" else 422), told
    assert len(told) < 2000
    print(f"{method} {path}: {max(waits):.2f} s at most for others")
    assert max(waits) < 3
    assert measure_memory(service) - before < 500e6


@pytest.mark.parametrize(
    "start", [b"GET /livez HTTP/1.1\r\n", b"GET /livez HTTP/1.1\r\nx: ", b"GET /"]
)
def test_a_head_without_end_is_refused(service: Service, start: bytes) -> None:
    more = b"x" * (1 << 16) if start[-1:] in b" /" else b"x:y\r\n" * (1 << 13)
    before = measure_memory(service)
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", service.port), timeout=10) as client:
        client.sendall(start)
        with suppress(OSError):
            while time.monotonic() - began < 10:
                client.sendall(more)
    assert time.monotonic() - began < 5
    assert measure_memory(service) - before < 100e6
    assert service.ask("GET", "/livez")[0] == 200


def test_collected_events_are_kept_once_and_predicted_from(service: Service) -> None:
    request = make_request(2)
    events = [
        {"user_id": user["user_id"], **event}
        for user in request["users"]
        for event in user["events"]
    ]
    bad = [{"user_id": "u0"}, events[0] | {"price": "free"}, events[0] | {"user_id": "a\0"}]
    status, first = service.post("/events", {"events": [*events, *bad]})
    assert status == 200, first
    assert (first["accepted"], first["duplicates"], first["rejected"]) == (len(events), 0, 3)
    assert [r["field"] for r in first["results"][-3:]] == ["event_type", "price", "user_id"]
    status, again = service.post("/events", {"events": events})
    assert (again["accepted"], again["duplicates"]) == (0, len(events))
    assert [r["event_id"] for r in again["results"]] == [
        r["event_id"] for r in first["results"][: len(events)]
    ]
    asked = {"user_ids": ["u1", "nobody", "u0"], "now": NOW.isoformat()}
    status, stored = service.post("/users/predict", asked)
    assert status == 200, stored
    _, direct = service.predict(request)
    by_user = {p["user_id"]: p for p in direct["predictions"]}
    assert [p["user_id"] for p in stored["predictions"]] == ["u1", "u0"]
    for prediction in stored["predictions"]:
        for name, value in by_user[prediction["user_id"]]["probabilities"].items():
            assert prediction["probabilities"][name] == pytest.approx(value, abs=1e-5)
    count = len(request["users"][0]["events"])
    status, erased = service.post("/users/erase", {"user_id": "u0"})
    assert (status, erased["events"]) == (200, count)
    _, stored = service.post("/users/predict", asked)
    assert [p["user_id"] for p in stored["predictions"]] == ["u1"]


def test_one_shopper_is_read_told_of_and_erased_by_address(service: Service) -> None:
    user = "a/b ü?#%2F"
    address = f"/users/{quote(user, safe='')}"
    asked = f"now={quote(NOW.isoformat())}"
    events = make_request(1)["users"][0]["events"]
    service.post("/events", {"events": [{"user_id": user, **event} for event in events]})
    profile = {"age": 33.0, "gender": "f", "region": "r", "signup_ts": "2024-01-01T00:00:00Z"}
    content = json.dumps(profile).encode()
    status, _, body = service.ask("PUT", address, content)
    assert (status, json.loads(body)) == (200, {"user_id": user, "profile": profile})

    person = {"user_id": user, "profile": profile, "events": events}
    body_asked = {"users": [person], "now": NOW.isoformat(), "next_items": 3}
    _, direct = service.predict(body_asked)
    status, _, body = service.ask("GET", f"{address}/prediction?next_items=3&{asked}")
    assert status == 200, body
    told = json.loads(body)
    assert told["model"] == direct["model"]
    for name, value in direct["predictions"][0]["probabilities"].items():
        assert told["probabilities"][name] == pytest.approx(value, abs=1e-5)
    status, _, body = service.ask("GET", f"{address}/next-items?count=3&{asked}")
    items = json.loads(body)
    assert (status, items["next_items"]) == (200, told["next_items"])
    assert items["next_purchase"] == told["next_purchase"]

    status, _, body = service.ask("GET", f"{address}/explanation?target=purchase_14d&{asked}")
    explained = json.loads(body)
    assert status == 200, body
    stored = {"user_id": user, "target": "purchase_14d", "now": NOW.isoformat()}
    assert service.post("/explain", stored) == (200, explained)
    direct_asked = {"user": person, "target": "purchase_14d", "now": NOW.isoformat()}
    assert service.post("/explain", direct_asked)[1]["end"] == pytest.approx(explained["end"])

    status, _, body = service.ask("DELETE", address)
    erased = {"user_id": user, "events": len(events), "profile": True, "exported": 0}
    assert (status, json.loads(body)) == (200, erased)
    for part in ("prediction", "next-items", "explanation?target=purchase_14d"):
        status, _, body = service.ask("GET", f"{address}/{part}")
        assert (status, json.loads(body)["error"]["code"]) == (404, "not_found")
    assert user not in service.log.read_text()
    assert user.encode() not in service.ask("GET", "/metrics")[2]


@pytest.mark.parametrize(
    ("method", "path", "status", "field"),
    [
        ("GET", "/users/a/prediction?next_items=-1", 422, "query.next_items"),
        ("GET", "/users/a/prediction?colour=red", 422, "query.colour"),
        ("GET", "/users/a/prediction?now=yesterday", 422, "query.now"),
        ("GET", "/users/a/explanation", 422, "query.target"),
        ("GET", f"/users/{'a' * 257}/prediction", 422, "path.user_id"),
        ("GET", "/users/a%00b/prediction", 422, "path.user_id"),
        ("GET", "/users//prediction", 422, "path.user_id"),
        ("GET", "/users/%FF/prediction", 400, None),
        ("DELETE", "/users/%FF", 400, None),
        # The framework takes it for "a".
        ("DELETE", "/users/a%0A", 400, None),
        ("PUT", "/users/a%0A", 400, None),
        ("DELETE", "/users/a%20", 422, "path.user_id"),
        ("GET", "/users/a", 405, None),
        ("POST", "/users/a/prediction", 405, None),
    ],
)
def test_a_wrong_address_is_told(
    service: Service, method: str, path: str, status: int, field: str | None
) -> None:
    found, _, body = service.ask(method, path)
    assert found == status, body
    assert json.loads(body)["error"]["field"] == field


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b'{"age": "3"}', 422, "age"),
        (b'{"signup_ts": 12}', 422, "signup_ts"),
        (b'{"shoe": 41}', 422, "shoe"),
        (b'{"age":', 400, None),
        (b" " * (MAX_BODY_BYTES + 1), 413, None),
    ],
)
def test_a_wrong_profile_is_refused(
    service: Service, body: bytes, status: int, field: str | None
) -> None:
    found, _, answer = service.ask("PUT", "/users/zoe", body)
    assert (found, json.loads(answer)["error"]["field"]) == (status, field)


def test_an_explanation_adds_up(service: Service) -> None:
    user = make_request(1)["users"][0]
    for target in ("purchase_14d", "churn_14d"):
        asked = {"user": user, "target": target, "now": NOW.isoformat()}
        status, answer = service.post("/explain", asked)
        assert status == 200, answer
        assert 0 < len(answer["events"]) <= 20
        effects = [abs(event["effect"]) for event in answer["events"]]
        assert effects == sorted(effects, reverse=True)
        assert {e["ts"] for e in answer["events"]} <= {
            datetime.fromisoformat(e["ts"]).isoformat().replace("+00:00", "Z")
            for e in user["events"]
        }
    for target in ("spend_14d", "purchase_99d"):
        asked = {"user": user, "target": target, "now": NOW.isoformat()}
        status, answer = service.post("/explain", asked)
        assert status == 400
        assert target in json.dumps(answer)


def test_health_metrics_and_description(service: Service) -> None:
    assert service.ask("GET", "/livez")[0] == 200
    assert service.ask("GET", "/readyz")[0] == 200
    service.predict(make_request(1))
    status, _, metrics = service.ask("GET", "/metrics")
    assert status == 200
    assert b'forecart_request_seconds_count{route="/predict",status="200"}' in metrics
    assert b"forecart_batch_users_count" in metrics
    assert b'forecart_probability_count{target="purchase_14d"}' in metrics
    digest = service.predict(make_request(1))[1]["model"]
    assert f'forecart_model_info{{digest="{digest}"}} 1.0'.encode() in metrics
    status, _, description = service.ask("GET", "/docs.json")
    assert status == 200
    document = json.loads(description)
    assert {"/predict", "/users/{user_id}", "/users/{user_id}/prediction"} <= set(document["paths"])
    assert "event_type" in document["components"]["schemas"]["Event"]["properties"]
    assert document["info"]["title"] == "Forecart"
    status, _, page = service.ask("GET", "/")
    assert status == 200
    assert digest.encode() in page
    assert b"http" not in page


def test_refused_requests_leave_no_personal_data_in_the_log(service: Service) -> None:
    service.predict(change("users.0.events.0.price", "secret-price-of-anna"))
    service.predict(change("users.0.events.0.ts", "2031-03-01T00:00:00Z"))
    log = service.log.read_text()
    assert "secret-price-of-anna" not in log
    assert "2031" not in log


def test_traces_reach_a_collector_without_ids(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A collector of traces, as small as can be: it keeps what is sent."""
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, content))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{collector.server_port}"
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with start(project / "models/gpt", tmp_path) as service:
            assert service.predict(make_request(1))[0] == 200
            assert service.ask("GET", "/users/secret-anna/prediction")[0] == 404
            deadline = time.monotonic() + 20
            while not any(b"/predict" in content for _, content in received):
                assert time.monotonic() < deadline, service.log.read_text()
                time.sleep(0.1)
        collector.shutdown()
    sent = b"".join(content for _, content in received)
    assert {path for path, _ in received} == {"/v1/traces"}
    assert b"forecart" in sent
    assert b"secret-anna" not in sent
    assert b"red shoes" not in sent


def test_a_store_that_hangs_keeps_no_prediction_and_no_end_waiting(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = make_request(1)
    event = {**VIEW, "user_id": "ann"}
    with run_silent_server() as port, ThreadPoolExecutor(60) as pool:
        monkeypatch.setenv("FORECART_STORE", f"postgresql://u:p@127.0.0.1:{port}/x")
        with start(project / "models/gpt", tmp_path) as service:
            assert service.predict(asked)[0] == 200
            stored = [
                *(pool.submit(service.ask, "GET", f"/users/u{i}/prediction") for i in range(50)),
                *(pool.submit(service.ask, "POST", "/events", {"events": [event]}) for _ in "12"),
            ]
            statuses = []
            while not all(answer.done() for answer in stored):
                statuses.append(service.predict(asked)[0])
                time.sleep(0.1)
            pool.submit(service.ask, "GET", "/users/ann/prediction")
            time.sleep(0.5)
            began = time.monotonic()
        ended = time.monotonic() - began
    assert len(statuses) > 10
    assert set(statuses) == {200}
    assert {answer.result()[0] for answer in stored} == {503}
    # The last request is answered before.
    assert ended < 20


def test_who_writes_into_sqlite_keeps_nobody_from_reading(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "store/events.db"
    monkeypatch.setenv("FORECART_STORE", f"sqlite:///{file}")
    events = [{**event, "user_id": "ann"} for event in make_request(1)["users"][0]["events"]]
    with ThreadPoolExecutor(12) as pool, start(project / "models/gpt", tmp_path) as service:
        assert service.post("/events", {"events": events})[1]["accepted"] == len(events)
        with closing(sqlite3.connect(file, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            waiting = [
                pool.submit(service.ask, "PUT", f"/users/u{i}", {"age": 4}) for i in range(12)
            ]
            time.sleep(0.5)
            began = time.monotonic()
            status, _, _ = service.ask("GET", "/users/ann/prediction")
            took = time.monotonic() - began
            assert not any(put.done() for put in waiting)
            other.execute("ROLLBACK")
            assert (status, took < 2) == (200, True), took
        assert {put.result()[0] for put in waiting} == {200}


def test_a_bento_by_itself_collects_nothing_into_its_own_folder(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run makes that folder anew, and what was acknowledged would be gone."""
    monkeypatch.delenv("FORECART_STORE", raising=False)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    bento = tmp_path / "bento"
    shutil.copytree(project / "build/bento", bento)
    before = digest_directory(bento)
    event = {**VIEW, "user_id": "ann"}
    calls = [
        ("POST", "/events", {"events": [event]}),
        ("POST", "/users/predict", {"user_ids": ["ann"]}),
        ("POST", "/explain", {"user_id": "ann", "target": "purchase_14d"}),
        ("GET", "/users/ann/prediction", None),
        ("PUT", "/users/ann", {"age": 41}),
        ("DELETE", "/users/ann", None),
    ]
    with start(bento, tmp_path, bare=True) as service:
        for method, path, body in calls:
            status, _, content = service.ask(method, path, body)
            assert status == 503, (path, content)
            assert "set FORECART_STORE" in json.loads(content)["error"]["message"]
        assert service.predict(make_request(1))[0] == 200
    assert "set FORECART_STORE" in service.log.read_text()
    assert digest_directory(bento) == before


def find_listeners(service: Service) -> list[tuple[str, int]]:
    """The addresses on which a server and all its children listen."""
    parent = psutil.Process(service.process.pid)
    return [
        (connection.laddr.ip, connection.laddr.port)
        for process in [parent, *parent.children(recursive=True)]
        for connection in process.net_connections("inet")
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    ]


@pytest.mark.parametrize("bare", [False, True])
def test_nothing_else_than_the_service_listens_on_the_network(
    project: Path, tmp_path: Path, bare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The supervisor runs what it is told, and every user of the machine reaches its ports.
    temporary = tmp_path / ("deep" * 25)
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary if bare else tmp_path))
    with start(project / "build/bento", tmp_path, bare=bare) as service:
        assert set(find_listeners(service)) == {("127.0.0.1", service.port)}
        parent = psutil.Process(service.process.pid)
        paths = [Path(c.laddr) for c in parent.net_connections("unix") if c.laddr]
        sockets = [path for path in paths if path.name in ("control", "events")]
        assert len(sockets) == 2, paths
        (folder,) = {path.parent for path in sockets}
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not folder.exists()


def test_a_port_in_use_is_told(service: Service, project: Path) -> None:
    from serving.run import serve

    with pytest.raises(UserError, match=f"port {service.port} on 127.0.0.1 is in use"):
        serve(project / "build/bento", port=service.port)


def test_a_model_is_served_by_the_projects_own_code(
    service: Service, project: Path, tmp_path: Path
) -> None:
    request = make_request(3)
    with start(project / "models/gpt", tmp_path) as other:
        assert other.predict(request) == service.predict(request)
    with pytest.raises(OSError, match="refused"):
        other.ask("GET", "/livez")


def test_hostile_requests_get_no_server_error(service: Service) -> None:
    """Requests drawn from the service's own description, and broken ones (schemathesis)."""
    done = subprocess.run(
        [
            *[str(Path(sys.executable).parent / "st"), "run"],
            f"http://127.0.0.1:{service.port}/docs.json",
            *["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"],
            *["--mode", "all", "--max-examples", "40", "--seed", "1", "--request-timeout", "20"],
            *["--include-path-regex", "^/(predict|events|explain|users)"],
            *["--suppress-health-check", "all", "--no-color"],
        ],
        cwd=service.log.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    status, answer = service.predict(make_request(1))
    assert status == 200, answer


def test_a_killed_service_loses_no_acknowledged_event(project: Path, tmp_path: Path) -> None:
    acknowledged: list[str] = []
    stop = threading.Event()

    def write(writer: int, service: Service) -> None:
        number = 0
        while not stop.is_set():
            ids = [f"{writer}-{number + i}" for i in range(20)]
            events = [{**VIEW, "user_id": f"w{writer}", "event_id": event_id} for event_id in ids]
            try:
                status, _ = service.post("/events", {"events": events})
            except (OSError, http.client.HTTPException, KeyError):
                time.sleep(0.05)
                continue  # sent again, as a client does that had no answer
            if status == 200:
                acknowledged.extend(ids)
                number += 20

    for _ in range(2):
        with start(project / "models/gpt", tmp_path, gone=True) as service:
            stop.clear()
            writers = [threading.Thread(target=write, args=(i, service)) for i in range(3)]
            for writer in writers:
                writer.start()
            time.sleep(1.5)
            for process in [*psutil.Process(service.process.pid).children(recursive=True)]:
                process.kill()
            service.process.kill()
            stop.set()
            for writer in writers:
                writer.join(60)
    assert len(acknowledged) > 100
    store = Store(f"sqlite:///{tmp_path / '.forecart/events.db'}")
    users = [f"w{i}" for i in range(3)]
    found = store.history(users, before=to_us(NOW), limit=10**6).values()
    kept = [event["event_id"] for events in found for event in events]
    assert len(kept) == len(set(kept))
    assert set(acknowledged) <= set(kept)


def test_shoppers_are_predicted_in_batches_and_not_without_end() -> None:
    shoppers: list[Any] = [(str(i), [{}] * 900, None) for i in range(5)]
    shoppers.append(("much", [{}] * 5000, None))
    batches = list(_split(shoppers))
    assert [shopper for batch in batches for shopper in batch] == shoppers
    assert [len(batch) for batch in batches] == [2, 2, 1, 1]


def test_more_events_than_a_body_holds_are_not_read_for_one_call(service: Service) -> None:
    events = make_request(1)["users"][0]["events"]
    day = datetime.fromisoformat(events[0]["ts"])
    ids = [f"much{i}" for i in range(34)]
    for user in ids:
        many = [
            events[0] | {"user_id": user, "ts": (day + timedelta(seconds=i)).isoformat()}
            for i in range(2000)
        ]
        for low in (0, 1000):
            status, _ = service.post("/events", {"events": many[low : low + 1000]})
            assert status == 200
    asked = {"user_ids": ids, "now": NOW.isoformat()}
    status, answer = service.post("/users/predict", asked)
    assert (status, answer["error"]["code"]) == (413, "too_large")
    status, answer = service.post("/users/predict", asked | {"user_ids": ids[:3]})
    assert [p["user_id"] for p in answer["predictions"]] == ids[:3]


def promote(root: Path, predictor: Predictor) -> str:
    """Put a model into a project's cache of champions and name it in champion.json."""
    partial = root / "partial"
    partial.mkdir(parents=True)
    predictor.save(partial)
    digest = digest_directory(partial)
    target = root / ".forecart/models" / digest.removeprefix("sha256:")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.rename(target)
    write_json(root / "champion.json", {"digest": digest, "version": 1, "verdict": None})
    return digest


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project, still without a champion, which services look at."""
    folder = tmp_path / "shop"
    monkeypatch.setenv("FORECART_CHAMPION", str(folder / "champion.json"))
    return folder


def test_a_new_champion_is_taken_without_dropping_a_request(
    project: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORECART_CHAMPION_SECONDS", "0.1")
    answers: list[tuple[int, str | None]] = []
    stop = threading.Event()

    def ask(service: Service) -> None:
        request = make_request(2)
        while not stop.is_set():
            try:
                status, answer = service.predict(request)
                answers.append((status, answer.get("model")))
            except (OSError, http.client.HTTPException):
                answers.append((0, None))

    def wait_for(text: str, service: Service) -> None:
        deadline = time.monotonic() + 30
        while text.encode() not in service.ask("GET", "/metrics")[2]:
            assert time.monotonic() < deadline, service.log.read_text()
            time.sleep(0.1)

    with start(project / "models/gpt", tmp_path) as service:
        askers = [threading.Thread(target=ask, args=(service,)) for _ in range(3)]
        for asker in askers:
            asker.start()
        try:
            time.sleep(0.5)
            new = promote(shop, make_predictor(seed=2))
            wait_for('forecart_model_swaps_total{outcome="taken"} 1.0', service)
            time.sleep(0.5)
            # A model whose files are not those that were promoted.
            tampered = shop / ".forecart/models" / ("0" * 64)
            tampered.mkdir()
            make_predictor(seed=3).save(tampered)
            write_json(
                shop / "champion.json",
                {"digest": f"sha256:{'0' * 64}", "version": 2, "verdict": None},
            )
            wait_for('forecart_model_swaps_total{outcome="refused"} 1.0', service)
            time.sleep(0.5)
        finally:
            stop.set()
            for asker in askers:
                asker.join(60)
        assert "the new model is refused" in service.log.read_text()
    old = digest_directory(project / "models/gpt")
    assert len(answers) > 20
    assert {status for status, _ in answers} == {200}
    models = [model for _, model in answers]
    assert models[0] == old
    assert models[-1] == new
    assert set(models) == {old, new}


def test_a_process_that_is_killed_comes_back_with_the_champion(
    project: Path, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not with the model that the service was started with, which was replaced since."""
    # Looked for so rarely that nothing but the start can take it.
    monkeypatch.setenv("FORECART_CHAMPION_SECONDS", "3600")
    with start(project / "models/gpt", tmp_path) as service:
        assert service.predict(make_request(1))[1]["model"] == digest_directory(
            project / "models/gpt"
        )
        new = promote(shop, make_predictor(seed=2))
        (worker,) = [
            child
            for child in psutil.Process(service.process.pid).children(recursive=True)
            if "_bentoml_impl.worker.service" in child.cmdline()
        ]
        worker.kill()
        worker.wait(10)
        found: tuple[int, Any] = (0, {})
        deadline = time.monotonic() + 60
        while found[0] != 200 and time.monotonic() < deadline:
            try:
                found = service.predict(make_request(1))
            except (OSError, http.client.HTTPException):
                time.sleep(0.2)
        assert found[1].get("model") == new, service.log.read_text()
        told = service.ask("GET", "/metrics")[2].decode()
        assert f'forecart_model_info{{digest="{new}"}} 1.0' in told
        assert told.count("forecart_model_info{") == 1


def test_a_bento_that_fails_its_golden_predictions_is_not_taken(
    project: Path, tmp_path: Path
) -> None:
    bento = tmp_path / "bento"
    shutil.copytree(project / "build/bento", bento)
    taken: list[str] = []

    def take(model: Path, digest: str | None) -> str:
        taken.append(load(model, digest=digest, check=True).digest)
        return taken[-1]

    registry = CollectorRegistry()
    watcher = Watcher(bento, current="another", take=take, metrics=Metrics(registry))
    golden = read_json(bento / "src/golden.json")
    broken = json.loads(json.dumps(golden))
    broken["expected"]["purchase_14d"][0] += 1e-3
    write_json(bento / "src/golden.json", broken)
    watcher.look()
    watcher.look()
    assert taken == []
    counts = [
        registry.get_sample_value("forecart_model_swaps_total", {"outcome": outcome})
        for outcome in ("taken", "refused")
    ]
    assert counts == [0.0, 1.0]
    write_json(bento / "src/golden.json", golden)
    watcher.look()
    assert taken == [digest_directory(project / "models/gpt")]


def test_a_champion_that_fails_its_golden_predictions_is_not_taken(
    project: Path, tmp_path: Path
) -> None:
    digest = digest_directory(project / "models/gpt")
    target = tmp_path / ".forecart/models" / digest.removeprefix("sha256:")
    shutil.copytree(project / "models/gpt", target)
    golden = read_json(project / "build/bento/src/golden.json")
    assert load(target, digest=digest, check=True).digest == digest
    golden["expected"]["purchase_14d"][0] += 1e-3
    write_json(target.with_name(f"{target.name}.golden.json"), golden)
    with pytest.raises(UserError, match="purchase_14d differs"):
        load(target, digest=digest, check=True)


def test_a_model_that_fails_its_golden_predictions_is_not_started(
    project: Path, tmp_path: Path
) -> None:
    bento = tmp_path / "bento"
    shutil.copytree(project / "build/bento", bento)
    golden = read_json(bento / "src/golden.json")
    golden["expected"]["purchase_14d"][0] += 1e-3
    write_json(bento / "src/golden.json", golden)
    told = "the model is refused"
    with pytest.raises(AssertionError, match=told), start(bento, tmp_path, refused=told):
        pass
    log = (tmp_path / "log").read_text()
    assert f"the model is refused: {bento}/src/model: purchase_14d differs" in log
    assert "Traceback" not in log


def test_a_process_is_replaced_though_a_bad_model_lies_in_its_models_folder(
    project: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(project / "models/gpt", model)

    async def run() -> None:
        engine = Engine(1)
        digest = await engine.start(model)
        try:
            make_predictor(seed=2).save(model)
            write_json(model.with_name("golden.json"), {"model": "another"})
            with pytest.raises(UserError, match=f"{model}: not the model"):
                await engine.start(model, check=True)
            (process,) = engine._serving
            process._process.kill()
            deadline = time.monotonic() + 60
            while process in engine._serving or not engine.ready:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            assert [other.digest for other in engine._serving] == [digest]
            assert engine._copy is not None
            kept = engine._copy.model
            assert kept.is_dir()
        finally:
            await engine.close()
        assert not kept.exists()

    asyncio.run(run())


def list_predictors(service: Service) -> list[psutil.Process]:
    """The processes of a server that predict."""
    children = psutil.Process(service.process.pid).children(recursive=True)
    return [child for child in children if "serving.predicting" in child.cmdline()]


def list_cores(service: Service) -> list[list[int]]:
    """The cores that each process that predicts may use."""
    return sorted(process.cpu_affinity() for process in list_predictors(service))


def test_processes_that_predict_are_replaced_when_they_die(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORECART_PREDICTORS", "2")
    request = make_request(2)
    with start(project / "models/gpt", tmp_path) as service:
        expected = service.predict(request)
        assert expected[0] == 200
        cores = list_cores(service)
        own = psutil.Process().cpu_affinity()
        assert cores == ([[core] for core in own] if len(own) == 2 else [own, own])
        stuck, _ = list_predictors(service)
        stuck.suspend()
        # They take turns: one of two calls waits in vain, and says so in time.
        statuses = [service.predict(request)[0] for _ in range(2)]
        assert sorted(statuses) == [200, 503]
        assert service.predict(request) == expected
        deadline = time.monotonic() + 60
        while stuck.is_running() or len(list_predictors(service)) < 2:
            assert time.monotonic() < deadline, service.log.read_text()
            time.sleep(0.1)
        for process in list_predictors(service):
            process.kill()
        # Nothing that predicts is left, which is said at once, to the platform too.
        deadline = time.monotonic() + 10
        while service.is_ready():
            assert time.monotonic() < deadline
        status, answer = service.predict(request)
        assert (status, answer["error"]["code"]) == (503, "unavailable")
        assert service.ask("GET", "/livez")[0] == 200
        # They come back without being asked for anything.
        deadline = time.monotonic() + 90
        while not service.is_ready():
            assert time.monotonic() < deadline, service.log.read_text()
            time.sleep(0.1)
        assert service.predict(request) == expected
        while len(list_cores(service)) < 2:
            assert time.monotonic() < deadline, service.log.read_text()
            time.sleep(0.1)
        assert list_cores(service) == cores


def test_a_core_is_given_only_where_every_core_has_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2})
    assert assign_cores(2) == [2, 5]
    assert assign_cores(1) == [None]
    assert assign_cores(3) == [None] * 3


@pytest.mark.parametrize("text", ["0", "two", "65"])
def test_a_wrong_number_of_processes_is_told(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORECART_PREDICTORS", text)
    with pytest.raises(UserError, match=f"FORECART_PREDICTORS: '{text}' is not a number"):
        find_count()
