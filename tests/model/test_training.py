"""The model as a whole: it learns, and it sees neither the future nor other users."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import Pretrain
from pipelines.errors import UserError
from pipelines.features.store import Sequences, encode_events
from pipelines.model.batches import Placement, collate, cut_pieces
from pipelines.model.boosting import collect_rows
from pipelines.model.calibration import Calibration
from pipelines.model.correction import calibrate
from pipelines.model.heads import Heads, survival
from pipelines.model.predictor import CONFIG, WEIGHTS, Predictor
from pipelines.model.timeline import DAY, Cuts, Timeline, population
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import TrainedModel, pretrain_model, train_model
from tests.model.conftest import PERIODS, START, TARGETS, TINY


@pytest.fixture(scope="module")
def trained(shop: Sequences, vocabulary: Vocabulary) -> TrainedModel:
    return train_model(shop, PERIODS, TARGETS, TINY, vocabulary)


@pytest.fixture(scope="module", params=["gpt", "bert", "lstm", "cnn", "mlp"])
def lively(
    request: pytest.FixtureRequest,
    shop: Sequences,
    vocabulary: Vocabulary,
    trained: TrainedModel,
) -> Predictor:
    """Every backbone, with weights that make every path matter, also those left at zero."""
    if request.param == TINY.backbone:
        predictor = trained.first
    else:
        config = TINY.model_copy(update={"backbone": request.param, "epochs": 1, "refit_epochs": 0})
        predictor = train_model(shop, PERIODS, TARGETS, config, vocabulary).first
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in predictor.network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return predictor


def predict(
    predictor: Predictor, sequences: Sequences, now: int
) -> dict[str, np.ndarray[Any, Any]]:
    return predictor.predict(sequences, np.full(sequences.users, now, dtype=np.int64))


def test_events_after_the_cut_change_no_prediction(shop: Sequences, lively: Predictor) -> None:
    now = START + 30 * DAY
    before = predict(lively, shop, now)
    future = shop.ts >= now
    assert 0 < future.sum() < shop.events
    moved = replace(
        shop,
        ts=np.where(future, now + (shop.ts - now) // 3, shop.ts),
        type=np.where(future, 6, shop.type).astype(np.uint8),
        price=np.where(future, 999, shop.price).astype(np.float32),
        category=np.where(future, 77, shop.category).astype(np.uint32),
    )
    after = predict(lively, moved, now)
    for name, values in before.items():
        np.testing.assert_array_equal(values, after[name])


def test_an_event_at_the_cut_is_future(shop: Sequences, lively: Predictor) -> None:
    now = START + 30 * DAY
    history: list[dict[str, Any]] = [{"ts": now - DAY, "event_type": "view"}]
    without = predict(lively, encode_events([history]), now)
    with_ = predict(lively, encode_events([[*history, {"ts": now, "event_type": "search"}]]), now)
    assert all(without[name] == with_[name] for name in without)


def test_users_in_a_row_do_not_see_each_other(shop: Sequences, lively: Predictor) -> None:
    now = START + 30 * DAY
    together = predict(lively, shop, now)
    for user in (0, 7, 31):
        alone = predict(lively, shop.take(np.array([user])), now)
        for name, values in alone.items():
            np.testing.assert_allclose(values[0], together[name][user], rtol=1e-5, atol=1e-6)


def test_many_nows_are_as_many_passes(shop: Sequences, lively: Predictor) -> None:
    if lively.spec.network.backbone == "bert":
        return  # has one NOW token a piece, since events see what comes after them
    timeline = Timeline(shop)
    user = np.full(5, 3)
    ts = START + np.array([9, 20, 20, 31, 45]) * DAY
    cuts = timeline.cuts(user, ts)
    # One piece with all five NOW tokens, as in training.
    pieces = cut_pieces(timeline, cuts, context=500, stride=500, shift=np.zeros(60, dtype=np.int64))
    assert len(pieces.start) == 1
    (collated,) = collate(
        timeline,
        lively.tokenizer,
        pieces,
        [
            Placement(
                chosen=np.array([0]),
                place=np.array([4]),
                shape=(1, 4 + int(pieces.lengths[0])),
            )
        ],
        features=True,
    )
    with torch.inference_mode():
        outputs, _ = lively.network(collated.batch)
    whole = Predictor(replace(lively.spec, context=500), lively.network)
    np.testing.assert_allclose(survival(outputs), whole.raw(timeline, cuts).survival, atol=1e-5)


def test_probabilities_grow_with_the_horizon(shop: Sequences, lively: Predictor) -> None:
    result = predict(lively, shop, START + 44 * DAY)
    assert (result["purchase_7d"] >= result["purchase_3d"]).all()
    for name, values in result.items():
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert name.startswith("spend") or (values <= 1).all()


def test_saved_and_loaded_predicts_the_same(
    shop: Sequences, trained: TrainedModel, tmp_path: Path
) -> None:
    trained.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]
    for path in tmp_path.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # pickle, or torch's zip of it
    loaded = Predictor.load(tmp_path)
    assert loaded.spec == trained.shipped.spec
    expected = predict(trained.shipped, shop, START + 44 * DAY)
    for name, values in predict(loaded, shop, START + 44 * DAY).items():
        np.testing.assert_array_equal(values, expected[name])


def test_who_predicts_does_not_import_the_compiler(
    shop: Sequences, trained: TrainedModel, tmp_path: Path
) -> None:
    """It would take more than a second and 70 MiB of every process that predicts."""
    trained.save(tmp_path)
    shop.save(tmp_path)
    code = (
        "import sys, numpy, pathlib\n"
        "from pipelines.features.store import Sequences\n"
        "from pipelines.model.predictor import Predictor\n"
        "shop = Sequences.load(pathlib.Path())\n"
        f"now = numpy.full(shop.users, {START + 44 * DAY})\n"
        "Predictor.load(pathlib.Path()).predict(shop, now)\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_damaged_file_is_named(trained: TrainedModel, tmp_path: Path, name: str) -> None:
    trained.save(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    with pytest.raises(UserError, match=name):
        Predictor.load(tmp_path)


@pytest.mark.parametrize("key", ["heads", "mix", "calibration", "network"])
def test_settings_that_lack_something_are_named(
    trained: TrainedModel, tmp_path: Path, key: str
) -> None:
    trained.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config[key]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json: .*{key}"):
        Predictor.load(tmp_path)


def test_same_seed_same_bytes(shop: Sequences, vocabulary: Vocabulary, tmp_path: Path) -> None:
    def train(seed: int, folder: str) -> bytes:
        config = TINY.model_copy(update={"epochs": 1, "refit_epochs": 1, "seed": seed})
        (tmp_path / folder).mkdir()
        train_model(shop, PERIODS, TARGETS, config, vocabulary).save(tmp_path / folder)
        return b"".join(p.read_bytes() for p in sorted((tmp_path / folder).iterdir()))

    assert train(1, "a") == train(1, "b") != train(2, "c")


def test_nothing_after_the_bound_reaches_the_first_fit(
    shop: Sequences, vocabulary: Vocabulary, trained: TrainedModel
) -> None:
    """Whatever happens from the calibration cut on, the first fit's weights are the same."""
    late = shop.ts >= PERIODS.calibration
    other = replace(shop, type=np.where(late, 2, shop.type).astype(np.uint8))
    config = TINY.model_copy(update={"refit_epochs": 0})
    one = train_model(shop, PERIODS, TARGETS, config, vocabulary).first.network.state_dict()
    two = train_model(other, PERIODS, TARGETS, config, vocabulary).first.network.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("believed", [True, False])
def test_a_refit_gets_the_level_that_is_believed(
    shop: Sequences,
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    believed: bool,
) -> None:
    heads = Heads.for_targets(TARGETS)
    doubt = np.full((len(heads.events), len(heads.grid)), 0.0 if believed else 1e12)
    monkeypatch.setattr("pipelines.model.training.doubt_level", lambda *_: doubt)
    config = TINY.model_copy(update={"refit_epochs": 2, "refit_rate": 1.0})
    trained = train_model(shop, PERIODS, TARGETS, config, vocabulary)
    shortest = min(target.horizon_days for target in TARGETS) * DAY
    times = range(PERIODS.calibration, PERIODS.test - shortest + 1, shortest)
    timeline = Timeline(shop)
    cuts = Cuts.join([population(timeline, ts, PERIODS.active_days) for ts in times])
    assert len(cuts) > 50
    for first, refit in (
        (trained.first, trained.shipped),
        (trained.network_first, trained.network),
    ):
        before, after, alone = (
            p.predict_cuts(timeline, cuts.user, cuts.ts)
            for p in (first, refit, refit.calibrated(Calibration(), {}))
        )
        for name, values in after.items():
            # That of amounts is the corrected first fit's in any case.
            kept = before if believed or name.startswith("spend") else alone
            assert values.mean() == pytest.approx(kept[name].mean(), rel=1e-3), name
            assert np.abs(values - before[name]).max() > 1e-5


@pytest.mark.parametrize("rounds", [0, 20])
def test_without_a_refit_calibration_and_thresholds_stay(
    shop: Sequences, vocabulary: Vocabulary, rounds: int
) -> None:
    """The first fit has not learnt from the calibration windows: nothing is put between."""
    trees = TINY.trees.model_copy(update={"rounds": rounds})
    config = TINY.model_copy(update={"refit_epochs": 0, "trees": trees})
    trained = train_model(shop, PERIODS, TARGETS, config, vocabulary)
    pairs = [(trained.network_first, trained.network)]
    if not rounds:
        pairs.append((trained.first, trained.shipped))
    for first, last in pairs:
        assert last.spec == first.spec
        assert all(
            torch.equal(value, first.network.state_dict()[name])
            for name, value in last.network.state_dict().items()
        )


def test_rows_that_trees_are_stopped_by_have_a_bound(
    shop: Sequences, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short horizons beside long ones make many cuts, and a row's features take kilobytes."""
    rows: list[int] = []

    def collect(timeline: Timeline, cuts: Cuts, *others: Any, **settings: Any) -> Any:
        rows.append(len(cuts))
        return collect_rows(timeline, cuts, *others, **settings)

    monkeypatch.setattr("pipelines.model.growing.collect_rows", collect)
    trees = TINY.trees.model_copy(update={"rounds": 5, "max_rows": 30})
    config = TINY.model_copy(update={"refit_epochs": 0, "epochs": 1, "trees": trees})
    train_model(shop, PERIODS, TARGETS, config, vocabulary)
    assert rows == [30, 30, 30]


def test_cuts_that_tell_corrections_have_a_bound(
    shop: Sequences, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network predicts each of them."""
    seen: list[Cuts] = []

    def correct(*given: Any) -> Predictor:
        seen.append(given[2])
        return calibrate(*given)

    monkeypatch.setattr("pipelines.model.training.calibrate", correct)
    monkeypatch.setattr("pipelines.model.growing._MOST_CUTS", 25)
    trees = TINY.trees.model_copy(update={"rounds": 0})
    config = TINY.model_copy(update={"refit_epochs": 0, "epochs": 1, "trees": trees})
    train_model(shop, PERIODS, TARGETS, config, vocabulary)
    assert [len(cuts) for cuts in seen] == [25]
    assert seen[0].ts.min() == PERIODS.calibration
    assert len(np.unique(seen[0].ts)) > 1


def auc(score: np.ndarray[Any, Any], label: np.ndarray[Any, Any]) -> float:
    wins = (score[label][:, None] > score[~label]) + 0.5 * (score[label][:, None] == score[~label])
    return float(wins.mean())


@pytest.mark.integration
def test_learns_a_pattern_and_not_shuffled_labels() -> None:
    """A search announces a purchase; with purchases given to other users nothing does."""
    rng = np.random.default_rng(5)

    def make(shuffled: bool) -> tuple[Sequences, np.ndarray[Any, Any]]:
        users: list[list[dict[str, Any]]] = []
        bought = np.zeros(300, dtype=bool)
        for user in range(300):
            events: list[dict[str, Any]] = []
            for week in range(8):
                at = START + int((7 * week + rng.random()) * DAY)
                eager = rng.random() < 0.4
                events.append({"ts": at, "event_type": "search" if eager else "view"})
                buys = eager if not shuffled else rng.random() < 0.4
                if buys:
                    events.append({"ts": at + 2 * DAY, "event_type": "purchase", "price": 5.0})
                bought[user] = buys  # of the last week
            users.append(events)
        return encode_events(users), bought

    periods = replace(
        PERIODS, first=START + 7 * DAY, calibration=START + 42 * DAY, test=START + 49 * DAY
    )
    config = TINY.model_copy(
        update={"epochs": 10, "refit_epochs": 0, "learning_rate": 0.01, "fusion": False}
    )
    scores = {}
    for shuffled in (False, True):
        sequences, bought = make(shuffled)
        trained = train_model(sequences, periods, TARGETS, config, Vocabulary())
        now = START + 50 * DAY + 1
        scores[shuffled] = auc(predict(trained.shipped, sequences, now)["purchase_3d"], bought)
    assert scores[False] > 0.95
    assert 0.4 < scores[True] < 0.6


@pytest.mark.parametrize("backbone", ["gpt", "bert"])
def test_pretraining_learns_and_reaches_the_fit(
    shop: Sequences, vocabulary: Vocabulary, backbone: str
) -> None:
    config = TINY.model_copy(update={"backbone": backbone, "epochs": 1, "refit_epochs": 0})
    losses: list[float] = []
    weights = pretrain_model(
        shop,
        PERIODS,
        TARGETS,
        config,
        Pretrain(epochs=10, learning_rate=0.01),
        vocabulary,
        lambda epoch: losses.append(epoch["next_event_loss"]),
    )
    assert losses[-1] < 0.9 * losses[0]
    assert not any(name.startswith(("hazard.", "amount.")) for name in weights)
    with_ = train_model(shop, PERIODS, TARGETS, config, vocabulary, pretrained=weights)
    without = train_model(shop, PERIODS, TARGETS, config, vocabulary)
    name = "category.weight"
    moved = (with_.first.network.state_dict()[name] - weights[name]).norm()
    assert moved < (without.first.network.state_dict()[name] - weights[name]).norm()


def test_pretraining_of_another_network_is_refused(shop: Sequences, vocabulary: Vocabulary) -> None:
    with pytest.raises(UserError, match=r"models/pretrained: other\.weight"):
        train_model(
            shop, PERIODS, TARGETS, TINY, vocabulary, pretrained={"other.weight": torch.ones(1)}
        )


def test_one_huge_user(shop: Sequences, vocabulary: Vocabulary, lively: Predictor) -> None:
    rng = np.random.default_rng(0)
    count = 100_000
    ts = np.sort(START + rng.integers(46 * DAY, size=count))
    small = {name: getattr(shop, name) for name in ("query_offsets", "query_tokens")}
    huge = Sequences(
        offsets=np.array([0, count]),
        ts=ts,
        type=rng.integers(1, 9, size=count).astype(np.uint8),
        **{n: np.zeros(count, dtype=np.uint32) for n in ("item", "category", "brand")},
        **{n: np.full(count, np.nan, dtype=np.float32) for n in ("price", "quantity")},
        query=np.zeros(count, dtype=np.int32),
        session_start=np.zeros(count, dtype=np.uint8),
        **small,
        age=np.array([np.nan], dtype=np.float32),
        gender=np.zeros(1, dtype=np.uint32),
        region=np.zeros(1, dtype=np.uint32),
        signup_ts=np.zeros(1, dtype=np.int64),
    )
    assert np.isfinite(predict(lively, huge, int(ts[-1]) + 1)["purchase_7d"]).all()
    config = TINY.model_copy(update={"epochs": 1, "refit_epochs": 0})
    model = train_model(huge, PERIODS, TARGETS, config, vocabulary)
    assert np.isfinite(predict(model.shipped, huge, PERIODS.test)["spend_7d"]).all()


def test_no_categories_no_profiles(shop: Sequences) -> None:
    blank = replace(shop, category=np.zeros_like(shop.category), gender=np.zeros_like(shop.gender))
    config = TINY.model_copy(update={"epochs": 1, "refit_epochs": 0})
    model = train_model(blank, PERIODS, TARGETS, config, Vocabulary())
    assert np.isfinite(predict(model.shipped, blank, PERIODS.test)["purchase_7d"]).all()


def test_nobody_to_learn_from(shop: Sequences, vocabulary: Vocabulary) -> None:
    periods = replace(PERIODS, first=PERIODS.calibration)
    with pytest.raises(UserError, match="nobody has a history"):
        train_model(shop, periods, TARGETS, TINY, vocabulary)
