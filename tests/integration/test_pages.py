"""The pages in a real browser, over the scores of a real project."""

from __future__ import annotations

import csv
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.welcome import render
from tests.integration.conftest import Project

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip

if not (shutil.which("chromium") and shutil.which("chromedriver")):
    pytest.skip("needs chromium and chromedriver: make system", allow_module_level=True)


@pytest.fixture(scope="module")
def project(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The finished project with everyone scored."""
    copy = finished.copy(tmp_path_factory.mktemp("pages") / "project")
    answer = copy.run("forecart", "score").stdout
    assert "shoppers scored" in answer
    return copy


@pytest.fixture(scope="module")
def address(project: Project) -> Iterator[str]:
    """`forecart pages` on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "pipelines.cli", "pages", "--port", port]
    log = (project.path / "pages.log").open("wb")
    process = subprocess.Popen(
        command, cwd=project.path, env=project.environment(), stdout=log, stderr=log
    )
    try:
        _wait(f"http://127.0.0.1:{port}/livez", process)
        second = project.run(*command, check=False)
        assert second.returncode == 2
        assert "is in use" in second.stderr
        assert "Traceback" not in second.stderr
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)
        log.close()
    assert "Traceback" not in (project.path / "pages.log").read_text()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        assert process.poll() is None
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"{url} does not answer")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # The driver is named, so that Selenium looks for none.
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    driver.execute_cdp_cmd(
        "Browser.setDownloadBehavior",
        {"behavior": "allow", "downloadPath": str(tmp_path), "eventsEnabled": False},
    )
    try:
        yield driver
        # Policy violations, script errors and missing files all end up here.
        assert driver.get_log("browser") == []
    finally:
        driver.quit()


def _number(browser: Any, name: str) -> float:
    return float(browser.find_element("id", name).text.replace(",", "").replace("\u2212", "-"))


def _number_in(browser: Any, name: str) -> float:
    return float(browser.find_element("id", name).get_attribute("value"))


def _slide(browser: Any, value: int) -> None:
    browser.execute_script(
        "const s = document.getElementById('share'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input', {bubbles: true}));",
        value,
    )


def _sum_heights(browser: Any, bars: str) -> float:
    found = browser.find_elements("css selector", f"#histogram {bars}")
    assert found
    return sum(float(bar.get_attribute("height")) for bar in found)


def test_the_slider_changes_the_numbers_and_the_download(
    browser: Any, address: str, tmp_path: Path
) -> None:
    browser.get(f"{address}/?scope=all")
    seen = []
    for share in (5, 40, 100):
        _slide(browser, share)
        contacted, hits = _number(browser, "contacted"), _number(browser, "hits")
        assert contacted == pytest.approx(hits + _number(browser, "misses"), abs=1)
        seen.append((contacted, hits, _sum_heights(browser, ".reached")))
    assert seen[0] < seen[1] < seen[2]
    assert seen[0][2] < seen[1][2]
    assert seen[2][2] == pytest.approx(_sum_heights(browser, ".bar:not(.reached)"), abs=0.2)
    assert browser.find_element("id", "profit").text == "\u2013"
    assert not browser.find_element("id", "best").is_displayed()
    browser.find_element("id", "cost").send_keys("1")
    browser.find_element("id", "margin").send_keys("0")
    assert _number(browser, "profit") < 0
    browser.find_element("id", "best").click()
    assert _number(browser, "contacted") == 0

    _slide(browser, 10)
    contacted = _number(browser, "contacted")
    browser.find_element("id", "download").click()
    for _ in range(100):
        files = [f for f in tmp_path.glob("*.csv") if not f.name.endswith(".crdownload")]
        if files:
            break
        time.sleep(0.1)
    assert [f.name for f in files] == ["purchase_14d-top10.csv"]
    with files[0].open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == contacted


def test_a_step_back_finds_the_numbers_of_what_was_entered(browser: Any, address: str) -> None:
    told = ("contacted", "hits", "misses", "profit", "lowest")
    browser.get(f"{address}/?scope=all&share=20")
    _slide(browser, 60)
    browser.find_element("id", "cost").send_keys("1")
    browser.find_element("id", "margin").send_keys("5")
    before = [browser.find_element("id", name).text for name in told]
    browser.find_element("link text", "Model").click()
    assert browser.find_element("tag name", "h1").text == "The model"
    browser.back()
    assert browser.find_element("id", "share").get_attribute("value") == "60"
    assert browser.find_element("id", "share-out").text == "60"
    assert [browser.find_element("id", name).text for name in told] == before
    assert "share=60" in browser.find_element("id", "download").get_attribute("href")


def test_links_take_along_what_was_entered(browser: Any, address: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get(f"{address}/?days=14&target=churn_14d&margin=3")
    _slide(browser, 35)
    browser.find_element("id", "cost").send_keys("0.5")
    for link in ("28 days", "age", "Show all", "Only active shoppers", "7 days"):
        browser.find_element("link text", link).click()
        assert "most likely to leave" in browser.find_element("id", "reach").text
        found = {n: _number_in(browser, n) for n in ("share", "cost", "margin")}
        assert found == {"share": 35, "cost": 0.5, "margin": 3}
    browser.find_element("id", "margin").send_keys(Keys.CONTROL, "a")
    browser.find_element("id", "margin").send_keys(Keys.DELETE)
    browser.find_element("css selector", ".card").click()
    assert "most likely to buy" in browser.find_element("id", "reach").text
    assert browser.find_element("id", "margin").get_attribute("value") == ""
    assert _number_in(browser, "cost") == 0.5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_fits_and_obeys_its_policy(
    browser: Any, address: str, width: int, theme: str
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": theme}]},
    )
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.get(f"{address}/shopper")
    first = browser.find_element("css selector", "td, tbody a").get_attribute("href")
    for url in (f"{address}/", f"{address}/shopper", first, f"{address}/model"):
        browser.get(url)
        assert browser.find_element("tag name", "h1").text
        wide = browser.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width, url
        background = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor"
        )
        assert (max(map(int, background[4:-1].split(","))) < 60) == (theme == "dark")


def _narrow(browser: Any) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )


def test_the_page_of_the_service_fits_on_a_phone(browser: Any, tmp_path: Path) -> None:
    _narrow(browser)
    page = tmp_path / "welcome.html"
    page.write_text(render("sha256:" + 64 * "8"), encoding="utf-8")
    browser.get(page.as_uri())
    assert browser.find_element("tag name", "code").text.startswith("sha256:8")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_names_leave_room_for_numbers_on_a_phone(
    browser: Any, address: str, project: Project
) -> None:
    _narrow(browser)
    report = (project.path / "reports/index.html").as_uri()
    for url in (f"{address}/", f"{address}/model", report):
        browser.get(url)
        shares = browser.execute_script(
            "return [...document.querySelectorAll('.scroll')].map(box => {"
            " const name = [...box.querySelectorAll('tr')].at(-1).firstElementChild;"
            " name.textContent = 'ensemble (champion, version 12) ' + 'x'.repeat(80);"
            " return name.offsetWidth / box.clientWidth; }).filter(share => share);"
        )
        assert shares, url
        assert max(shares) < 0.5, url


def test_wide_tables_are_reached_and_moved_with_the_keyboard(
    browser: Any, address: str, project: Project
) -> None:
    from selenium.webdriver.common.keys import Keys

    _narrow(browser)
    for url in (f"{address}/", f"{address}/model", (project.path / "reports/index.html").as_uri()):
        browser.get(url)
        body = browser.find_element("tag name", "body")
        for _ in range(60):
            body.send_keys(Keys.TAB)
            active = browser.switch_to.active_element
            if active.get_attribute("class") == "scroll":
                break
        assert active.get_attribute("role") == "region", url
        assert active.accessible_name, url
        active.send_keys(Keys.ARROW_RIGHT)
        for _ in range(50):
            if browser.execute_script("return arguments[0].scrollLeft", active):
                break
            time.sleep(0.1)
        assert browser.execute_script("return arguments[0].scrollLeft", active) > 0, url
        labels = [
            box.get_attribute("aria-label")
            for box in browser.find_elements("css selector", ".scroll[tabindex='0'][role=region]")
        ]
        assert len(labels) == len(browser.find_elements("class name", "scroll"))
        assert len(labels) == len(set(labels)), url


def test_a_shopper_is_explained(browser: Any, address: str) -> None:
    browser.get(f"{address}/shopper")
    browser.find_element("css selector", "tbody a").click()
    assert "What moved the prediction" in browser.page_source
    assert len(browser.find_elements("css selector", ".timeline li")) > 1
    assert browser.find_elements("css selector", ".reasons .up, .reasons .down")
    assert browser.find_elements("css selector", "path.curve")


def test_the_model_is_told(browser: Any, address: str) -> None:
    browser.get(f"{address}/model?target=purchase_14d")
    text = browser.find_element("tag name", "main").text
    for word in ("lightgbm", "ROC-AUC", "May the candidate serve?", "There is no champion yet"):
        assert word in text


def test_a_killed_scoring_goes_on(take_finished: Callable[[], Project]) -> None:
    project = take_finished()
    code = """
import os, signal, sys
from pathlib import Path
from pipelines import scoring

def die_at(real, left):
    def score_chunk(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return score_chunk

scoring.CHUNK_USERS = 40
scoring.score_chunk = die_at(scoring.score_chunk, [int(sys.argv[1])])
print(scoring.score(Path()))
"""
    killed = project.run(sys.executable, "-c", code, "4", check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (project.path / "data/scores").exists()
    again = project.run(sys.executable, "-c", code, "1000").stdout
    assert "(3 of " in again
    assert [f.name for f in (project.path / "data/.scores").iterdir()] == ["lock"]
