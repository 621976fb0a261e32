"""A new model is judged once; what went wrong without saying anything of it is tried again."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from pipelines.errors import UserError
from pipelines.io import digest_directory
from serving.engine import Unavailable
from serving.metrics import Metrics
from serving.swap import Watcher


def watch(folder: Path, outcomes: list[Exception | str]) -> tuple[Watcher, list[Path]]:
    """Watch a model's folder; taking it ends with one outcome after the other."""
    (folder / "config.json").write_text("{}")
    tried: list[Path] = []

    def take(model: Path, digest: str | None) -> str:
        tried.append(model)
        outcome = outcomes[len(tried) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    metrics = Metrics(CollectorRegistry())
    return Watcher(folder, current="old", take=take, metrics=metrics, seconds=1.0), tried


def test_an_interruption_is_tried_again_ever_more_rarely(tmp_path: Path) -> None:
    outcomes: list[Exception | str] = [Unavailable("killed"), OSError("no memory"), "new"]
    watcher, tried = watch(tmp_path, outcomes)
    pauses = []
    for _ in range(5):
        watcher.look()
        pauses.append(watcher._pause)
    assert len(tried) == 3
    assert pauses == [2.0, 4.0, 1.0, 1.0, 1.0]


def test_a_hiccup_that_is_over_delays_no_later_promotion(tmp_path: Path) -> None:
    outcomes: list[Exception | str] = [OSError("no memory"), UserError("bad"), "new"]
    watcher, _tried = watch(tmp_path, outcomes)
    watcher.look()
    assert watcher._pause == 2.0
    watcher.look()
    assert watcher._pause == 1.0, "refused, and so looked at"
    watcher._pause = 600.0
    watcher.look()
    assert watcher._pause == 1.0, "nothing new, and so looked at"
    watcher._pause = 600.0
    watcher._current = digest_directory(tmp_path)
    watcher._seen = None
    watcher.look()
    assert watcher._pause == 1.0, "it serves already"


def test_a_model_that_was_refused_is_not_asked_again(tmp_path: Path) -> None:
    watcher, tried = watch(tmp_path, [UserError("bad"), "new"])
    for _ in range(3):
        watcher.look()
    assert len(tried) == 1
    (tmp_path / "config.json").write_text("{ }")
    watcher.look()
    assert len(tried) == 2


def test_a_link_that_points_to_another_model_is_noticed(tmp_path: Path) -> None:
    for name in ("1", "2"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(f'{{"release": {name}}}')
    current = tmp_path / "current"
    current.symlink_to("1")
    taken: list[Path] = []

    def take(model: Path, digest: str | None) -> str:
        taken.append(model)
        return digest_directory(model)

    watcher = Watcher(
        current,
        current=digest_directory(current),
        take=take,
        metrics=Metrics(CollectorRegistry()),
    )
    watcher.look()
    assert taken == []
    current.unlink()
    current.symlink_to("2")
    watcher.look()
    assert taken == [current]
