"""The search on a tiny shop: real Optuna and MLflow stores in a folder of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from scipy import stats

from pipelines import tuning
from pipelines.config import Params, Pretrain, Train, load_params, parse_params
from pipelines.errors import UserError
from pipelines.model import tuning as model_tuning
from pipelines.model.schedule import Schedule
from pipelines.model.timeline import Timeline
from pipelines.model.training import pretrain_model, train_model
from pipelines.model.tuning import (
    Found,
    average_parts,
    calibration_losses,
    compare_parts,
    make_study,
    search,
    suggest,
    write_settings,
)
from pipelines.registry.connection import connect
from pipelines.registry.tracking import EXPERIMENT
from pipelines.tuning import PARENT_TAG, PRUNED_TAG, tune
from tests.model.conftest import PERIODS, TARGETS, TINY, shop, vocabulary

pytestmark = pytest.mark.integration

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


def test_a_small_setting_is_read_as_a_number() -> None:
    text = write_settings(TEXT, "train", {"learning_rate": 1e-5})
    assert yaml.safe_load(text)["train"]["learning_rate"] == 1e-5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a: {}\ntrain:\n  width:      # null: x\n", "a: {}\ntrain:\n  width: 8      # null: x\n"),
        ("train:\n  width:\n  heads: 2\n", "train:\n  width: 8\n  heads: 2\n"),
        ("train:\n    width: ~\nb: {}\n", "train:\n    width: 8\nb: {}\n"),
        ("train: # x\n\n    heads: 2", "train: # x\n    width: 8\n\n    heads: 2"),
        (
            "train:\n  trees:\n    width: 1\n# y\n  heads: 2\nb: 1\n",
            "train:\n  width: 8\n  trees:\n    width: 1\n# y\n  heads: 2\nb: 1\n",
        ),
        ("train:\n# y\n  width: 1\n", "train:\n# y\n  width: 8\n"),
        ("train: # x\nb: 1\n", "train: # x\n  width: 8\nb: 1\n"),
        ("train: null # x\nb: 1\n", "train: # x\n  width: 8\nb: 1\n"),
        ("b:\n  width: 1", "b:\n  width: 1\ntrain:\n  width: 8\n"),
        ("train:", "train:\n  width: 8\n"),
    ],
)
def test_a_setting_that_is_left_to_its_default_is_put_in(before: str, after: str) -> None:
    assert write_settings(before, "train", {"width": 8}) == after


@pytest.mark.parametrize(
    "text",
    [
        "train: {width: 16, heads: 1}\n",
        "{train: {width: 16}}\n",
        "'train':\n  width: 16\n",
        "train:\n  'width': 16\n",
        "train:\n  width:\n    16\n",
        "train:\n  width: 16\n  note: |\n    x\n  width: 4\n",
    ],
)
def test_a_section_that_is_written_otherwise_is_left_alone(text: str) -> None:
    with pytest.raises(UserError, match=r"params\.yaml: write each setting of train on a line"):
        write_settings(text, "train", {"width": 8})


def test_all_that_is_searched_stands_in_the_settings_file() -> None:
    file = Path(__file__).parents[1] / "params.yaml"
    wanted = dict.fromkeys(
        ("learning_rate", "weight_decay", "dropout", "width", "layers", "epochs"), 1
    )
    assert "width: 1 " in write_settings(file.read_text(), "train", wanted).replace("\n", " ")


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What the stages before have made, without running them."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shop, vocabulary = (request.getfixturevalue(name) for name in ("shop", "vocabulary"))
    given = (shop, PERIODS, TARGETS, vocabulary)
    monkeypatch.setattr(tuning, "load_inputs", lambda root: given)
    monkeypatch.setattr(tuning, "digest_directory", lambda path: "sha256:0")


@pytest.mark.usefixtures("inputs")
def test_an_interrupted_search_goes_on(tmp_path: Path) -> None:
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
    trials = [run.data for run in runs if PARENT_TAG in run.data.tags]
    assert len(trials) == 3
    # A trial without a loss says why.
    assert all((t.tags[PRUNED_TAG] == "true") == (not t.metrics) for t in trials)
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
            Params().pretrain,
            request.getfixturevalue("vocabulary"),
            study,
            trials=1,
            confidence=0.95,
        )


EDGES = {
    "one head": {"heads": 1, "width": 24},
    "three heads": {"heads": 3, "width": 24},
    "the least": {"heads": 1, "width": 8, "layers": 1, "epochs": 1, "learning_rate": 1e-6},
    "the most": {"width": 4096, "layers": 64, "epochs": 1000, "learning_rate": 1.0},
    "nearly the most": {"width": 4088, "heads": 1, "layers": 63, "epochs": 999},
    "no decay": {"weight_decay": 0.0, "dropout": 0.9, "next_event_weight": 0.0},
    "little decay": {"weight_decay": 1e-6},
}


@pytest.mark.parametrize("changes", EDGES.values(), ids=EDGES)
@pytest.mark.filterwarnings("error")
def test_whatever_is_drawn_is_allowed(changes: dict[str, Any]) -> None:
    config = Train.model_validate({"epochs": 6, "learning_rate": 2e-3} | changes)
    assert config.epochs and config.learning_rate
    schedule = Schedule(
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        tokens_per_batch=512,
        tree_rate=0.1,
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial({name: getattr(config, name) for name in model_tuning.SEARCHED})
    drawn = [suggest(study.ask(), config, schedule) for _ in range(40)]
    for settings in drawn:
        parse_params({"train": changes | settings})
    assert drawn[0] == {name: getattr(config, name) for name in model_tuning.SEARCHED}
    for name in ("width", "layers"):
        assert len({settings[name] for settings in drawn}) > 1


def test_a_search_gone_on_with_draws_other_settings() -> None:
    storage = optuna.storages.InMemoryStorage()
    drawn = [
        make_study(storage, "x", 1).ask().suggest_float("learning_rate", 0.0, 1.0) for _ in range(4)
    ]
    assert len(set(drawn)) == 4


class Shop:
    """A search whose training is made up: the more weight decay, the better."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        self.sequences = request.getfixturevalue("shop")
        self.vocabulary = request.getfixturevalue("vocabulary")
        self.study = make_study(optuna.storages.InMemoryStorage(), "x", 1)
        self.tried: list[Train] = []
        self.dies = 0
        self.noise = 0.0
        monkeypatch.setattr(model_tuning, "pretrain_model", lambda *_: {})
        monkeypatch.setattr(model_tuning, "train_model", self._train)
        monkeypatch.setattr(
            model_tuning,
            "calibration_losses",
            lambda config, *_: self.judge(config) + self.noise * np.array([-1.0, 1.0, 0.0, 0.0]),
        )

    def judge(self, config: Train) -> float:
        return 1.0 - config.weight_decay

    def _train(self, *given: Any, **_: Any) -> Train:
        config, tell = given[3], given[5]
        if self.dies:
            self.dies -= 1
            raise KeyboardInterrupt
        self.tried.append(config)
        for epoch in range(3):
            tell({"epoch": epoch, "hazard_loss": 1.0})
        return config

    def search(self, trials: int, config: Train = TINY) -> Found:
        return search(
            self.sequences,
            PERIODS,
            TARGETS,
            config,
            Pretrain(),
            self.vocabulary,
            self.study,
            trials=trials,
            confidence=0.95,
        )


def test_what_the_settings_leave_open_is_searched_around_what_is_chosen(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shop = Shop(monkeypatch, request)
    shop.search(2, TINY.model_copy(update={"epochs": None, "learning_rate": None}))
    assert (shop.tried[0].epochs, shop.tried[0].learning_rate) == (6, 0.002)


@pytest.mark.parametrize("waits", [False, True])
def test_interrupted_at_once_the_settings_as_they_are_come_again(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, waits: bool
) -> None:
    shop = Shop(monkeypatch, request)
    shop.dies = 1
    with pytest.raises(KeyboardInterrupt):
        shop.search(3)
    if waits:  # Died between putting the trial in line and beginning it.
        now = {name: getattr(TINY, name) for name in model_tuning.SEARCHED}
        shop.study.enqueue_trial(now)
    found = shop.search(3)
    assert shop.tried[0].weight_decay == TINY.weight_decay
    assert found.current == shop.judge(TINY)
    assert found.trials == 3
    assert [config.weight_decay for config in shop.tried].count(TINY.weight_decay) == 1


def test_current_is_that_of_the_settings_not_of_the_first_trial(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shop = Shop(monkeypatch, request)
    shop.study.enqueue_trial({"weight_decay": 2 * TINY.weight_decay})
    schedule = Schedule.of(TINY, Timeline(shop.sequences), PERIODS.calibration)

    def judge(trial: optuna.Trial) -> float:
        loss = shop.judge(TINY.model_copy(update=suggest(trial, TINY, schedule)))
        trial.set_user_attr("losses", [loss])
        return loss

    shop.study.optimize(judge, n_trials=5)
    found = shop.search(5)
    assert found.current == shop.judge(TINY)
    assert found.trials == 6
    assert found.loss < found.current


def test_the_settings_as_they_are_are_not_pruned(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shop = Shop(monkeypatch, request)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda _: True)
    found = shop.search(3)
    assert found.current == found.loss == shop.judge(TINY)
    states = [trial.state.name for trial in shop.study.get_trials()]
    assert states == ["COMPLETE", "PRUNED", "PRUNED"]


def test_no_weight_decay_is_a_setting_like_others(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shop = Shop(monkeypatch, request)
    found = shop.search(6, TINY.model_copy(update={"weight_decay": 0.0}))
    assert found.current == 1.0
    assert found.best["weight_decay"] > 0.0


def test_the_settings_as_they_are_are_pretrained_as_the_pipeline_does(
    request: pytest.FixtureRequest,
) -> None:
    sequences, vocabulary = (request.getfixturevalue(name) for name in ("shop", "vocabulary"))
    pretrain = Pretrain(epochs=2)
    alone = TINY.trees.model_copy(update={"rounds": 0})
    config = TINY.model_copy(update={"refit_epochs": 0, "trees": alone})
    given = (sequences, PERIODS, TARGETS, config)
    weights = pretrain_model(*given, pretrain, vocabulary)
    trained = train_model(*given, vocabulary, pretrained=weights)
    study = make_study(optuna.storages.InMemoryStorage(), "x", 1)
    found = search(*given, pretrain, vocabulary, study, trials=1, confidence=0.95)
    timeline = Timeline(sequences)
    assert found.current == calibration_losses(trained, timeline, PERIODS).mean()
    unpretrained = train_model(*given, vocabulary)
    assert found.current != calibration_losses(unpretrained, timeline, PERIODS).mean()


@pytest.mark.usefixtures("inputs")
def test_settings_that_would_be_refused_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Found(best={"width": 12}, loss=0.1, current=0.2, gain=(0.05, 0.15), trials=1)
    monkeypatch.setattr(tuning, "search", lambda *_, **__: found)
    file = tmp_path / "params.yaml"
    file.write_text("train:\n  width: 16\n  heads: 1\n")
    with pytest.raises(UserError, match=r"train\.width"):
        tune(load_params(file), file, tmp_path, trials=1, write=True)
    assert load_params(file).train.width == 16


@pytest.mark.usefixtures("inputs")
def test_a_file_that_cannot_be_written_to_is_told_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "search", lambda *_, **__: pytest.fail("it searched"))
    file = tmp_path / "params.yaml"
    file.write_text("train: {width: 16, heads: 1}\n")
    with pytest.raises(UserError, match="on a line of its own"):
        tune(load_params(file), file, tmp_path, trials=1, write=True)


def test_the_interval_of_the_gain_is_that_of_the_paired_test() -> None:
    random = np.random.default_rng(1)
    before = random.normal(0.5, 0.1, 60)
    after = before - random.normal(0.01, 0.02, 60)
    found = compare_parts(average_parts(before), average_parts(after), 0.9)
    expected = stats.ttest_rel(before, after).confidence_interval(0.9)
    np.testing.assert_allclose(found, (expected.low, expected.high))


def test_of_many_shoppers_the_parts_keep_mean_and_error() -> None:
    random = np.random.default_rng(2)
    before, after = random.normal(0.5, 0.1, 50_000), random.normal(0.499, 0.1, 50_000)
    low, high = compare_parts(average_parts(before), average_parts(after), 0.95)
    expected = stats.ttest_ind(before, after).confidence_interval(0.95)
    assert len(average_parts(before)) == 100
    assert (low + high) / 2 == pytest.approx((before - after).mean())
    assert high - low == pytest.approx(expected.high - expected.low, rel=0.25)


def test_of_one_part_nothing_is_sure() -> None:
    assert compare_parts([0.5], [0.4], 0.95) == (-np.inf, np.inf)


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("low", "written"), [(-0.01, False), (0.01, True)])
def test_only_what_is_surely_better_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low: float, written: bool
) -> None:
    found = Found(best={"width": 32}, loss=0.1, current=0.2, gain=(low, 0.2), trials=3)
    monkeypatch.setattr(tuning, "search", lambda *_, **__: found)
    file = tmp_path / "params.yaml"
    file.write_text("train:\n  width: 16\n  heads: 1\n")
    told = tune(load_params(file), file, tmp_path, trials=3, write=True)
    assert load_params(file).train.width == (32 if written else 16)
    assert ("Written" in told) == written
    assert f"better by {low:.5f} to 0.20000" in told


def test_the_gain_is_of_the_best_over_what_stood_there(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    shop = Shop(monkeypatch, request)
    found = shop.search(4)
    assert found.gain == pytest.approx((found.current - found.loss,) * 2)
    assert found.is_better


def test_the_more_were_tried_the_more_the_best_has_to_gain(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The best of many equals looks better by chance; the bound holds for all of them at once."""
    random = np.random.default_rng(3)
    wrong = 0
    for _ in range(40):
        shop = Shop(monkeypatch, request)
        monkeypatch.setattr(
            model_tuning, "calibration_losses", lambda *_: random.normal(1.0, 0.1, 400)
        )
        monkeypatch.setattr(shop, "_train", lambda *given, **_: given[3])
        monkeypatch.setattr(model_tuning, "train_model", lambda *given, **_: given[3])
        wrong += shop.search(20).is_better
    # At 2.5 % of searches; uncorrected, 15 of these forty.
    assert wrong <= 4
