"""The alerts ask for what the service tells, and the runbook's commands do what it says."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from serving import metrics
from serving.access import CALLS, USER, name_route
from serving.metrics import Metrics
from serving.store import Store

FOLDER = Path(__file__).resolve().parents[2] / "deploy"
ALERTS = FOLDER / "monitoring/alerts.yaml"
RULES: list[dict[str, Any]] = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
RUNBOOK = (FOLDER / "runbook.md").read_text()
PERSONAL = "shopper"


def list_samples() -> dict[str, set[str]]:
    """Return the labels of every sample that the service tells."""
    registry = CollectorRegistry()
    told = Metrics(registry)
    told.count_batch(1, {"purchase_14d": [0.5]})
    told.show_model("sha256:0")
    metrics.count_request("/predict", 200, 0.1)
    found: dict[str, set[str]] = {"up": set()}
    for family in [*registry.collect(), *metrics._REQUEST.collect()]:
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_alerts_ask_for_what_the_service_tells() -> None:
    samples = list_samples()
    for rule in RULES:
        asked = re.findall(r"\b(up|forecart_\w+)\{(.*?)\}(?=[\s)\[])", rule["expr"])
        assert asked, rule["alert"]
        assert len(asked) == len(re.findall(r"\bup\b|\bforecart_\w+", rule["expr"])), rule["alert"]
        for name, selector in asked:
            labels = set(re.findall(r"(\w+)=~?\"", selector))
            assert "job" in labels, rule["alert"]
            assert labels - {"job"} <= samples[name], rule["alert"]


def test_alerts_name_routes_that_are_counted() -> None:
    for rule in RULES:
        for routes in re.findall(r'route=~?"([^"]*)"', rule["expr"]):
            assert set(routes.split("|")) <= CALLS | {USER}, rule["alert"]
    # That of an erasure, which the alert means.
    assert name_route("DELETE", "/users/ada") == USER


def test_every_alert_says_what_is_to_be_done() -> None:
    told = re.findall(r"^\| (Forecart\w+) \|", RUNBOOK, re.M)
    assert told == [rule["alert"] for rule in RULES]
    for rule in RULES:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"]


def test_the_discovery_finds_the_pods() -> None:
    config = yaml.safe_load((FOLDER / "monitoring/prometheus.yaml").read_text())
    assert config["rule_files"] == [ALERTS.name]
    (scrape,) = config["scrape_configs"]
    keep = next(rule for rule in scrape["relabel_configs"] if rule.get("action") == "keep")
    deployment = yaml.safe_load((FOLDER / "kubernetes/deployment.yaml").read_text())
    pod = deployment["spec"]["template"]
    (port,) = pod["spec"]["containers"][0]["ports"]
    label = pod["metadata"]["labels"]["app.kubernetes.io/name"]
    assert keep["regex"] == f"{label};{port['name']}"
    assert f'job="{scrape["job_name"]}"' in ALERTS.read_text()


def make_event(number: int) -> dict[str, Any]:
    return {"event_id": f"e{number}", "user_id": PERSONAL, "ts": number, "event_type": "view"}


def test_a_backup_is_whole_and_is_restored_while_the_store_is_open(tmp_path: Path) -> None:
    back_up, restore = re.findall(r"^python3 -c .*backup.*$", RUNBOOK, re.M)
    file = tmp_path / "events.db"
    environment = os.environ | {"STORE": str(file)}

    def run(command: str) -> None:
        subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, check=True)

    store = Store(f"sqlite:///{file}")
    store.append([make_event(number) for number in range(200)])
    run(back_up)
    # More than the log holds before it is written back, so that the two files differ everywhere.
    for first in range(200, 20_200, 1000):
        store.append([make_event(number) for number in range(first, first + 1000)])
    run(restore)
    assert store.append([make_event(0), make_event(100_000)]) == [False, True]
    assert len(store.history([PERSONAL], before=10**9, limit=10**6)[PERSONAL]) == 201
    store.close()
    with sqlite3.connect(file) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    # And no other user may read it since.
    assert file.stat().st_mode & 0o777 == 0o600


def test_new_code_reaches_the_volume(tmp_path: Path) -> None:
    """The platform's checkout has settings and a champion of its own, which stay."""
    (pull,) = re.findall(r"git -C /project pull [^']*", RUNBOOK)
    source, project = tmp_path / "source", tmp_path / "project"

    def git(folder: Path, *arguments: str) -> None:
        author = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", str(folder), *author, *arguments], check=True)

    source.mkdir()
    git(source, "init", "-q")
    for name in ("code", "champion.json"):
        (source / name).write_text("old")
    git(source, "add", "-A")
    git(source, "commit", "-qm", "old")
    shutil.copytree(source, project)
    (project / "champion.json").write_text("promoted")
    git(project, "branch", "runs/one")
    (source / "code").write_text("new")
    git(source, "commit", "-qam", "new")
    command = pull.replace("/project", str(project)).replace("/source", str(source))
    subprocess.run(["sh", "-c", command], check=True, capture_output=True)
    assert (project / "code").read_text() == "new"
    assert (project / "champion.json").read_text() == "promoted"
