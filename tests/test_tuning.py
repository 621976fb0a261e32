"""The search on a tiny shop: real Optuna and MLflow stores in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipelines import tuning
from pipelines.config import Params, load_params
from pipelines.errors import UserError
from pipelines.model.tuning import make_study, search, write_settings
from pipelines.registry.champion import connect
from pipelines.registry.tracking import EXPERIMENT
from pipelines.tuning import PARENT_TAG, tune
from tests.model.conftest import PERIODS, TARGETS, TINY, shop, vocabulary

__all__ = ["shop", "vocabulary"]  # fixtures

TEXT = """a:
  epochs: 1
train:
  epochs: 2                # how long
  learning_rate: 0.002

other:
  epochs: 3
"""


def test_settings_are_written_and_the_rest_stays() -> None:
    text = write_settings(TEXT, "train", {"epochs": 7, "learning_rate": 0.00123456789})
    assert text == TEXT.replace("epochs: 2 ", "epochs: 7 ").replace("0.002", "0.00123457")
    assert yaml.safe_load(text)["other"] == {"epochs": 3}


@pytest.mark.parametrize(("section", "name"), [("nothing", "epochs"), ("train", "width")])
def test_a_setting_that_is_not_there(section: str, name: str) -> None:
    with pytest.raises(UserError, match=r"params\.yaml"):
        write_settings(TEXT, section, {name: 1})


def test_all_that_is_searched_stands_in_the_settings_file() -> None:
    file = Path(__file__).parents[1] / "params.yaml"
    wanted = dict.fromkeys(
        ("learning_rate", "weight_decay", "dropout", "width", "layers", "epochs"), 1
    )
    assert "width: 1 " in write_settings(file.read_text(), "train", wanted).replace("\n", " ")


def test_an_interrupted_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = (
        request.getfixturevalue("shop"),
        PERIODS,
        TARGETS,
        request.getfixturevalue("vocabulary"),
    )
    monkeypatch.setattr(tuning, "load_inputs", lambda root: given)
    monkeypatch.setattr(tuning, "digest_directory", lambda path: "sha256:0")
    file = tmp_path / "params.yaml"
    train = TINY.model_dump() | {"heads": 2, "epochs": 1}
    file.write_text(yaml.safe_dump({"train": train}, sort_keys=False))
    params = load_params(file)

    told = tune(params, file, tmp_path, trials=1, write=False)
    assert told.startswith("1 trials")
    told = tune(params, file, tmp_path, trials=3, write=True)
    assert told.startswith("3 trials")

    store = connect(tmp_path)
    experiment = store.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = store.search_runs([experiment.experiment_id])
    assert sum(PARENT_TAG in run.data.tags for run in runs) == 3
    after = load_params(file).train
    assert (after != params.train) == ("Written" in told)


def test_without_binary_targets(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    study = make_study(f"sqlite:///{tmp_path / 'study.db'}", "x", 1)
    with pytest.raises(UserError, match=r"no binary target"):
        search(
            request.getfixturevalue("shop"),
            PERIODS,
            TARGETS[-1:],
            Params().train,
            request.getfixturevalue("vocabulary"),
            study,
            trials=1,
        )
