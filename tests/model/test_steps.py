"""Steps are the same whoever makes them, and move as a whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import Train
from pipelines.events import EVENT_CODES
from pipelines.features.store import Sequences, encode_events
from pipelines.model import steps
from pipelines.model.ahead import in_order
from pipelines.model.heads import HazardTargets, Heads, hazard_loss
from pipelines.model.network import Outputs, to_device
from pipelines.model.steps import Loader, Phase, Step
from pipelines.model.timeline import DAY, Timeline
from pipelines.model.tokens import Tokenizer, Vocabulary
from tests.model.conftest import PERIODS, START, TARGETS, TINY


def make_loader(shop: Sequences, config: Train) -> Loader:
    items = tuple(sorted({int(item) for item in shop.item} - {0}))
    tokenizer = Tokenizer(
        Vocabulary(item=items, item_id=tuple(map(str, items))), item_buckets=4, query_buckets=4
    )
    return Loader(
        Timeline(shop),
        tokenizer,
        Heads.for_targets(TARGETS),
        config,
        tokens_per_batch=config.tokens_per_batch or 2048,
        first=PERIODS.first,
        active_days=PERIODS.active_days,
    )


def find_tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from find_tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from find_tensors(getattr(value, field.name))


@pytest.mark.parametrize("backbone", ["gpt", "bert"])
@pytest.mark.parametrize("phase", list(Phase))
def test_steps_do_not_depend_on_who_makes_them(
    shop: Sequences, backbone: str, phase: Phase, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TINY.model_copy(update={"backbone": backbone, "tokens_per_batch": 128})
    found: list[list[Step]] = []
    for together in (1, 1000):
        monkeypatch.setattr(steps, "_TOGETHER", together)
        for workers in (0, 1, 3):
            loader = make_loader(shop, config)
            epoch = loader.epoch(PERIODS.calibration, phase, np.random.default_rng(5))
            found.append(list(loader.steps(epoch, workers)))
            assert len(found[-1]) == len(epoch) > 5
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a.events, a.cuts) == (b.events, b.cuts)
            for one, two in zip(find_tensors(a), find_tensors(b), strict=True):
                assert one.equal(two)
    told = [step.following is not None for step in found[0]]
    assert any(told) == (phase is Phase.PRETRAIN or backbone == "gpt")
    assert all((step.targets is None) == (phase is Phase.PRETRAIN) for step in found[0])


@pytest.mark.parametrize("phase", list(Phase))
def test_items_are_told_at_nows_and_in_pretraining_at_events(shop: Sequences, phase: Phase) -> None:
    told = {}
    for backbone in ("gpt", "bert"):
        loader = make_loader(shop, TINY.model_copy(update={"backbone": backbone}))
        epoch = loader.epoch(PERIODS.calibration, phase, np.random.default_rng(5))
        told[backbone] = [step for step in loader.steps(epoch) if step.items is not None]
        for step in told[backbone]:
            assert step.items is not None
            batch = step.batch
            where = batch.event_place if phase is Phase.PRETRAIN else batch.now_place
            assert torch.isin(step.items.places, where).all()
    assert told["gpt"]
    # Masked pretraining shows what comes next.
    assert bool(told["bert"]) == (phase is not Phase.PRETRAIN)


@pytest.mark.parametrize("free", [1 << 18, 5, 2000])
def test_an_epoch_has_no_more_cuts_than_events_but_some(
    shop: Sequences, free: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_FREE_CUTS", free)
    loader = make_loader(shop, TINY.model_copy(update={"cuts_per_user": 64}))
    close = PERIODS.calibration
    events = int((loader.timeline.ts < close).sum())
    assert 5 < events < 2000 < 64 * shop.users
    pieces, _ = loader.place(close, Phase.FIT, np.random.default_rng(5))
    assert len(pieces.cuts) == min(64 * shop.users, max(events, free))


def test_an_epoch_drawn_ahead_is_that_which_a_resumed_training_draws(shop: Sequences) -> None:
    rng, before = np.random.default_rng(5), torch.get_rng_state()
    loader = make_loader(shop, TINY)
    first, second = (loader.epoch(PERIODS.calibration, Phase.FIT, rng) for _ in range(2))
    other = np.random.default_rng()
    other.bit_generator.state = json.loads(json.dumps(first.state))
    again = loader.epoch(PERIODS.calibration, Phase.FIT, other)
    for one, two in zip(loader.steps(second), loader.steps(again, 2), strict=True):
        for a, b in zip(find_tensors(one), find_tensors(two), strict=True):
            assert a.equal(b)
    assert again.state == second.state != first.state
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("phase", list(Phase))
def test_a_share_of_an_epoch_holds_the_same_batches(shop: Sequences, phase: Phase) -> None:
    loader = make_loader(shop, TINY.model_copy(update={"tokens_per_batch": 128}))
    epoch = loader.epoch(PERIODS.calibration, phase, np.random.default_rng(5))
    whole, share = list(loader.steps(epoch)), list(loader.steps(epoch.take([1, 4])))
    for one, two in zip([whole[1], whole[4]], share, strict=True):
        for a, b in zip(find_tensors(one), find_tensors(two), strict=True):
            assert a.equal(b)
    assert [epoch.count_cuts(batch) for batch in range(len(epoch))] == [s.cuts for s in whole]


def test_the_digest_of_an_epoch_tells_it_from_another(shop: Sequences) -> None:
    loader = make_loader(shop, TINY)
    rng = np.random.default_rng(5)
    epochs = [loader.epoch(PERIODS.calibration, Phase.FIT, rng) for _ in range(2)]
    again = loader.epoch(PERIODS.calibration, Phase.FIT, np.random.default_rng(5))
    assert again.digest() == epochs[0].digest() != epochs[1].digest()
    assert epochs[0].take(range(1, len(epochs[0]))).digest() != epochs[0].digest()


def test_a_step_moves_as_a_whole(shop: Sequences) -> None:
    rng = np.random.default_rng(5)
    config = TINY.model_copy(update={"backbone": "bert"})
    for phase in (Phase.PRETRAIN, Phase.FIT):
        loader = make_loader(shop, config)
        step = next(loader.steps(loader.epoch(PERIODS.calibration, phase, rng)))
        moved = to_device(step, torch.device("meta"))
        assert (moved.events, moved.cuts) == (step.events, step.cuts)
        held, there = list(find_tensors(step)), list(find_tensors(moved))
        assert [tensor.shape for tensor in there] == [tensor.shape for tensor in held]
        assert {tensor.device.type for tensor in there} == {"meta"}
        assert to_device(step, torch.device("cpu")) is step


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_and_failures_in_their_place(workers: int) -> None:
    def fail() -> int:
        raise ValueError("no")

    tasks: list[Callable[[], int]] = [partial(int, i) for i in range(10)]
    assert list(in_order(tasks, workers)) == list(range(10))
    results = in_order([*tasks[:4], fail, *tasks[4:]], workers)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no"):
        next(results)


def test_who_stops_asking_leaves_no_thread() -> None:
    before = threading.active_count()
    results = in_order((partial(int, i) for i in range(1000)), 2)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def make_weeks(rates: Sequence[float], seed: int = 3) -> Sequences:
    """Shoppers who view every day, and buy at a rate of the week, of chance alone."""
    rng = np.random.default_rng(seed)
    users = []
    for _ in range(300):
        events = []
        for day in range(7 * len(rates)):
            events.append({"ts": START + day * DAY + int(rng.integers(DAY)), "event_type": "view"})
            if rng.random() < rates[day // 7]:
                bought = START + day * DAY + int(rng.integers(DAY))
                events.append({"ts": bought, "event_type": "purchase", "price": 10.0})
        users.append(sorted(events, key=lambda event: event["ts"]))
    return encode_events(users)


def test_levels_are_those_of_the_weeks() -> None:
    """Better weeks are told from others, as log odds above those of late."""
    rates = [0.02] * 4 + [0.08] * 3 + [0.02] * 4
    shop = make_weeks(rates)
    loader = make_loader(shop, TINY)
    close = START + 77 * DAY
    ts = START + DAY * np.array([8, 31, 38, 66])
    cuts = loader.timeline.cuts(np.zeros(4, dtype=np.int64), ts)
    assert not loader.targets(cuts, close).level.any()
    loader.measure_levels(close)
    level = loader.targets(cuts, close).level[:, loader.heads.events.index("purchase"), 0].numpy()
    # Four times as many buy in a week that is better throughout; late weeks are of either kind.
    assert level[[1, 2]] - level[[0, 3]] == pytest.approx(np.log(4), abs=0.35)
    assert (level[[0, 3]] < -0.5).all()
    assert (level[[1, 2]] > 0.3).all()
    # Of intervals that end after the bound only what is closed counts.
    ts = START + DAY * np.arange(7, 75)
    cuts = loader.timeline.cuts(np.zeros(len(ts), dtype=np.int64), ts)
    everything = loader.targets(cuts, close).level
    assert everything.isfinite().all()
    assert everything.abs().max() < 2.5
    # Nobody searches, which makes no time another one.
    searched = loader.targets(cuts, close).level[:, loader.heads.events.index("search")]
    assert searched.abs().max() < 1e-6


def test_weeks_that_differ_by_chance_are_taken_for_alike() -> None:
    loader = make_loader(make_weeks([0.05] * 11), TINY)
    loader.measure_levels(START + 77 * DAY)
    ts = START + DAY * np.arange(7, 70, 7)
    cuts = loader.timeline.cuts(np.zeros(len(ts), dtype=np.int64), ts)
    level = loader.targets(cuts, START + 77 * DAY).level
    assert level[:, loader.heads.events.index("purchase")].abs().max() < 0.2


def test_levels_see_nothing_from_the_bound_on() -> None:
    shop, close = make_weeks([0.02] * 4 + [0.08] * 7), START + 49 * DAY
    later = shop.ts >= close
    found = []
    for after in (EVENT_CODES["search"], EVENT_CODES["purchase"]):
        other = replace(shop, type=np.where(later, after, shop.type).astype(np.uint8))
        loader = make_loader(other, TINY)
        cuts = loader.timeline.cuts(np.zeros(2, dtype=np.int64), START + DAY * np.array([8, 38]))
        loader.measure_levels(close)
        found.append(loader.targets(cuts, close).level)
    assert found[0].equal(found[1])
    assert found[0].abs().max() > 0.3


def test_a_log_of_days_has_no_levels() -> None:
    loader = make_loader(make_weeks([0.05]), TINY)
    loader.measure_levels(START + 6 * DAY)
    cuts = loader.timeline.cuts(np.zeros(1, dtype=np.int64), np.array([START + 5 * DAY]))
    assert loader.targets(cuts, START + 6 * DAY).level.abs().max() < 1e-6


def test_a_hazard_is_learnt_beside_its_level() -> None:
    outputs = Outputs(
        hazard=torch.zeros(2, 1, 1),
        amount_mean=torch.zeros(2, 0),
        amount_scale=torch.zeros(2, 0),
    )
    nothing = torch.zeros(2, 0)
    targets = HazardTargets(
        happened=torch.tensor([[[1.0]], [[0.0]]]),
        counted=torch.ones(2, 1, 1),
        log_amount=nothing,
        bought=nothing,
        level=torch.tensor([[[2.0]], [[-2.0]]]),
    )
    assert hazard_loss(outputs, targets) == pytest.approx(np.log1p(np.exp(-2.0)))
    even = replace(targets, level=torch.zeros(2, 1, 1))
    assert hazard_loss(outputs, even) == pytest.approx(np.log(2.0))
