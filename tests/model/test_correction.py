"""Belief in trees is chosen with care, and a refit's level lies between two that are in doubt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipelines.model.calibration import Calibration, log_odds, sigmoid
from pipelines.model.correction import (
    _between,
    _deviance,
    _label,
    _settle,
    calibrate,
    correct_refit,
    doubt_level,
)
from pipelines.model.heads import Heads
from pipelines.model.network import Network, NetworkConfig
from pipelines.model.predictor import ModelSpec, Predictor, Raw, count_outputs
from pipelines.model.timeline import DAY, Cuts, Labels, Timeline
from pipelines.model.tokens import Vocabulary
from pipelines.model.trees import Mix, Trees
from tests.model.conftest import START, TARGETS

HEADS = Heads.for_targets(TARGETS)
CLOSE = START + 30 * DAY
CUTS = 4_000


@pytest.mark.parametrize(("good", "expected"), [(0, 0.0), (20, 1.0), (None, 0.5)])
def test_belief_leaves_one_half_for_a_reason_only(good: int | None, expected: float) -> None:
    rng = np.random.default_rng(1)
    losses = np.tile(rng.exponential(size=400), (21, 1))
    # Some are told better by the one, some by the other, in all about as well.
    better = rng.normal(size=400)
    better += 0.3 * better.std() / np.sqrt(400) - better.mean()
    losses += better * 0.05 * np.arange(21)[:, None]
    if good is not None:
        losses += 0.5 * np.abs(np.arange(21) - good)[:, None]
    assert _settle(losses, np.arange(400) // 2) == expected


def test_belief_counts_shoppers_and_not_rows() -> None:
    """Forty weeks of one shopper are no forty shoppers."""
    gain = np.random.default_rng(2).normal(size=10)
    gain = 0.1 - (gain - gain.mean()) / gain.std()
    losses = np.repeat(gain, 40) * np.linspace(1.0, 0.0, 21)[:, None]
    assert _settle(losses, np.arange(400)) == 1.0
    assert _settle(losses, np.repeat(np.arange(10), 40)) == 0.5


def test_an_amount_is_told_best_by_itself() -> None:
    expected = np.linspace(0.5, 100, 200)
    for actual in (0.5, 20.0, 60.0):
        loss = _deviance(np.full(200, actual), expected)
        assert expected[loss.argmin()] == pytest.approx(actual, abs=0.5)
    # Who buys nothing is told best by the least.
    assert (np.diff(_deviance(np.zeros(200), expected)) > 0).all()


def test_who_leaves_does_nothing_within_the_horizon() -> None:
    heads = Heads.for_targets(TARGETS)
    delay = np.full((4, len(heads.events)), np.inf)
    delay[:, heads.events.index("search")] = [6.9, 7.0, np.inf, 1.0]
    delay[:, heads.events.index("any")] = [6.9, 7.0, np.inf, 0.5]
    labels = Labels(delay=delay, observed_days=np.full(4, 7.0), amount=np.zeros((4, 1), np.float32))
    told = {t.name: _label(t, heads, labels).tolist() for t in TARGETS if t.kind == "binary"}
    assert told["search_7d"] == [True, False, False, True]
    assert told["churn_7d"] == [False, True, True, False]
    assert not any(told["purchase_7d"])


def test_the_level_of_many_alike_windows_is_doubted_least() -> None:
    heads = Heads.for_targets(TARGETS)
    # All windows closed, and four weeks of them.
    begin, close, rows = START, START + 28 * DAY, 4_000
    ts = np.full(rows, begin)
    shape = (rows, len(heads.events), len(heads.grid))
    none = np.zeros((rows, 0))
    said = Raw(survival=np.full(shape, 0.5), amount=none, spend=none)
    # 1,000 of information and 100 of doubt; of the windows that differ by .3 four are seen.
    week = heads.grid.index(7)
    doubt = doubt_level(heads, said, ts, begin, close, np.full(shape[1:], 0.09))
    np.testing.assert_allclose(doubt[:, week], 1 / 1_100 + 0.09 / 4)
    np.testing.assert_allclose(doubt_level(heads, said, ts, begin, close, 0.0), 1 / 1_100)
    few = np.arange(40)
    fewer = doubt_level(heads, said.take(few), ts[few], begin, close, 0.0)
    np.testing.assert_allclose(fewer, 1 / 110)
    # Windows that end after the test cut tell nothing; of longer ones there is one at least.
    early = begin + 5 * DAY
    for place, days in enumerate(heads.grid):
        closed = doubt_level(heads, said, ts, begin, early, 0.09)[:, place]
        chance = 1 / 1_100 if days <= 5 else 1 / 100
        np.testing.assert_allclose(closed, chance + 0.09 / max(5 / days, 1))


def test_levels_meet_by_their_variances() -> None:
    rng = np.random.default_rng(3)
    odds = rng.normal(-1.0, 1.0, size=(5_000, 1)) + np.array([0.0, 0.1, 0.2])

    def probability(shift: float) -> np.ndarray[Any, Any]:
        return 1 / (1 + np.exp(-odds - shift))

    own = probability(0.0)
    mean = own.mean(axis=0)
    near = probability(0.04)
    for doubt, share in ((0.0, 1.0), (0.05**2, 0.5), (3 * 0.05**2, 0.25), (1e12, 0.0)):
        level = _between(own, near, np.full(3, doubt))
        np.testing.assert_allclose(level, mean + share * (near.mean(axis=0) - mean), atol=1e-9)
    # Ten standard deviations apart: the last steps must have left it there.
    far = probability(0.5).mean(axis=0)
    level = _between(own, probability(0.5), np.full(3, 0.05**2))
    assert ((level - mean) / (far - mean) > 0.98).all()
    # One interval's is believed, the next one's not: still never less than until the one before.
    level = _between(own, probability(0.5), np.array([0.0, 1e12, 1e12]))
    assert (np.diff(level) >= 0).all()
    assert level[0] == pytest.approx(far[0])


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    """A network that nobody asks, as what it says is given."""
    sizes = dict.fromkeys(
        ("types", "categories", "brands", "genders", "regions", "item_buckets", "query_buckets"), 4
    )
    config = NetworkConfig(
        backbone="gpt",
        width=8,
        layers=1,
        heads=2,
        dropout=0.0,
        **sizes,
        next_codes=4,
        features=0,
        fusion_width=8,
        events=len(HEADS.events),
        bins=len(HEADS.grid),
        amounts=len(HEADS.amounts),
        items=0,
    )
    spec = ModelSpec(
        network=config,
        vocabulary=Vocabulary(),
        heads=HEADS,
        targets=TARGETS,
        context=8,
        calibration=Calibration(),
        thresholds={},
    )
    return Predictor(spec, Network(config))


class Told(Timeline):
    """A timeline of which the outcomes alone are asked."""

    def __init__(self, outcomes: Labels) -> None:
        self.outcomes = outcomes

    def labels(self, cuts: Cuts, **asked: Any) -> Labels:
        assert asked == {"events": HEADS.events, "horizons": HEADS.amounts, "close": CLOSE}
        return self.outcomes


def draw_odds(seed: int = 5) -> np.ndarray[Any, Any]:
    """Log odds of every event until every interval's end, growing, (CUTS, events, bins)."""
    rng = np.random.default_rng(seed)
    own = rng.normal(-1.5, 1.0, size=(CUTS, len(HEADS.events), 1))
    return own + 0.3 * np.arange(len(HEADS.grid))


def live(odds: np.ndarray[Any, Any], amount: np.ndarray[Any, Any], observed: float = 30) -> Told:
    """Draw what happens where these are the log odds and a buyer's expected amounts."""
    rng = np.random.default_rng(6)
    draw = rng.random((*odds.shape[:2], 1))
    first = (draw < sigmoid(odds)).argmax(axis=2)
    happens = draw[:, :, 0] < sigmoid(odds)[:, :, -1]
    delay = np.where(happens, np.array(HEADS.grid)[first] - 0.5, np.inf)
    week = HEADS.grid.index(7)
    bought = draw[:, HEADS.events.index("purchase")] < sigmoid(
        odds[:, HEADS.events.index("purchase"), week, None]
    )
    spent = np.where(bought, amount * rng.exponential(size=amount.shape), 0.0)
    return Told(
        Labels(
            delay=delay,
            observed_days=np.full(len(odds), float(observed)),
            amount=spent.astype(np.float32),
        )
    )


def cut_all() -> Cuts:
    return Cuts(
        user=np.arange(CUTS),
        ts=np.full(CUTS, START, dtype=np.int64),
        position=np.zeros(CUTS, dtype=np.int64),
    )


def say(odds: np.ndarray[Any, Any], amount: np.ndarray[Any, Any]) -> Raw:
    return Raw(survival=1.0 - sigmoid(odds), amount=amount, spend=np.zeros_like(amount))


def plant() -> Trees:
    """Trees that say nothing, one of every output."""
    outputs = count_outputs(HEADS)
    leaf = np.arange(outputs, dtype=np.int32)
    return Trees(
        outputs=outputs,
        output=leaf,
        root=leaf,
        feature=np.zeros(outputs, dtype=np.int32),
        threshold=np.full(outputs, np.inf, dtype=np.float32),
        child=leaf,
        value=np.zeros(outputs),
    )


def test_calibration_undoes_a_distortion_of_every_event_and_total(predictor: Predictor) -> None:
    truth, amount = draw_odds(), np.full((CUTS, 1), 20.0)
    distorted = (truth - 0.4) / 1.5
    told = live(truth, amount)
    raw = say(distorted, 3 * amount)
    none = np.zeros((CUTS, 0))
    fitted = calibrate(predictor, told, cut_all(), CLOSE, raw, none, "f1")
    corrected = fitted.spec.calibration.probability(HEADS.events, 1.0 - raw.survival)
    # What speaks against every correction leaves some of it.
    for name in HEADS.events:
        assert 1.3 < fitted.spec.calibration.slope[name] < 1.5
    off = np.abs(log_odds(corrected) - truth).mean()
    assert off < np.abs(distorted - truth).mean() / 2
    spent = fitted.finish(raw)["spend_7d"].sum(dtype=np.float64)
    total = told.outcomes.amount.sum(dtype=np.float64)
    assert total < spent < 1.4 * total  # of three times
    assert set(fitted.spec.thresholds) == {t.name for t in TARGETS if t.kind == "binary"}
    assert all(0.0 < threshold < 1.0 for threshold in fitted.spec.thresholds.values())


def test_windows_that_are_open_calibrate_nothing(predictor: Predictor) -> None:
    """Of an interval that has not closed nobody knows: its shift stays, and no call is chosen."""
    truth, amount = draw_odds(), np.full((CUTS, 1), 20.0)
    told = live(truth, amount, observed=3)
    fitted = calibrate(
        predictor, told, cut_all(), CLOSE, say(truth - 1.0, amount), np.zeros((CUTS, 0)), "f1"
    )
    shift = fitted.spec.calibration.shift["purchase"]
    for days, moved in zip(HEADS.grid, shift, strict=True):
        assert (moved > 0.4) if days <= 3 else (moved == 0.0)
    assert fitted.spec.calibration.factor == {"7": 1.0}
    assert fitted.spec.thresholds["purchase_7d"] == 0.5
    assert fitted.spec.thresholds["purchase_3d"] != 0.5


@pytest.mark.parametrize(("off", "share"), [(1.0, 1.0), (1e4, 0.0)])
def test_a_total_that_few_buyers_cannot_put_right_is_not_believed(
    predictor: Predictor, off: float, share: float
) -> None:
    """The network knows who spends, but by how much it is off stays where few have bought."""
    truth = draw_odds()
    amount = np.exp(np.random.default_rng(8).normal(3, 1, (CUTS, 1)))
    told = live(truth, amount)
    told.outcomes.amount[40:] = 0.0
    spent = np.where(np.arange(CUTS) < 40, amount[:, 0], 0.01)[:, None]
    scores = np.concatenate([truth.reshape(CUTS, -1), np.zeros((CUTS, 1))], axis=1)
    beside = predictor.beside(plant(), Mix())
    fitted = calibrate(beside, told, cut_all(), CLOSE, say(truth, off * spent), scores, "f1")
    assert fitted.spec.mix.amounts == pytest.approx({"7": share}, abs=0.3)


@pytest.mark.parametrize(("trees_know", "share"), [(True, 0.0), (False, 1.0)])
def test_who_knows_is_believed(predictor: Predictor, trees_know: bool, share: float) -> None:
    """Of network and trees one tells the truth, the other what has nothing to do with it."""
    truth, other = draw_odds(), draw_odds(seed=7)
    rng = np.random.default_rng(8)
    amount, noise = np.exp(rng.normal(3, 1, (2, CUTS, 1)))
    network, grown = (other, truth) if trees_know else (truth, other)
    week = HEADS.grid.index(7)
    buys = sigmoid(grown[:, HEADS.events.index("purchase"), week, None])
    spend = buys * (amount if trees_know else noise)
    scores = np.concatenate([grown.reshape(CUTS, -1), np.log(spend)], axis=1)
    beside = predictor.beside(plant(), Mix())
    # The network's total is off, which is put right afterwards and says nothing of its order.
    raw = say(network, 5 * (noise if trees_know else amount))
    fitted = calibrate(beside, live(truth, amount), cut_all(), CLOSE, raw, scores, "f1")
    assert fitted.spec.mix.events == pytest.approx(dict.fromkeys(HEADS.events, share), abs=0.15)
    assert fitted.spec.mix.amounts == pytest.approx({"7": share}, abs=0.3)


@pytest.mark.parametrize(("doubt", "told"), [(0.0, 1.0), (0.05**2, 0.5), (1e12, 0.0)])
def test_a_refit_keeps_the_slope_and_moves_its_level(
    predictor: Predictor, doubt: float, told: float
) -> None:
    truth, amount = draw_odds(), np.full((CUTS, 1), 20.0)
    slope = dict.fromkeys(HEADS.events, 1.0)
    shift = dict.fromkeys(HEADS.events, [0.04] * len(HEADS.grid))
    corrections = Calibration(slope=slope, shift=shift, factor={"7": 2.0})
    first = predictor.calibrated(corrections, {"purchase_7d": 0.3})
    raw = say(truth, amount)
    doubts = np.full(truth.shape[1:], doubt)
    refit = correct_refit(predictor, raw, first, raw, doubts)
    assert refit.spec.calibration.slope == slope
    assert refit.spec.thresholds == {"purchase_7d": 0.3}
    for name in HEADS.events:
        np.testing.assert_allclose(refit.spec.calibration.shift[name], 0.04 * told, atol=1e-3)
    # The total is that of the corrected first fit, whatever the level of buyers.
    total = first.finish(raw)["spend_7d"].sum(dtype=np.float64)
    assert refit.finish(raw)["spend_7d"].sum(dtype=np.float64) == pytest.approx(total, rel=1e-6)
    # The first fit's own predictions count, not the refit's.
    other = correct_refit(predictor, say(truth - 1.0, amount), first, raw, 0 * doubts)
    np.testing.assert_allclose(other.spec.calibration.shift["purchase"], 1.04, atol=1e-3)


def test_a_refit_without_windows_takes_the_corrections_as_they_are(predictor: Predictor) -> None:
    corrections = Calibration(slope={"purchase": 1.2}, shift={"purchase": [0.1] * len(HEADS.grid)})
    first = predictor.calibrated(corrections, {"purchase_7d": 0.3})
    nobody = say(draw_odds(), np.full((CUTS, 1), 20.0)).take(np.zeros(0, dtype=np.int64))
    refit = correct_refit(predictor, nobody, first, nobody, np.zeros(0))
    assert refit.spec.calibration == corrections
    assert refit.spec.thresholds == {"purchase_7d": 0.3}
