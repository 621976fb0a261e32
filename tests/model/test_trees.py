"""Trees are LightGBM's, damaged ones are refused, and moving levels are told from chance."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
import torch

from pipelines.config import EnsembleTrees, Train
from pipelines.errors import UserError
from pipelines.features.store import Sequences
from pipelines.model.boosting import (
    Rows,
    _measure_levels,
    flatten,
    grow_trees,
    measure_moves,
)
from pipelines.model.explanation import explain
from pipelines.model.timeline import DAY, Timeline
from pipelines.model.tokens import Vocabulary, encode_calendar
from pipelines.model.training import TrainedModel, train_model
from pipelines.model.trees import Mix, Trees
from tests.model.conftest import PERIODS, START, TARGETS, TINY

SETTINGS = EnsembleTrees(rounds=20, early_stopping=5, min_child_samples=5)
SOME = TINY.model_copy(update={"trees": SETTINGS})


def make_data(rows: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Features of few values, so that many lie right at a threshold, and a label they tell."""
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(size=(rows, 6)), 1).astype(np.float32)
    y = (x[:, 0] * x[:, 1] + x[:, 2] + rng.normal(0, 0.5, rows) > 0).astype(np.float64)
    return x, y


@pytest.fixture(scope="module")
def boosters() -> list[lgb.Booster]:
    x, y = make_data(2000)
    settings = {"verbose": -1, "num_leaves": 15, "num_threads": 1}
    return [
        lgb.train({"objective": kind} | settings, lgb.Dataset(x, label), num_boost_round=25)
        for kind, label in (("binary", y), ("tweedie", y * 3))
    ]


@pytest.fixture(scope="module")
def trees(boosters: list[lgb.Booster]) -> Trees:
    # The output between the two has no trees.
    first, last = (
        [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]]
        for booster in boosters
    )
    return flatten([first, [], last])


@pytest.fixture(scope="module")
def model(shop: Sequences, vocabulary: Vocabulary) -> TrainedModel:
    return train_model(shop, PERIODS, TARGETS, SOME, vocabulary)


def test_they_score_as_lightgbm_does(boosters: list[lgb.Booster], trees: Trees) -> None:
    x, _ = make_data(3000, seed=2)
    scores = trees.score(x)
    for column, booster in ((0, boosters[0]), (2, boosters[1])):
        np.testing.assert_allclose(
            scores[:, column], booster.predict(x, raw_score=True), rtol=1e-12, atol=1e-12
        )
    assert (scores[:, 1] == 0).all()
    assert trees.known.tolist() == [True, False, True]


def test_a_score_does_not_depend_on_company(trees: Trees) -> None:
    x, _ = make_data(3000, seed=3)
    together = trees.score(x)
    for row in (0, 17, 2999):
        np.testing.assert_array_equal(trees.score(x[row : row + 1])[0], together[row])
    assert trees.score(x[:0]).shape == (0, 3)


def test_effects_add_up_and_are_of_the_features_that_tell(trees: Trees) -> None:
    x, _ = make_data(500, seed=4)
    effect, base = trees.attribute(x, 0)
    np.testing.assert_allclose(base + effect.sum(axis=1), trees.score(x)[:, 0], atol=1e-9)
    importance = np.abs(effect).mean(axis=0)
    assert importance[:3].min() > 3 * importance[3:].max()
    effect, base = trees.attribute(x, 1)
    assert not effect.any()
    assert not base.any()


def test_saved_and_read_again(trees: Trees) -> None:
    read = Trees.from_tensors(trees.to_tensors(), outputs=3, features=6)
    x, _ = make_data(50)
    np.testing.assert_array_equal(read.score(x), trees.score(x))
    assert not Trees.none(3).to_tensors()
    assert len(Trees.from_tensors({}, outputs=3, features=6)) == 0


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("feature", 0, 6),
        ("feature", 0, -1),
        ("child", 0, 0),  # a root that leads to itself with a finite threshold
        ("child", 5, 1),  # a way back
        ("child", 0, 1 << 30),
        ("root", 0, -1),
        ("output", 0, 3),
        ("value", 0, np.nan),
    ],
)
def test_what_points_outside_is_refused(trees: Trees, name: str, place: int, value: float) -> None:
    tensors = {k: v.clone() for k, v in trees.to_tensors().items()}
    tensors[f"trees.{name}"][place] = value
    with pytest.raises(UserError, match="trees are damaged"):
        Trees.from_tensors(tensors, outputs=3, features=6)


def test_missing_and_misshapen_arrays_are_refused(trees: Trees) -> None:
    whole = trees.to_tensors()
    for name in whole:
        for other in (None, whole[name][:-1], whole[name].double().half(), whole[name][None]):
            tensors = {k: v for k, v in whole.items() if k != name}
            if other is not None:
                tensors[name] = other
            with pytest.raises(UserError, match="trees are damaged"):
                Trees.from_tensors(tensors, outputs=3, features=6)


def test_outputs_unwanted_or_of_which_too_little_is_known_have_no_trees() -> None:
    x, y = make_data(400)
    outcomes = np.stack([y, np.zeros(400), np.full(400, np.nan), y * 2], axis=1)
    rows = Rows(x=x, y=outcomes, ts=np.zeros(400, dtype=np.int64))
    for wanted, known in (
        ([True, True, True, True], [True, False, False, True]),
        ([False, True, True, True], [False, False, False, True]),
    ):
        first, second = grow_trees(
            rows,
            rows,
            rows,
            amounts=1,
            wanted=np.array(wanted),
            config=SETTINGS,
            learning_rate=0.1,
            period=DAY,
            weekdays=False,
            half_life=None,
            seed=1,
        )
        assert first.known.tolist() == second.known.tolist() == known


def live(level: np.ndarray, pull: np.ndarray, each: int = 400) -> Rows:
    """Draw who buys at some weeks, each a shop of its own.

    The first feature is how long ago somebody came, which says nothing of whether they buy; the
    second says that.

    Args:
        level: log odds of every week.
        pull: what the second feature adds to them in that week.
        each: shoppers a week.
    """
    rng = np.random.default_rng(9)
    week = np.repeat(np.arange(len(level)), each)
    x = rng.normal(size=(len(week), 3)).astype(np.float32)
    x[:, 0] = rng.uniform(0, week + 1)
    odds = level[week] + pull[week] * x[:, 1]
    y = (rng.random(len(week)) < 1 / (1 + np.exp(-odds))).astype(np.float64)
    return Rows(x=x, y=y[:, None], ts=START + week * 7 * DAY)


def grow(rows: Rows, **settings: Any) -> Trees:
    """Return what was grown on all weeks but the last four, which stop it."""
    early = rows.ts < rows.ts.max() - 21 * DAY
    fit, stop = (Rows(x=rows.x[k], y=rows.y[k], ts=rows.ts[k]) for k in (early, ~early))
    given = {
        "amounts": 0,
        "learning_rate": 0.1,
        "period": DAY,
        "weekdays": False,
        "half_life": None,
        "seed": 1,
    } | settings
    config = EnsembleTrees(rounds=100, early_stopping=40, min_child_samples=20)
    first, _ = grow_trees(fit, stop, rows, wanted=np.array([True]), config=config, **given)
    return first


def test_the_level_of_amounts_is_that_of_their_means() -> None:
    rng = np.random.default_rng(4)
    week = np.repeat(np.arange(20), 500)
    factor = np.exp(rng.normal(0, 0.6, size=20))
    y = np.where(rng.random(len(week)) < 0.3, rng.exponential(10 * factor[week]), 0.0)
    y[week == 3] = 0.0  # nobody bought, which tells no level
    y[:100] = np.nan
    rows = Rows(x=np.zeros((len(y), 1), np.float32), y=y[:, None], ts=START + week * 7 * DAY)
    level, information, ago = _measure_levels(rows, 0, "amount", 7 * DAY)
    assert (ago == 19 - week[100:]).all()
    others = np.arange(20) != 16
    assert np.abs(level - np.log(3 * factor[::-1]))[others].mean() < 0.12
    # Half as many as there are buyers, who spend as an exponential does.
    assert information[others][:-1] == pytest.approx(75, rel=0.35)
    assert information[~others] == 0
    # Every other period is empty, and tells nothing.
    level, information, ago = _measure_levels(rows, 0, "amount", 7 * DAY // 2)
    assert (ago == 2 * (19 - week[100:])).all()
    assert np.isfinite(level).all()
    assert (information[1::2] == 0).all()


def test_trees_learn_who_buys_and_not_when() -> None:
    """A level that falls all the time is no reason to think less of who came early."""
    weeks = np.arange(40)
    rows = live(1.0 - weeks / 10, 0.7 + 0.0 * weeks)
    trees = grow(rows)
    now = rows.x[rows.ts == rows.ts.max()]
    effect, _ = trees.attribute(now, 0)
    moved = effect.std(axis=0)
    assert moved[1] > 3 * moved[0]


def test_trees_ship_as_of_the_last_time_and_never_ask_for_it() -> None:
    """What once spoke for a purchase and now speaks against it does so for predictions."""
    weeks = np.arange(40)
    rows = live(0.0 * weeks - 0.5, np.where(weeks < 12, 1.0, -1.0))
    trees = grow(rows)
    low, high = (np.array([[20.0, side, 0.0]], dtype=np.float32) for side in (-1.0, 1.0))
    assert trees.score(low) > trees.score(high) + 1.2
    assert trees.feature.max() < 3


def test_trees_start_from_the_latest_level() -> None:
    weeks = np.arange(40)
    rows = live(np.where(weeks < 20, -2.0, 0.0), 0.0 * weeks)
    now = rows.x[rows.ts == rows.ts.max()]
    old, new = (grow(rows, half_life=days).score(now).mean() for days in (None, 14.0))
    assert old < -0.5
    assert new == pytest.approx(0.0, abs=0.25)


@pytest.mark.parametrize("weekdays", [False, True])
def test_what_a_weekday_does_is_learnt_and_no_level(weekdays: bool) -> None:
    """Who starts from a level that holds its weekday has nothing to learn of that."""
    rng = np.random.default_rng(9)
    day = np.repeat(np.arange(70), 200)
    better = day % 7 == (START // DAY + 3) % 7
    odds = np.where(better, 0.0, -2.0) + rng.normal(0, 0.5, size=70)[day]
    y = (rng.random(len(day)) < 1 / (1 + np.exp(-odds))).astype(np.float64)
    ts = START + day * DAY
    rows = Rows(x=encode_calendar(ts), y=y[:, None], ts=ts)
    trees = grow(rows, weekdays=weekdays)
    said = trees.score(rows.x)[:, 0]
    told = said[better].mean() - said[~better].mean()
    assert 1.0 < told < 2.0 if weekdays else told < 0.2


@pytest.mark.parametrize(("buyers", "known"), [(4, False), (5, True), (19, True)])
def test_few_buyers_are_enough_to_learn_from(buyers: int, known: bool) -> None:
    x = np.random.default_rng(4).normal(size=(600, 6)).astype(np.float32)
    y = np.zeros((600, 1))
    y[np.argsort(-x[:, 2])[:buyers]] = 1
    rows = Rows(x=x, y=y, ts=np.zeros(600, dtype=np.int64))
    first, _ = grow_trees(
        rows,
        rows,
        rows,
        amounts=0,
        wanted=np.array([True]),
        config=SETTINGS,
        learning_rate=0.1,
        period=DAY,
        weekdays=False,
        half_life=None,
        seed=1,
    )
    assert first.known.tolist() == [known]
    if known:
        bought = y[:, 0] > 0
        score = first.score(x)[:, 0]
        assert score[bought].mean() > score[~bought].max() - 1e-9
        assert np.mean(score[bought, None] > score[None, ~bought]) > 0.9


@pytest.mark.parametrize("variance", [0.0, 0.04])
def test_how_much_levels_move_is_told_from_chance(trees: Trees, variance: float) -> None:
    """Everyone at eighty weekly times; one output moves, one has no trees, one stays."""
    rng = np.random.default_rng(8)
    times, everyone, week = 80, 600, 7 * DAY
    x, _ = make_data(times * everyone)
    when = np.repeat(np.arange(times), everyone)
    # Two weeks share half of what a fortnight's window moves by.
    weekly = rng.normal(0, np.sqrt(variance), times + 1)
    level = ((weekly[1:] + weekly[:-1]) / np.sqrt(2))[when]
    odds = trees.score(x)
    odds[:, 0] += level
    y = (rng.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(np.float64)
    y[when % 9 == 4, 0] = np.nan  # as of windows that are not closed
    rows = Rows(x=x, y=y, ts=START + when * week)
    moves = measure_moves(rows, trees, np.array([14.0, 14.0, 7.0]), step=week)
    assert moves[1] == 0  # has no trees
    assert moves[2] < 0.002
    assert moves[0] == pytest.approx(variance, rel=0.3, abs=0.002)
    assert (measure_moves(rows, trees, np.full(3, np.nan), step=week) == 0).all()
    # Windows of ten days that begin a week apart overlap; those a fortnight apart do not.
    longer = measure_moves(rows, trees, np.array([10.0, 14.0, 7.0]), step=week)
    assert longer[0] == moves[0]
    # Nothing is as far apart as such a window is long.
    assert (measure_moves(rows, trees, np.full(3, 7.0 * times), step=week) == 0).all()
    unknown = replace(rows, y=np.full_like(y, np.nan))
    none = Rows(x=x[:0], y=y[:0], ts=rows.ts[:0])
    for empty in (unknown, none):
        assert (measure_moves(empty, trees, np.full(3, 7.0), step=week) == 0).all()


def test_batches_side_by_side_say_the_same(
    shop: Sequences, model: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.model.predictor._TOKENS_PER_BATCH", 512)
    timeline = Timeline(shop)
    cuts = timeline.cuts(np.arange(shop.users), np.full(shop.users, START + 44 * DAY))
    one, of_trees = model.first.parts(timeline, cuts, 5)
    other, also_of_trees = model.first.parts(timeline, cuts, 5, workers=3)
    np.testing.assert_array_equal(one.raw.survival, other.raw.survival)
    np.testing.assert_array_equal(one.raw.amount, other.raw.amount)
    np.testing.assert_array_equal(one.items, other.items)
    np.testing.assert_array_equal(one.chances, other.chances)
    np.testing.assert_array_equal(of_trees, also_of_trees)

    def fail(_: Trees, features: np.ndarray) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(Trees, "score", fail)
    with pytest.raises(MemoryError):
        model.first.parts(timeline, cuts, workers=3)


def test_both_answer_as_one(shop: Sequences, model: TrainedModel) -> None:
    timeline = Timeline(shop)
    cuts = timeline.cuts(np.arange(shop.users), np.full(shop.users, START + 44 * DAY))
    predictor = model.first
    ahead, scores = predictor.parts(timeline, cuts)
    said = ahead.raw
    heads = predictor.spec.heads
    events, bins = len(heads.events), len(heads.grid)

    def join(share: float) -> np.ndarray:
        mix = Mix(events=dict.fromkeys(heads.events, share))
        return predictor.beside(predictor.trees, mix).join(said, scores).survival

    np.testing.assert_array_equal(join(1.0), said.survival)
    known = predictor.trees.known[: events * bins].reshape(events, bins)
    asked = np.isin(heads.grid, [target.horizon_days for target in predictor.targets])
    assert known.any()
    assert not known[:, ~asked].any()
    odds = scores[:, : events * bins].reshape(-1, events, bins)
    alone = np.where(known, 1.0 / (1.0 + np.exp(odds)), said.survival)
    # Between the horizons the odds change as at the next one.
    for event in range(events):
        for place in np.flatnonzero(~asked):
            later = place + int(asked[place:].argmax())
            own, its = (said.survival[:, event, p].clip(1e-6, 1 - 1e-6) for p in (place, later))
            new = alone[:, event, later].clip(1e-6, 1 - 1e-6)
            ratio = new / (1 - new) * (1 - its) / its
            alone[:, event, place] = ratio * own / (1 - own + ratio * own)
    np.testing.assert_allclose(join(0.0), np.minimum.accumulate(alone, axis=2), atol=1e-5)
    half = join(0.5)
    assert np.abs(half - said.survival).max() > 0.01
    assert (np.diff(half, axis=2) <= 0).all()
    whole = np.flatnonzero(known[:, asked].all(axis=1))
    assert len(whole)
    for event in whole:
        both = np.stack([join(0.0)[:, event], said.survival[:, event]])
        assert (half[:, event] >= both.min(axis=0) - 1e-5).all()
        assert (half[:, event] <= both.max(axis=0) + 1e-5).all()


def test_the_network_alone_is_kept_beside(shop: Sequences, model: TrainedModel) -> None:
    assert len(model.shipped.trees) > 0
    assert len(model.network.trees) == 0
    now = np.full(shop.users, START + 44 * DAY)
    both, alone = model.shipped.predict(shop, now), model.network.predict(shop, now)
    assert any(not np.array_equal(both[name], alone[name]) for name in both)


def test_they_grow_the_same_beside_the_network(
    shop: Sequences, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown_in: list[threading.Thread] = []

    def grow(*rows: Rows, **settings: Any) -> tuple[Trees, Trees]:
        grown_in.append(threading.current_thread())
        return grow_trees(*rows, **settings)

    monkeypatch.setattr("pipelines.model.growing.grow_trees", grow)
    monkeypatch.setattr("pipelines.model.growing.os.cpu_count", lambda: 2)
    trees = []
    for threads in (2, 1):
        changes = {"epochs": 1, "refit_epochs": 0, "threads": threads}
        config: Train = SOME.model_copy(update=changes)
        trees.append(train_model(shop, PERIODS, TARGETS, config, vocabulary).shipped.trees)
    assert [thread is threading.main_thread() for thread in grown_in] == [True, False]
    after, beside = (found.to_tensors() for found in trees)
    assert len(trees[0]) > 0
    assert all(torch.equal(tensor, beside[name]) for name, tensor in after.items())


def test_nothing_after_a_bound_is_learnt(shop: Sequences, vocabulary: Vocabulary) -> None:
    """Other events from the first test cut on leave weights, trees and belief as they are."""
    later = shop.ts >= PERIODS.test
    assert later.any()
    other = replace(
        shop,
        type=np.where(later, 6, shop.type).astype(np.uint8),
        price=np.where(later, 999, shop.price).astype(np.float32),
    )
    config: Train = SOME.model_copy(update={"epochs": 1, "refit_epochs": 0})
    a, b = (train_model(s, PERIODS, TARGETS, config, vocabulary).shipped for s in (shop, other))
    assert a.spec == b.spec
    assert len(a.trees) > 0
    tensors = b.trees.to_tensors()
    for name, tensor in a.trees.to_tensors().items():
        assert torch.equal(tensor, tensors[name])


def test_explanations_of_both_add_up(shop: Sequences, model: TrainedModel) -> None:
    predictor = model.shipped
    heads = predictor.spec.heads
    halves = Mix(events=dict.fromkeys(heads.events, 0.5))
    predictor = predictor.beside(predictor.trees, halves)
    timeline = Timeline(shop)
    cuts = timeline.cuts(np.arange(20), np.full(20, START + 44 * DAY))
    found = explain(predictor, timeline, cuts, TARGETS[1], steps=48)
    place = heads.events.index("purchase"), heads.grid.index(TARGETS[1].horizon_days)
    stays = predictor.raw(timeline, cuts).survival[:, place[0], place[1]]
    np.testing.assert_allclose(found.value, np.log((1 - stays) / stays), atol=1e-3)
    assert (found.gap < 0.05 * np.abs(found.value - found.base) + 0.05).all()
