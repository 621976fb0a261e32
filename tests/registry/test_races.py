"""Two promoters at once: real processes on one real registry."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.io import digest_directory, write_json
from pipelines.registry import lock
from pipelines.registry.champion import DIGEST_TAG
from pipelines.registry.connection import connect
from pipelines.registry.lock import hold_lock
from pipelines.registry.tracking import track

DATA = "sha256:" + "d" * 64
CONNECT = (
    "from pathlib import Path; from pipelines.registry.connection import connect; "
    "import mlflow.store.tracking.sqlalchemy_store; "
)
PROMOTE = "from pathlib import Path; from pipelines.registry import promotion; "


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with two models that runs have logged; each has a checkout and a verdict."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
        for name in ("one", "two"):
            checkout = root / name
            folder = checkout / "models/gpt"
            folder.mkdir(parents=True)
            (folder / "model.safetensors").write_text(name)
            write_json(folder / "config.json", {"targets": [{"name": "purchase_14d"}]})
            digest = digest_directory(folder)
            with track(checkout, params={}, data_digest=DATA, name="gpt") as run:
                run.log_model(folder, digest, ["purchase_14d"])
            (checkout / "params.yaml").write_text("{}\n")
            nobody = {"digest": None, "version": None, "verdict": None}
            write_json(checkout / "champion.json", nobody)
            verdict = {
                "passed": True,
                "checks": [{"name": "validation", "passed": True, "why": "it is so"}],
                "candidate": digest,
                "champion": None,
                "data": DATA,
            }
            write_json(checkout / "reports/verdict.json", verdict)
    return root


@pytest.fixture
def shared(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(store, tmp_path / "shared")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared/mlflow.db'}")
    return tmp_path / "shared"


def run(code: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def champion(shared: Path) -> str:
    version = connect(shared).get_model_version_by_alias("forecart", "champion")
    return str(version.tags[DIGEST_TAG])


@pytest.mark.integration
def test_of_two_promoters_one_wins_and_the_other_says_so(shared: Path) -> None:
    # Both wait for one instant, so that they meet.
    start = time.time() + 6
    code = (
        f"{PROMOTE}import time, mlflow; "
        f"time.sleep(max(0, {start} - time.time())); print(promotion.promote(Path()))"
    )
    both = {name: run(code, shared / name) for name in ("one", "two")}
    told = {name: process.communicate(timeout=120) for name, process in both.items()}
    winners = [name for name, process in both.items() if process.returncode == 0]
    assert len(winners) == 1, told
    (loser,) = set(both) - set(winners)
    assert "serves by now" in told[loser][1]
    assert champion(shared) == digest_directory(shared / winners[0] / "models/gpt")


@pytest.mark.integration
def test_of_several_first_commands_each_finds_a_whole_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after one that was killed while it made the registry."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    killed = run(f"{CONNECT}connect(Path())", tmp_path)
    until = time.monotonic() + 120
    while not any(file.stat().st_size for file in tmp_path.rglob("mlflow.db")):
        assert time.monotonic() < until
        time.sleep(0.01)
    killed.kill()
    killed.communicate()
    start = time.time() + 8
    code = f"{CONNECT}import time; time.sleep(max(0, {start} - time.time())); connect(Path())"
    for process in [run(code, tmp_path) for _ in range(3)]:
        assert process.communicate(timeout=120)[1].count("Error") == 0
        assert process.returncode == 0
    assert [found.name for found in connect(tmp_path).search_experiments()] == ["Default"]
    assert {file.name for file in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}


def test_behind_a_server_the_promoters_of_all_worktrees_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
    for arguments in (
        ("init", "--quiet"),
        (*identity, "commit", "--quiet", "--allow-empty", "--message=start"),
        ("worktree", "add", "--quiet", "--detach", str(run)),
    ):
        subprocess.run(["git", *arguments], cwd=home, check=True)
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.3)
    uri, alone = "http://127.0.0.1:5000", tmp_path / "alone"
    alone.mkdir()
    for first, second in ((home, run), (run, home), (alone, alone)):
        with (
            hold_lock(uri, "forecart", first),
            pytest.raises(UserError, match="somebody else"),
            hold_lock(uri, "forecart", second),
        ):
            pass
        with hold_lock(uri, "forecart", first), hold_lock(uri, "another", second):
            pass


def test_a_link_to_a_database_has_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.3)
    (tmp_path / "link.db").symlink_to(tmp_path / "mlflow.db")
    (tmp_path / "folder").symlink_to(tmp_path)
    file = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for other in ("link.db", "folder/mlflow.db"):
        with (
            hold_lock(file, "forecart", tmp_path),
            pytest.raises(UserError, match="somebody else"),
            hold_lock(f"sqlite:///{tmp_path / other}", "forecart", tmp_path),
        ):
            pass


def test_a_lock_ends_with_its_holder(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    code = (
        "import time; from pathlib import Path; from pipelines.registry.lock import hold_lock\n"
        f"with hold_lock({uri!r}, 'forecart', Path()):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = run(code, tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    monkeypatch.setattr(lock, "_WAIT_SECONDS", 0.3)
    with pytest.raises(UserError, match="somebody else"), hold_lock(uri, "forecart", tmp_path):
        pass
    with hold_lock(uri, "another", tmp_path):
        pass
    holder.kill()
    holder.communicate()
    with hold_lock(uri, "forecart", tmp_path):
        pass
