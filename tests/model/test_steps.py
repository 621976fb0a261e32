"""Steps are the same whoever makes them, and move as a whole."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import Train
from pipelines.features.store import Sequences
from pipelines.model import steps
from pipelines.model.ahead import in_order
from pipelines.model.heads import Heads
from pipelines.model.network import to_device
from pipelines.model.steps import Loader, Phase, Step
from pipelines.model.timeline import Timeline
from pipelines.model.tokens import Tokenizer, Vocabulary
from tests.model.conftest import PERIODS, TARGETS, TINY


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
