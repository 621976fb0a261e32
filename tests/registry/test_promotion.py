"""Promotion on a real MLflow registry (SQLite) in a folder of its own."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy.exc import OperationalError

from pipelines.errors import UserError
from pipelines.io import digest_directory, digest_file, read_json, write_json
from pipelines.registry import connection, promotion
from pipelines.registry.champion import (
    CACHE,
    DIGEST_TAG,
    MODEL,
    Champion,
    fetch_champion,
    locate_fetched,
    locate_golden,
    write_champion,
)
from pipelines.registry.connection import connect
from pipelines.registry.promotion import HISTORY_TAG
from pipelines.registry.tracking import EXPERIMENT, PASSED_TAG, attach, track

pytestmark = pytest.mark.integration

DATA = "sha256:" + "d" * 64


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry without models; making its tables takes seconds, so tests copy it."""
    root = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect(root).search_experiments()
    return root / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "params.yaml").write_text("{}\n")
    write_json(tmp_path / "champion.json", {"digest": None, "version": None, "verdict": None})
    return tmp_path


def train(root: Path, weights: str, *, log: bool = True) -> str:
    """Put a model into models/gpt and log it as the train stage does; return its digest."""
    folder = root / "models/gpt"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_text(weights)
    write_json(folder / "config.json", {"targets": [{"name": "purchase_14d"}]})
    digest = digest_directory(folder)
    if log:
        with track(root, params={}, data_digest=DATA, name="gpt") as run:
            run.log_model(folder, digest, ["purchase_14d"])
    return digest


def judge(
    root: Path, candidate: str, *, passed: bool = True, champion: str | None = None
) -> dict[str, Any]:
    """Write the verdict of the gate stage."""
    check = {"name": "validation", "passed": passed, "value": 1, "limit": 1, "why": "it is so"}
    verdict = {
        "passed": passed,
        "checks": [check],
        "candidate": candidate,
        "champion": champion,
        "data": DATA,
    }
    write_json(root / "reports/verdict.json", verdict)
    return verdict


def install(root: Path, weights: str, champion: str | None = None) -> str:
    digest = train(root, weights)
    judge(root, digest, champion=champion)
    promotion.promote(root)
    return digest


def alias(root: Path, name: str) -> int:
    return int(connect(root).get_model_version_by_alias("forecart", name).version)


def champion_of(root: Path) -> tuple[str | None, int | None]:
    content = read_json(root / "champion.json")
    return content["digest"], content["version"]


def test_registering_twice_gives_one_version(root: Path) -> None:
    digest = train(root, "one")
    assert "version 1 registered" in promotion.register(root)
    assert "version 1 was registered already" in promotion.register(root)
    versions = connect(root).search_model_versions("name = 'forecart'")
    assert [v.tags[DIGEST_TAG] for v in versions] == [digest]
    assert alias(root, "candidate") == 1


def test_a_model_trained_again_with_equal_bytes_is_the_same_version(root: Path) -> None:
    train(root, "one")
    promotion.register(root)
    train(root, "two")
    promotion.register(root)
    assert alias(root, "candidate") == 2
    train(root, "one")
    promotion.register(root)
    assert alias(root, "candidate") == 1
    assert len(connect(root).search_model_versions("name = 'forecart'")) == 2


def test_a_model_that_no_run_of_this_registry_trained_is_logged(root: Path) -> None:
    digest = train(root, "one", log=False)
    (root / "data/features").mkdir(parents=True)
    (root / "data/features/cuts.json").write_text("{}")
    judge(root, digest)
    promotion.promote(root)
    assert digest_directory(fetch_champion(root) or Path()) == digest


def test_a_model_with_other_files_is_not_registered(root: Path) -> None:
    train(root, "one", log=False)
    (root / "models/gpt/model.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"model\.pkl: a model holds"):
        promotion.register(root)


def test_promote_needs_a_verdict(root: Path) -> None:
    train(root, "one")
    with pytest.raises(UserError, match=r"verdict\.json: no such file"):
        promotion.promote(root)
    assert champion_of(root) == (None, None)


def test_promote_needs_a_passing_verdict(root: Path) -> None:
    judge(root, train(root, "one"), passed=False)
    with pytest.raises(UserError, match="did not pass: it is so"):
        promotion.promote(root)
    assert champion_of(root) == (None, None)


def test_a_verdict_that_does_not_say_why_it_did_not_pass_promotes_nothing(root: Path) -> None:
    verdict = judge(root, train(root, "one", log=False))
    write_json(root / "reports/verdict.json", verdict | {"passed": False, "checks": []})
    with pytest.raises(UserError, match="did not pass: no check is recorded"):
        promotion.promote(root)
    assert champion_of(root) == (None, None)


def test_promote_needs_a_verdict_about_that_very_model(root: Path) -> None:
    judge(root, train(root, "one"))
    train(root, "two")
    with pytest.raises(UserError, match="about model"):
        promotion.promote(root)
    assert champion_of(root) == (None, None)


def test_promote_needs_a_verdict_against_the_champion_that_serves(root: Path) -> None:
    one = install(root, "one")
    judge(root, train(root, "two"), champion=None)
    with pytest.raises(UserError, match="compares with champion -"):
        promotion.promote(root)
    assert champion_of(root) == (one, 1)


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("changed", ["models/gpt", "reports/verdict.json", "dvc.lock"])
def test_what_changes_while_it_is_promoted_does_not_become_champion(
    root: Path, changed: str, logged: bool
) -> None:
    """As `dvc checkout` or a run of the graph changes them, once the verdict was read."""
    one = install(root, "one")
    two = train(root, "two", log=logged)
    (root / "data/features").mkdir(parents=True)
    (root / "data/features/cuts.json").write_text("{}")
    judge(root, two, champion=one)
    read = promotion.read_verdict

    def read_and_change(path: Path) -> dict[str, Any]:
        verdict = read(path)
        if changed == "models/gpt":
            train(root, "three", log=logged)
        elif changed == "dvc.lock":
            (root / changed).write_text("schema: '2.0'\n")
        else:
            judge(root, two, champion=one, passed=False)
        return verdict

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(promotion, "read_verdict", read_and_change)
        with pytest.raises(UserError, match=rf"^{root / changed}: changed meanwhile; try again$"):
            promotion.promote(root)
    assert alias(root, "champion") == 1
    assert champion_of(root) == (one, 1)
    train(root, "two", log=False)
    judge(root, two, champion=one)
    promotion.promote(root)
    assert champion_of(root) == (two, 2)
    assert digest_directory(fetch_champion(root) or Path()) == two
    told = read_json(root / "champion.json")["verdict"]
    assert told == digest_file(root / "reports/verdict.json")


def test_promoting_sets_alias_and_file_and_does_nothing_twice(root: Path) -> None:
    digest = install(root, "one")
    assert alias(root, "champion") == 1
    assert champion_of(root) == (digest, 1)
    assert read_json(root / "champion.json")["verdict"].startswith("sha256:")
    before = (root / "champion.json").stat().st_mtime_ns
    # The gate runs again after a promotion; even without a verdict the champion stays.
    (root / "reports/verdict.json").unlink()
    assert "champion already" in promotion.promote(root)
    assert (root / "champion.json").stat().st_mtime_ns == before


def test_rollback_walks_back_through_the_champions(root: Path) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    three = install(root, "three", champion=two)
    assert champion_of(root) == (three, 3)
    assert "version 2 is champion again" in promotion.rollback(root)
    assert champion_of(root) == (two, 2)
    promotion.rollback(root)
    assert champion_of(root) == (one, 1)
    with pytest.raises(UserError, match="first champion"):
        promotion.rollback(root)
    assert champion_of(root) == (one, 1)


def test_a_champion_of_old_can_be_promoted_again_and_rolled_back(root: Path) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    install(root, "one", champion=two)
    assert champion_of(root) == (one, 1)
    promotion.rollback(root)
    assert champion_of(root) == (two, 2)
    promotion.rollback(root)
    assert champion_of(root) == (one, 1)
    with pytest.raises(UserError, match="first champion"):
        promotion.rollback(root)


def test_of_a_long_history_the_newest_champions_are_kept(root: Path) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    registry = connect(root)
    registry.set_registered_model_tag("forecart", HISTORY_TAG, json.dumps([2, 1] * 70 + [2]))
    install(root, "three", champion=two)
    history = json.loads(registry.get_registered_model("forecart").tags[HISTORY_TAG])
    assert history == [2, 1] * 49 + [2, 3]
    promotion.rollback(root)
    assert champion_of(root) == (two, 2)


def test_rollback_needs_a_champion(root: Path) -> None:
    with pytest.raises(UserError, match="no champion to roll back"):
        promotion.rollback(root)


def lose_files(root: Path, version: int) -> None:
    """Remove the files of a version from the registry, and what was fetched of them."""
    registry = connect(root)
    uri = registry.get_model_version_download_uri("forecart", str(version))
    shutil.rmtree(local_file_uri_to_path(uri))
    digest = registry.get_model_version("forecart", str(version)).tags[DIGEST_TAG]
    shutil.rmtree(locate_fetched(root, digest), ignore_errors=True)


def test_a_promotion_gives_the_registry_the_files_that_it_has_lost(root: Path) -> None:
    digest = train(root, "one")
    judge(root, digest)
    promotion.register(root)
    lose_files(root, 1)
    promotion.promote(root)
    forget_fetched(root)
    assert digest_directory(fetch_champion(root) or Path()) == digest
    shutil.copytree(locate_fetched(root, digest), root / MODEL)
    lose_files(root, 1)
    assert "champion already" in promotion.promote(root)
    assert digest_directory(fetch_champion(root) or Path()) == digest


def test_what_cannot_be_had_is_not_promoted(root: Path) -> None:
    one = install(root, "one")
    judge(root, train(root, "two"), champion=one)
    promotion.register(root)
    uri = connect(root).get_model_version_download_uri("forecart", "2")
    (Path(local_file_uri_to_path(uri)) / "model/model.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"model\.pkl: a model holds"):
        promotion.promote(root)
    assert alias(root, "champion") == 1
    assert champion_of(root) == (one, 1)


def test_what_cannot_be_had_is_not_returned_to(root: Path) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    lose_files(root, 1)
    with pytest.raises(UserError, match="cannot give the files of version 1"):
        promotion.rollback(root)
    assert alias(root, "champion") == 2
    assert champion_of(root) == (two, 2)
    connect(root).delete_model_version("forecart", "1")
    with pytest.raises(UserError, match="version 1, the champion before, is not in the registry"):
        promotion.rollback(root)
    assert champion_of(root) == (two, 2)


@pytest.mark.parametrize("act", ["promote", "rollback"])
def test_a_champion_whose_files_are_lost_can_be_replaced(root: Path, act: str) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    end = one
    if act == "promote":
        end = train(root, "three")
        judge(root, end, champion=two)
    lose_files(root, 2)
    # As another checkout has it, that has not followed yet.
    write_json(root / "champion.json", {"digest": one, "version": 1, "verdict": None})
    with pytest.raises(UserError, match="cannot give the files of version 2"):
        promotion.status(root)
    assert champion_of(root) == (one, 1)
    getattr(promotion, act)(root)
    assert champion_of(root)[0] == end


def test_status_fetches_a_champion_that_was_promoted_elsewhere(
    root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the run of an orchestrator does in a workspace of its own."""
    home = tmp_path_factory.mktemp("home")
    for name in ("params.yaml", "champion.json"):
        shutil.copyfile(root / name, home / name)
    digest = install(root, "one")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    promotion.status(home)
    assert champion_of(home) == (digest, 1)
    assert digest_directory(locate_fetched(home, digest)) == digest


@pytest.mark.parametrize("act", ["promote", "rollback", "status"])
def test_the_file_names_no_digest_whose_files_are_not_there(
    root: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    judge(root, train(root, "three"), champion=two)
    if act == "status":
        write_json(root / "champion.json", {"digest": one, "version": 1, "verdict": None})
    shutil.rmtree(root / CACHE)
    written = []

    def write(folder: Path, champion: Champion) -> None:
        assert digest_directory(locate_fetched(folder, champion.digest or "")) == champion.digest
        written.append(champion.version)
        write_champion(folder, champion)

    monkeypatch.setattr(promotion, "write_champion", write)
    getattr(promotion, act)(root)
    assert written == [{"promote": 3, "rollback": 1, "status": 2}[act]]


def test_status_does_not_set_the_file_back(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a promotion that ends between the status's look and its writing, the end stays."""
    one = install(root, "one")
    two = install(root, "two", champion=one)
    end = train(root, "three")
    judge(root, end, champion=two)
    write_json(root / "champion.json", {"digest": one, "version": 1, "verdict": None})
    look = promotion.describe
    looks = iter([None])

    def describe(version: Any) -> Champion:
        if next(looks, 0) is None:
            promotion.promote(root)
        return look(version)

    monkeypatch.setattr(promotion, "describe", describe)
    promotion.status(root)
    assert champion_of(root) == (end, 3)


def evaluate(root: Path, roc_auc: float) -> None:
    """Write a report of the evaluate stage."""
    scores = {"roc_auc": {"value": roc_auc}, "ece": {"value": 0.01}, "log_loss": {"value": None}}
    spend = {"gini": {"value": 0.6}, "total_ratio": {"value": 0.9}}
    targets = {
        "purchase_14d": {"kind": "binary", "models": {"ensemble": scores, "lstm": {}}},
        "spend_14d": {"kind": "amount", "models": {"ensemble": spend}},
    }
    write_json(root / "reports/evaluation.json", {"targets": targets})


def read_run(root: Path, digest: str) -> Any:
    store = connect(root)
    (run,) = store.search_runs(
        [e.experiment_id for e in store.search_experiments()], f"tags.`{DIGEST_TAG}` = '{digest}'"
    )
    return run.data


@pytest.mark.parametrize("by", ["register", "promote", "attach"])
def test_a_training_run_tells_how_good_its_model_is(root: Path, by: str) -> None:
    digest = train(root, "one")
    judge(root, digest)
    evaluate(root, 0.8)
    for _ in range(2):
        if by == "attach":
            assert attach(root, digest, [root / "reports/verdict.json"]) is not None
        else:
            getattr(promotion, by)(root)
    assert read_run(root, digest).metrics == {
        "test_roc_auc_purchase_14d": 0.8,
        "test_ece_purchase_14d": 0.01,
        "test_gini_spend_14d": 0.6,
        "test_total_ratio_spend_14d": 0.9,
    }
    assert read_run(root, digest).tags[PASSED_TAG] == "true"
    store = connect(root)
    run_id = store.search_model_versions("")[0].run_id if by != "attach" else None
    if run_id:
        assert len(store.get_metric_history(run_id, "test_roc_auc_purchase_14d")) == 1


def test_a_later_evaluation_replaces_the_one_before(root: Path) -> None:
    digest = train(root, "one")
    judge(root, digest)
    evaluate(root, 0.8)
    promotion.register(root)
    evaluate(root, 0.7)
    judge(root, digest, passed=False)
    attach(root, digest, [])
    assert read_run(root, digest).metrics["test_roc_auc_purchase_14d"] == 0.7
    assert read_run(root, digest).tags[PASSED_TAG] == "false"


def test_reports_about_another_model_are_not_logged(root: Path) -> None:
    one = train(root, "one")
    judge(root, one)
    evaluate(root, 0.8)
    two = train(root, "two")
    promotion.register(root)
    assert read_run(root, one).metrics == read_run(root, two).metrics == {}


class Killed(BaseException):
    """Ends an act like a kill: nothing catches it."""


# Every write of an act, in order.
WRITES = (
    "create_registered_model",
    "create_model_version",
    "set_registered_model_alias",
    "set_model_version_tag",
    "log_batch",
    "log_artifact",
    "set_registered_model_tag",
    "write_champion",
)


def kill_at(patch: pytest.MonkeyPatch, count: int) -> None:
    """Kill the process at the write with a number."""
    left = iter(range(count))

    def wrap(target: Any, name: str) -> None:
        write = getattr(target, name)

        def killer(*args: Any, **options: Any) -> Any:
            if next(left, None) is None:
                raise Killed
            return write(*args, **options)

        patch.setattr(target, name, killer)

    for name in WRITES[:-1]:
        wrap(mlflow.MlflowClient, name)
    wrap(promotion, WRITES[-1])


@pytest.mark.integration
@pytest.mark.parametrize("act", ["promote", "rollback"])
def test_an_act_killed_at_any_write_leaves_one_champion_and_is_completed(
    root: Path, tmp_path_factory: pytest.TempPathFactory, act: str
) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    if act == "promote":
        start, end = two, train(root, "three")
        judge(root, end, champion=two)
        evaluate(root, 0.8)
    else:
        start, end = two, one
    for count in range(20):
        copy = tmp_path_factory.mktemp("killed") / "root"
        shutil.copytree(root, copy)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, count)
            try:
                getattr(promotion, act)(copy)
            except Killed:
                done = False
            else:
                done = True
        # Whoever looks next sees one champion, in the registry and in the file.
        promotion.status(copy)
        decided = connect(copy).get_model_version_by_alias("forecart", "champion").tags[DIGEST_TAG]
        assert decided == champion_of(copy)[0]
        assert decided in (start, end)
        if decided == start:
            getattr(promotion, act)(copy)
        assert champion_of(copy)[0] == end
        # Nothing of the killed act is left in the way back.
        if act == "promote":
            promotion.rollback(copy)
            assert champion_of(copy)[0] == two
            promotion.rollback(copy)
        assert champion_of(copy)[0] == one
        with pytest.raises(UserError, match="first champion"):
            promotion.rollback(copy)
        if done:
            break
    assert done
    assert count >= 3


def test_a_file_of_another_registry_is_not_overwritten(
    root: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(root, "one")
    shutil.copyfile(empty_store, root / "other.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'other.db'}")
    for act in (promotion.status, promotion.promote):
        with pytest.raises(UserError, match="does not know"):
            act(root)
    assert champion_of(root)[1] == 1


@pytest.mark.parametrize("deleted", ["alias", "version"])
def test_a_champion_deleted_in_the_registry_can_be_given_back_or_up(
    root: Path, deleted: str
) -> None:
    one = install(root, "one")
    two = install(root, "two", champion=one)
    registry = connect(root)
    if deleted == "alias":
        registry.delete_registered_model_alias("forecart", "champion")
    else:
        registry.delete_model_version("forecart", "2")
    wanted = "back to version 2 of" if deleted == "alias" else "to another version of"
    for act in (promotion.status, promotion.promote, promotion.rollback):
        with pytest.raises(UserError, match=f"the alias champion {wanted} forecart there"):
            act(root)
    assert champion_of(root) == (two, 2)
    copy = root / "copy"
    copy.mkdir()
    for name in ("params.yaml", "mlflow.db"):
        shutil.copyfile(root / name, copy / name)
    promotion.status(copy)
    assert champion_of(copy) == (None, None)
    registry.set_registered_model_alias("forecart", "champion", "1")
    promotion.status(root)
    assert champion_of(root) == (one, 1)


@pytest.mark.parametrize(
    "edit",
    [
        {"passed": False, "checks": None},
        {"passed": False, "checks": [None]},
        {"passed": False, "checks": [{"passed": False}]},
        {"passed": ...},
        {"passed": None},
        {"passed": "yes"},
        {"passed": 1},
        {"champion": ...},
        {"candidate": 5},
        {"candidate": "sha256:1"},
        {"champion": "e" * 64},
        {"checks": []},
        {"checks": [{"name": "users", "passed": False, "why": "too few"}]},
        {"passed": False},
        None,
    ],
)
def test_a_verdict_that_was_edited_is_named(root: Path, edit: dict[str, Any] | None) -> None:
    whole = judge(root, train(root, "one"))
    file = root / "reports/verdict.json"
    write_json(file, edit and {k: v for k, v in (whole | edit).items() if v is not ...})
    with pytest.raises(UserError, match=rf"^{file}: not as the gate wrote it; run: dvc repro$"):
        promotion.promote(root)
    assert champion_of(root) == (None, None)


@pytest.mark.parametrize(
    "content",
    [
        *(b"{", b"\xff", b"{}", b"none"),
        b'{"digest": 5, "version": 1, "verdict": null}',
        b'{"digest": null, "version": "x", "verdict": null}',
        b'{"digest": null, "version": true, "verdict": null}',
        b'{"digest": null, "version": 1, "verdict": 3}',
    ],
)
def test_a_damaged_file_is_written_anew_as_it_says(root: Path, content: bytes) -> None:
    one = install(root, "one")
    (root / "champion.json").write_bytes(content)
    for act in (promotion.status, fetch_champion):
        with pytest.raises(UserError, match=r"delete the file and run: forecart status$"):
            act(root)
    (root / "champion.json").unlink()
    promotion.status(root)
    assert champion_of(root) == (one, 1)


def test_a_wrong_file_is_written_anew_as_it_says(root: Path) -> None:
    one = install(root, "one")
    write_json(root / "champion.json", {"digest": DATA, "version": 1, "verdict": None})
    with pytest.raises(UserError, match="run: forecart status, which writes the file anew"):
        fetch_champion(root)
    promotion.status(root)
    assert champion_of(root) == (one, 1)


@pytest.mark.parametrize("uri", ["gopher://shop", "sqlite:/mlflow.db"])
def test_a_registry_that_cannot_be_opened_is_told_in_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: ") as told:
        promotion.status(root)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("sqlite:////proc/none/mlflow.db", "/proc/none: No such file or directory"),
        ("sqlite:///{root}/params.yaml/mlflow.db", "{root}/params.yaml: File exists"),
        ("sqlite:///{root}", "sqlite:///{root}: unable to open database file"),
        ("sqlite:///{root}/params.yaml", "sqlite:///{root}/params.yaml: file is not a database"),
        ("mysql+pymysql://joe:secret@127.0.0.1:1/db", "...//127.0.0.1:1/db: Connection refused"),
        ("postgresql+psycopg://joe:secret@127.0.0.1:1/db", "...failed: Connection refused"),
        ("postgresql://127.0.0.1:one/db", "...the port in the address is not a number"),
        ("mysql+none://joe:secret@127.0.0.1/db", "...Can't load plugin: ..."),
    ],
)
def test_a_database_that_cannot_be_opened_is_told_at_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, uri: str, told: str
) -> None:
    """MLflow itself would try for two minutes."""
    (root / "params.yaml").write_text("# of which SQLite reads the first hundred bytes" * 3)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(root=root))
    monkeypatch.setattr(connection, "_PAUSES", (0,))
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        connect(root)
    assert time.monotonic() - start < 10
    expected = re.escape(f"MLFLOW_TRACKING_URI: {told.format(root=root)}")
    assert re.fullmatch(expected.replace(re.escape("..."), ".*"), str(raised.value))
    assert "secret" not in str(raised.value)


def test_a_database_that_is_starting_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Engine:
        @contextmanager
        def connect(self) -> Iterator[Any]:
            calls.append(1)
            if len(calls) < 3:
                raise OperationalError("SELECT 1", {}, Exception("the database is starting up"))
            yield Mock()

    monkeypatch.setattr("sqlalchemy.create_engine", lambda *_, **__: Engine())
    monkeypatch.setattr(connection, "_PAUSES", (0, 0, 0))
    connection._open("postgresql+psycopg://127.0.0.1:1/db", Path())
    assert len(calls) == 3


def test_of_the_projects_own_registry_the_folder_in_its_place_is_named(root: Path) -> None:
    (root / "mlflow.db").unlink()
    (root / "mlflow.db").mkdir()
    with pytest.raises(UserError, match=rf"^{root}/mlflow\.db: unable to open database file$"):
        connect(root)


def test_of_the_projects_own_registry_the_file_is_named(root: Path) -> None:
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("UPDATE alembic_version SET version_num = 'older'")
    with pytest.raises(UserError, match="out-of-date database schema") as told:
        connect(root)
    assert str(told.value).startswith(f"{root / 'mlflow.db'}: ")
    assert "\n" not in str(told.value)


def test_a_registry_is_made_where_a_link_leads_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home, there = tmp_path / "Bücher & Co", tmp_path / "there"
    home.mkdir()
    (home / "mlflow.db").symlink_to(there / "runs.db")
    assert connect(home).search_experiments()
    assert (home / "mlflow.db").is_symlink()
    assert {file.name for file in there.iterdir()} == {"runs.db", "runs.db.lock"}
    assert {file.name for file in tmp_path.iterdir()} == {home.name, "there"}


@pytest.mark.parametrize(("name", "wrong"), [("what?/shop", "'?'"), ("my%20shop", "'%20'")])
def test_a_folder_that_no_address_can_name_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str
) -> None:
    """MLflow would make its database elsewhere, or try in vain for two minutes."""
    folder = root / name
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match=r"rename the folder$") as told:
        connect(folder)
    assert str(told.value).startswith(f"{folder}: the address of a database cannot hold {wrong}")
    assert not list(folder.iterdir())
    assert not (root / "what").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    assert connect(folder).search_experiments()


@pytest.mark.parametrize("answer", [None, 503])
def test_a_server_that_does_not_answer_is_told_in_one_line(
    root: Path, monkeypatch: pytest.MonkeyPatch, answer: int | None
) -> None:
    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(answer or 500)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        uri = f"http://shop:secret@127.0.0.1:{server.server_port}"
        if answer:
            Thread(target=server.serve_forever, daemon=True).start()
        else:
            server.server_close()
        monkeypatch.setattr(connection, "_PAUSES", (0,))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        try:
            with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI: http://127") as told:
                promotion.status(root)
        finally:
            if answer:
                server.shutdown()
    end = "answers 503 Service Unavailable" if answer else "Connection refused"
    assert str(told.value).endswith(f":{uri.rpartition(':')[2]}: {end}")


def test_what_the_database_says_of_itself_is_told(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = connect(root)
    with sqlite3.connect(root / "mlflow.db") as database:
        database.execute("DROP TABLE experiments")
    with pytest.raises(MlflowException, match="no such table") as raised:
        store.search_experiments()
    told = connection.explain(raised.value, root)
    assert told == f"MLflow at sqlite:///{root / 'mlflow.db'}: no such table: experiments"
    assert "Traceback" not in capfd.readouterr().err


def test_a_deleted_experiment_is_restored_with_its_runs(root: Path) -> None:
    install(root, "one")
    store = connect(root)
    (experiment,) = [e for e in store.search_experiments() if e.name == EXPERIMENT]
    store.delete_experiment(experiment.experiment_id)
    train(root, "two")
    assert len(store.search_runs([experiment.experiment_id])) == 2


def test_where_no_project_is_no_registry_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for act in (promotion.status, promotion.promote, promotion.rollback, promotion.register):
        with pytest.raises(UserError, match=r"params\.yaml: no such file"):
            act(tmp_path)
    assert not list(tmp_path.iterdir())


def test_status_tells_roles(root: Path) -> None:
    assert "forecart promote" in promotion.status(root)
    one = install(root, "one")
    install(root, "two", champion=one)
    train(root, "three")
    promotion.register(root)
    lines = promotion.status(root).splitlines()
    assert lines[1].split() == ["version", "model", "role", "verdict"]
    assert "champion before (1)" in lines[2]
    assert lines[3].split()[2] == "champion"
    assert lines[4].split()[2] == "candidate"


def forget_fetched(root: Path) -> None:
    """Leave the registry's files alone, as on a machine that neither trained nor promoted."""
    shutil.rmtree(root / CACHE)
    shutil.rmtree(root / MODEL)


def test_fetching_gives_the_champions_files(root: Path) -> None:
    assert fetch_champion(root) is None
    one = install(root, "one")
    train(root, "two")
    fetched = fetch_champion(root)
    assert fetched is not None
    assert digest_directory(fetched) == one
    assert sorted(p.name for p in fetched.iterdir()) == ["config.json", "model.safetensors"]
    # The kept copy is checked as well.
    (fetched / "model.safetensors").write_text("damaged")
    assert digest_directory(fetch_champion(root) or Path()) == one


def test_files_that_the_registry_has_lost_are_told_in_one_line(root: Path) -> None:
    install(root, "one")
    forget_fetched(root)
    shutil.rmtree(root / "mlartifacts/models")
    with pytest.raises(UserError, match="cannot give the files of version 1 of forecart") as told:
        fetch_champion(root)
    assert "\n" not in str(told.value)


def test_several_that_want_the_champion_at_once_all_get_it(root: Path) -> None:
    one = install(root, "one")
    for _ in range(3):
        forget_fetched(root)
        with ThreadPoolExecutor(max_workers=4) as pool:
            fetched = list(pool.map(fetch_champion, [root] * 4))
        assert {digest_directory(folder or Path()) for folder in fetched} == {one}
        shutil.copytree(locate_fetched(root, one), root / MODEL)
    names = {path.name for path in (root / CACHE).iterdir()}
    assert names == {one.removeprefix("sha256:"), f"{one.removeprefix('sha256:')}.lock"}


def test_files_that_were_changed_in_the_registry_are_refused(root: Path) -> None:
    install(root, "one")
    forget_fetched(root)
    stored = next((root / "mlartifacts").rglob("model.safetensors"))
    stored.write_text("changed")
    with pytest.raises(UserError, match="has changed"):
        fetch_champion(root)
    assert not list((root / ".forecart").rglob("model.safetensors"))


def test_a_pickle_in_the_registry_is_refused(root: Path) -> None:
    install(root, "one")
    forget_fetched(root)
    stored = next((root / "mlartifacts").rglob("model.safetensors"))
    (stored.parent / "model.pkl").write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=r"model\.pkl: a model holds"):
        fetch_champion(root)


def test_what_the_packaged_model_reproduces_is_kept_with_the_champion(root: Path) -> None:
    digest = train(root, "one")
    judge(root, digest)
    golden = {"model": digest, "expected": {"purchase_14d": [0.5]}}
    write_json(root / "build/bento/src/golden.json", golden)
    promotion.promote(root)
    kept = locate_golden(root, digest)
    assert kept.parent == root / CACHE
    assert read_json(kept) == golden
    # A project that has the registry alone fetches both, one that has built it keeps its own.
    for left in (root / MODEL, root / "mlflow.db"):
        hidden = left.rename(root / "hidden")
        shutil.rmtree(root / CACHE)
        assert digest_directory(fetch_champion(root) or Path()) == digest
        assert read_json(kept) == golden
        hidden.rename(left)


@pytest.mark.usefixtures("no_address")
def test_a_clone_without_the_registry_takes_the_model_that_it_made_itself(root: Path) -> None:
    digest = install(root, "one")
    shutil.rmtree(root / CACHE)
    (root / "mlflow.db").unlink()
    assert digest_directory(fetch_champion(root) or Path()) == digest
    shutil.rmtree(root / CACHE)
    train(root, "two", log=False)
    with pytest.raises(UserError, match=r"mlflow\.db, is not here"):
        fetch_champion(root)
    assert not (root / "mlflow.db").exists()


def test_golden_predictions_of_another_model_are_not_kept(root: Path) -> None:
    digest = train(root, "one")
    judge(root, digest)
    write_json(root / "build/bento/src/golden.json", {"model": DATA, "expected": {}})
    promotion.promote(root)
    assert not locate_golden(root, digest).exists()
    assert fetch_champion(root) is not None
