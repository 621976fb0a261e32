"""The next item: probabilities, what is learnt, and what may be seen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import Pretrain
from pipelines.features.store import encode_events, hash_text
from pipelines.model.items import RECENT, ItemHead
from pipelines.model.timeline import DAY, Timeline
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import TrainedModel, pretrain_model, train_model
from tests.model.conftest import PERIODS, START, TARGETS, TINY

ITEMS = ("a", "b", "c", "d", "e", "f")
VOCABULARY = Vocabulary(item=tuple(hash_text(i) for i in ITEMS), item_id=ITEMS)


def make_loyal(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Looks at one item of their own most of the time."""
    own = rng.choice(len(ITEMS))
    times = np.sort(rng.uniform(0, 60, 40))
    picks = np.where(rng.random(40) < 0.85, own, rng.integers(len(ITEMS), size=40))
    return [
        {"ts": START + int(t * DAY), "event_type": "view", "item_id": ITEMS[i]}
        for t, i in zip(times, picks, strict=True)
    ]


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    rng = np.random.default_rng(2)
    shop = encode_events([make_loyal(rng) for _ in range(80)])
    config = TINY.model_copy(update={"item_weight": 1.0, "epochs": 4, "learning_rate": 0.01})
    return train_model(shop, PERIODS, TARGETS[-2:-1], config, VOCABULARY)


def test_a_loyal_shopper_gets_their_own_item(trained: TrainedModel) -> None:
    histories = [[{"ts": START, "event_type": "view", "item_id": i}] * 6 for i in ITEMS]
    timeline = Timeline(encode_events(histories))
    now = np.full(len(ITEMS), START + DAY)
    ahead = trained.shipped.look_ahead(timeline, timeline.cuts(np.arange(6), now), 3)
    codes, values = ahead.items, ahead.chances
    assert codes[:, 0].tolist() == list(range(6))
    assert (values[:, 0] > 0.5).all()
    assert (np.diff(values, axis=1) <= 0).all()


def test_items_after_the_cut_are_not_seen(trained: TrainedModel) -> None:
    history = [{"ts": START, "event_type": "view", "item_id": "a"}]
    later = [*history, {"ts": START + 3 * DAY, "event_type": "view", "item_id": "f"}]
    timeline = Timeline(encode_events([history, later]))
    now = np.full(2, START + 3 * DAY)
    ahead = trained.shipped.look_ahead(timeline, timeline.cuts(np.arange(2), now), 6)
    codes, values = ahead.items, ahead.chances
    assert np.array_equal(codes[0], codes[1])
    assert np.allclose(values[0], values[1], atol=1e-6)


def test_a_model_of_no_items_tells_none() -> None:
    shop = encode_events([make_loyal(np.random.default_rng(i)) for i in range(20)])
    config = TINY.model_copy(update={"next_items": 0, "epochs": 1, "refit_epochs": 0})
    model = train_model(shop, PERIODS, TARGETS[-2:-1], config, VOCABULARY).shipped
    timeline = Timeline(shop)
    cuts = timeline.cuts(np.arange(20), np.full(20, START + 30 * DAY))
    ahead = model.look_ahead(timeline, cuts, 5)
    codes, values = ahead.items, ahead.chances
    assert codes.shape == values.shape == (20, 0)


@pytest.mark.parametrize(
    ("given", "learns"),
    [({}, True), ({"item_weight": 0.0}, False), ({"backbone": "bert"}, False)],
)
def test_pretraining_tells_the_next_item(given: dict[str, Any], learns: bool) -> None:
    rng = np.random.default_rng(2)
    shop = encode_events([make_loyal(rng) for _ in range(40)])
    weights = pretrain_model(
        shop,
        PERIODS,
        TARGETS[-2:-1],
        TINY.model_copy(update=given),
        Pretrain(epochs=1, learning_rate=0.01),
        VOCABULARY,
    )
    assert bool(weights["items.place.weight"].any()) == learns  # zero at first


def test_probabilities_sum_to_what_the_known_items_hold() -> None:
    torch.manual_seed(0)
    head = ItemHead(7, 4)
    with torch.no_grad():
        head.place.weight.normal_()
    recent = torch.full((3, RECENT), -1)
    recent[1, :2] = torch.tensor([4, 4])
    recent[2] = torch.arange(RECENT) % 7
    said = head.probabilities(torch.randn(3, 4), recent)
    assert torch.allclose(said.sum(dim=1), torch.ones(3), atol=1e-6)
    assert (said > 0).all()


def test_the_sampled_loss_over_all_items_is_the_exact_one() -> None:
    torch.manual_seed(0)
    head = ItemHead(7, 4)
    now, truth = torch.randn(5, 4), torch.tensor([0, 3, 6, 2, 2])
    recent = torch.randint(-1, 7, (5, RECENT))
    exact = -head.probabilities(now, recent)[torch.arange(5), truth].log().mean()
    assert head.loss(now, recent, truth, torch.arange(7)).item() == pytest.approx(
        exact.item(), rel=1e-4
    )


def test_recent_and_next_items_of_a_timeline() -> None:
    events = [
        {"ts": START + d * DAY, "event_type": "view", "item_id": i}
        for d, i in ((0, "a"), (1, None), (2, "b"), (4, "c"))
    ]
    other = [{"ts": START, "event_type": "search"}]
    timeline = Timeline(encode_events([events, other]))
    cuts = timeline.cuts(np.array([0, 0, 0, 1]), START + np.array([0, 3, 9, 3]) * DAY)
    named = {hash_text(i): i for i in ITEMS} | {0: ""}
    recent = [[named[int(h)] for h in row] for row in timeline.recent_items(cuts, 2)]
    assert recent == [["", ""], ["b", "a"], ["c", "b"], ["", ""]]
    close = np.full(4, START + 4 * DAY)
    assert [named[int(h)] for h in timeline.next_item(cuts, close)] == ["a", "", "", ""]
    assert [named[int(h)] for h in timeline.next_item(cuts, close + 1)] == ["a", "c", "", ""]
    after = timeline.after(np.array([0, 2, 3, 4]))
    recent = [[named[int(h)] for h in row] for row in timeline.recent_items(after, 2)]
    assert recent == [["a", ""], ["b", "a"], ["c", "b"], ["", ""]]
    assert [named[int(h)] for h in timeline.next_item(after, close + 1)] == ["b", "c", "", ""]


def test_days_until_the_event_is_the_median(trained: TrainedModel) -> None:
    model = trained.shipped
    (event,) = model.spec.heads.events
    grid = model.spec.heads.grid
    timeline = Timeline(encode_events([[{"ts": START, "event_type": "view"}]]))
    raw = model.raw(timeline, timeline.cuts(np.array([0]), np.array([START + DAY])))
    never = replace(raw, survival=np.full_like(raw.survival, 1 - 1e-9))
    soon = replace(raw, survival=np.full_like(raw.survival, 1e-9))
    assert np.isnan(model.days_until(never, event)).all()
    assert (model.days_until(soon, event) < grid[0]).all()
    assert (model.days_until(soon, event) > 0).all()


def test_embeddings_are_of_the_shopper_and_not_of_the_batch(trained: TrainedModel) -> None:
    rng = np.random.default_rng(9)
    histories = [make_loyal(rng) for _ in range(12)]
    timeline = Timeline(encode_events([*histories, histories[0]]))
    cuts = timeline.cuts(np.arange(13), np.full(13, START + 50 * DAY))
    found = trained.shipped.look_ahead(timeline, cuts, 0).embedding
    assert found.shape == (13, TINY.width)
    assert np.allclose(found[0], found[12], atol=1e-5)
    alone = trained.shipped.look_ahead(timeline, cuts.take([5]), 0).embedding
    assert np.allclose(found[5], alone[0], atol=1e-5)
    assert np.linalg.norm(found[1] - found[2]) > 1e-3
