"""`forecart_train` under the real Airflow, through its REST API: trained, approved, promoted."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from pipelines.config import load_params
from tests.integration.conftest import Project, clone_project
from tests.integration.test_platform import free_port

DAG = "forecart_train"
WAITING = ("deferred", "awaiting_input")
FORM = {"users": 400, "days": 140, "epochs": 1, "require_approval": True}


@dataclass(frozen=True, kw_only=True)
class Airflow:
    """A running Airflow of a project."""

    project: Project
    address: str
    user: str
    password: str
    token: str

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.address}/api/v2/{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None

    def trigger(self, conf: dict[str, Any]) -> str:
        started = self.call("POST", f"dags/{DAG}/dagRuns", {"logical_date": None, "conf": conf})
        run_id: str = started["dag_run_id"]
        return run_id

    def states(self, run_id: str) -> dict[str, str | None]:
        found = self.call("GET", f"dags/{DAG}/dagRuns/{run_id}/taskInstances?limit=100")
        return {t["task_id"]: t["state"] for t in found["task_instances"]}

    def await_end(self, run_id: str, seconds: float = 300) -> str:
        deadline = time.monotonic() + seconds
        while True:
            state: str = self.call("GET", f"dags/{DAG}/dagRuns/{run_id}")["state"]
            if state in ("success", "failed"):
                return state
            assert time.monotonic() < deadline, str(self.states(run_id))
            time.sleep(1)

    def answer(self, run_id: str, option: str, seconds: float = 300) -> None:
        """Answer the approval of a run as a person does."""
        deadline = time.monotonic() + seconds
        path = f"dags/{DAG}/dagRuns/{run_id}/taskInstances/promotion.approve/-1/hitlDetails"
        while (states := self.states(run_id))["promotion.approve"] not in WAITING:
            assert time.monotonic() < deadline, str(states)
            assert states["promotion.outcome"] is None, str(states)
            time.sleep(1)
        self.call("PATCH", path, {"chosen_options": [option]})

    def workspaces(self) -> list[Path]:
        folders = (self.project.path / ".forecart/runs").iterdir()
        return sorted(folders, key=lambda path: (path / ".forecart/.ready").stat().st_mtime)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    project = clone_project(tmp_path_factory.mktemp("runs") / "project")
    # The gate rightly refuses a model of so few shoppers unless it is asked to guess.
    project.change({"gate": {"margin": 0.5, "max_ece": 0.5, "ece_tolerance": 0.5}})
    project.change({"evaluation": {"confidence": 0.6}})
    ports = {name: free_port() for name in ("airflow", "mlflow", "service")}
    with pytest.MonkeyPatch.context() as patch:
        for name, port in ports.items():
            patch.setenv(f"FORECART_{name.upper()}_PORT", str(port))
        try:
            shown = project.run("forecart", "up").stdout
            user, _, password = shown.split("login")[1].split("(", maxsplit=1)[0].partition("/")
            address = f"http://127.0.0.1:{ports['airflow']}"
            account = {"username": user.strip(), "password": password.strip()}
            request = urllib.request.Request(
                f"{address}/auth/token",
                data=json.dumps(account).encode(),
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                token = json.loads(answer.read())["access_token"]
            yield Airflow(
                project=project,
                address=address,
                user=account["username"],
                password=account["password"],
                token=token,
            )
        finally:
            project.run("forecart", "down")


def read_champion(project: Project) -> Any:
    return json.loads((project.path / "champion.json").read_text())


def count_trainings(project: Project) -> int:
    code = (
        "import mlflow; c = mlflow.MlflowClient('sqlite:///mlflow.db');"
        "print(len(c.search_runs([e.experiment_id for e in c.search_experiments()])))"
    )
    return int(project.run("python", "-c", code).stdout)


def test_a_run_is_trained_approved_and_promoted_and_a_second_runs_nothing_again(
    airflow: Airflow,
) -> None:
    project = airflow.project
    first = airflow.trigger(FORM)
    airflow.answer(first, "Approve")
    assert airflow.await_end(first) == "success", airflow.states(first)
    states = airflow.states(first)
    assert states["promotion.promoted"] == "success"
    assert states["promotion.rejected"] == states["promotion.refused"] == "skipped"

    champion = read_champion(project)
    assert champion["version"] == 1
    assert "champion" in project.run("forecart", "status").stdout
    (workspace,) = airflow.workspaces()
    params = load_params(workspace / "params.yaml")
    assert (params.ingest.simulator.users, params.train.epochs) == (400, 1)
    assert (workspace / "reports/index.html").exists()
    verdict = subprocess.run(
        ["git", "show", f"runs/{workspace.name}:reports/verdict.json"],
        cwd=project.path,
        capture_output=True,
        check=True,
    ).stdout
    assert json.loads(verdict)["candidate"] == champion["digest"]
    # The checkout is as it was, but for the champion.
    assert not (project.path / "data").exists()
    assert not (project.path / "dvc.lock").exists()

    # The champion is an input of the evaluation, so that only what follows it runs again.
    trainings = count_trainings(project)
    second = airflow.trigger(FORM)
    airflow.answer(second, "Reject")
    assert airflow.await_end(second) == "success", airflow.states(second)
    states = airflow.states(second)
    assert states["promotion.rejected"] == "success"
    assert states["promotion.promote"] == states["promotion.promoted"] == "skipped"
    assert read_champion(project) == champion
    assert count_trainings(project) == trainings

    # A link leads to the report beside the training run.
    link = airflow.call("GET", f"dags/{DAG}/dagRuns/{first}/taskInstances/commit/links")
    (address,) = link["extra_links"].values()
    assert re.search(r"/#/experiments/\d+/runs/\w{32}/artifacts/index.html$", address)


BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1600,1100",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromedriver: make system")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in (*BROWSER, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(str(shutil.which("chromedriver")))
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


def test_a_person_triggers_it_in_the_browser_and_sees_it_go_green(
    airflow: Airflow, browser: Any
) -> None:
    from selenium.common import exceptions
    from selenium.webdriver.support.ui import WebDriverWait

    # The page draws its parts anew while it loads.
    passing = (
        exceptions.NoSuchElementException,
        exceptions.StaleElementReferenceException,
        exceptions.ElementNotInteractableException,
    )
    wait = WebDriverWait(browser, 60, ignored_exceptions=passing)

    def click(selector: str) -> None:
        wait.until(lambda b: b.find_element("css selector", selector).click() is None)

    def fill(selector: str, text: str) -> None:
        wait.until(lambda b: b.find_element("css selector", selector).send_keys(text) is None)

    # The settings of the runs before: nothing is left to compute.
    trainings = count_trainings(airflow.project)
    champion = read_champion(airflow.project)
    browser.get(f"{airflow.address}/dags/{DAG}")
    fill("input:not([type=password])", airflow.user)
    fill("input[type=password]", airflow.password)
    click("button[type=submit]")
    click("[data-testid=trigger-dag-button]")
    for field in ("users", "days", "epochs"):
        fill(f"[name=element_{field}]", str(FORM[field]))
    # A field is taken over when it is left.
    click("[name=element_path]")
    click("[data-testid=trigger-dag-submit]")
    wait.until(lambda b: "/runs/" in b.current_url)
    run_id = unquote(browser.current_url.split("/runs/")[1].split("?")[0])
    click("[aria-label^='Show Graph']")
    assert airflow.await_end(run_id) == "success", airflow.states(run_id)
    for node in ("prepare", "data", "models", "judgement", "commit", "promotion"):
        badge = f"[data-testid=rf__node-{node}] [data-testid=state-badge]"
        wait.until(lambda b, of=badge: b.find_element("css selector", of).text == "success")
    if folder := os.environ.get("FORECART_SCREENSHOTS"):
        browser.save_screenshot(f"{folder}/airflow.png")

    assert airflow.states(run_id)["promotion.promoted"] == "success"
    assert read_champion(airflow.project) == champion
    assert count_trainings(airflow.project) == trainings
    log = airflow.call("GET", f"dags/{DAG}/dagRuns/{run_id}/taskInstances/evaluate/logs/1")
    assert "Running stage" not in json.dumps(log)
