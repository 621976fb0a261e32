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
from pipelines.io import digest_directory
from tests.integration.conftest import Project, clone_project
from tests.integration.test_platform import free_port

DAG = "forecart_train"
WAITING = ("deferred", "awaiting_input")
FORM = {"users": 400, "days": 140, "epochs": 1}
LENIENT = {
    "margin": 1.0,
    "max_ece": 1.0,
    "ece_tolerance": 1.0,
    "slice_margin": 1.0,
    "max_drifted_share": 1.0,
}


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

    def await_end(self, run_id: str, seconds: float = 450) -> str:
        deadline = time.monotonic() + seconds
        while True:
            state: str = self.call("GET", f"dags/{DAG}/dagRuns/{run_id}")["state"]
            if state in ("success", "failed"):
                return state
            assert time.monotonic() < deadline, str(self.states(run_id))
            time.sleep(1)

    def answer(self, run_id: str, option: str, seconds: float = 450) -> None:
        """Answer the approval of a run as a person does."""
        deadline = time.monotonic() + seconds
        path = f"dags/{DAG}/dagRuns/{run_id}/taskInstances/promotion.approve/-1/hitlDetails"
        while (states := self.states(run_id))["promotion.approve"] not in WAITING:
            assert time.monotonic() < deadline, str(states)
            assert states["promotion.outcome"] is None, str(states)
            time.sleep(1)
        # What is answered before the scheduler has seen the process that asked end starts the
        # task again too early for Airflow, which then takes it for failed and asks again.
        log = self.project.path / ".forecart/logs/scheduler.log"
        end = f"TaskInstance Finished: dag_id={DAG}, task_id=promotion.approve, run_id={run_id},"
        while end not in log.read_text(errors="replace"):
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(1)
        self.call("PATCH", path, {"chosen_options": [option]})

    def tell_failures(self, run_id: str) -> str:
        """Return what became of tasks that did not succeed, and the ends of their logs."""
        states = {k: v for k, v in self.states(run_id).items() if v not in ("success", "skipped")}
        folder = self.project.path / ".forecart/airflow/logs"
        logs = [
            f"{path}:\n{path.read_text()[-3000:]}"
            for name in states
            for path in sorted(folder.rglob(f"run_id={run_id}/task_id={name}/*.log"))
        ]
        return "\n".join([str(states), *logs])

    def workspaces(self) -> list[Path]:
        folders = (self.project.path / ".forecart/runs").iterdir()
        return sorted(folders, key=lambda path: (path / ".forecart/.ready").stat().st_mtime)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    project = clone_project(tmp_path_factory.mktemp("runs") / "project")
    # The gate rightly refuses a model of so few shoppers unless it is asked to guess.
    project.change({"gate": LENIENT, "evaluation": {"confidence": 0.51}})
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


def test_a_run_is_trained_and_shown_and_a_rejected_model_is_not_promoted(airflow: Airflow) -> None:
    project = airflow.project
    champion = read_champion(project)
    run_id = airflow.trigger({**FORM, "require_approval": True})
    airflow.answer(run_id, "Reject")
    assert airflow.await_end(run_id) == "success", airflow.tell_failures(run_id)
    states = airflow.states(run_id)
    assert states["promotion.rejected"] == "success"
    assert states["promotion.promote"] == states["promotion.promoted"] == "skipped"
    assert read_champion(project) == champion

    (workspace,) = airflow.workspaces()
    params = load_params(workspace / "params.yaml")
    assert (params.ingest.simulator.users, params.train.epochs) == (400, 1)
    assert (workspace / "reports/index.html").exists()
    # The checkout is as it was.
    assert not (project.path / "data").exists()
    assert not (project.path / "dvc.lock").exists()
    # A link leads to the report beside the training run.
    link = airflow.call("GET", f"dags/{DAG}/dagRuns/{run_id}/taskInstances/commit/links")
    (address,) = link["extra_links"].values()
    assert re.search(r"/#/experiments/\d+/runs/\w{32}/artifacts/index.html$", address)


BROWSER = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--window-size=1600,1100",
)  # fmt: skip


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A browser; None where none is installed."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        yield None
        return
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


class Page:
    """A browser's view of the DAG; every act waits until the page has drawn what it needs."""

    def __init__(self, browser: Any, airflow: Airflow) -> None:
        from selenium.common import exceptions
        from selenium.webdriver.support.ui import WebDriverWait

        # The page draws its parts anew while it loads.
        passing = (
            exceptions.NoSuchElementException,
            exceptions.StaleElementReferenceException,
            exceptions.ElementNotInteractableException,
        )
        self.browser = browser
        self.airflow = airflow
        self.wait = WebDriverWait(browser, 60, ignored_exceptions=passing)

    def click(self, selector: str) -> None:
        self.wait.until(lambda b: b.find_element("css selector", selector).click() is None)

    def fill(self, selector: str, text: str) -> None:
        self.wait.until(lambda b: b.find_element("css selector", selector).send_keys(text) is None)

    def trigger(self, form: dict[str, Any]) -> str:
        """Log in and trigger the DAG from its form."""
        self.browser.get(f"{self.airflow.address}/dags/{DAG}")
        self.fill("input:not([type=password])", self.airflow.user)
        self.fill("input[type=password]", self.airflow.password)
        self.click("button[type=submit]")
        self.click("[data-testid=trigger-dag-button]")
        for field, value in form.items():
            self.fill(f"[name=element_{field}]", str(value))
        # A field is taken over when it is left.
        self.click("[name=element_path]")
        self.click("[data-testid=trigger-dag-submit]")
        self.wait.until(lambda b: "/runs/" in b.current_url)
        run_id = unquote(self.browser.current_url.split("/runs/")[1].split("?")[0])
        self.click("[aria-label^='Show Graph']")
        return run_id

    def await_green(self) -> None:
        for node in ("prepare", "data", "models", "judgement", "commit", "promotion"):
            badge = f"[data-testid=rf__node-{node}] [data-testid=state-badge]"
            self.wait.until(
                lambda b, of=badge: b.find_element("css selector", of).text == "success"
            )
        if folder := os.environ.get("FORECART_SCREENSHOTS"):
            self.browser.save_screenshot(f"{folder}/airflow.png")


def test_a_second_run_computes_nothing_again_and_its_model_is_promoted(
    airflow: Airflow, browser: Any
) -> None:
    project = airflow.project
    trainings = count_trainings(project)
    # From the form where there is a browser, else as a program does.
    page = Page(browser, airflow) if browser is not None else None
    run_id = page.trigger(FORM) if page is not None else airflow.trigger(FORM)
    assert airflow.await_end(run_id) == "success", airflow.states(run_id)
    if page is not None:
        page.await_green()
    states = airflow.states(run_id)
    assert states["promotion.promoted"] == "success"
    assert states["promotion.rejected"] == states["promotion.refused"] == "skipped"

    workspace = airflow.workspaces()[-1]
    champion = read_champion(project)
    assert champion["version"] == 1
    fetched = project.path / ".forecart/models" / champion["digest"].removeprefix("sha256:")
    assert digest_directory(fetched) == champion["digest"]
    assert "champion" in project.run("forecart", "status").stdout
    verdict = subprocess.run(
        ["git", "show", f"runs/{workspace.name}:reports/verdict.json"],
        cwd=project.path,
        capture_output=True,
        check=True,
    ).stdout
    assert json.loads(verdict)["candidate"] == champion["digest"]
    assert trainings == count_trainings(project) == 1
    for stage in ("ingest", "train", "evaluate", "gate", "package"):
        log = airflow.call("GET", f"dags/{DAG}/dagRuns/{run_id}/taskInstances/{stage}/logs/1")
        assert "Running stage" not in json.dumps(log)
