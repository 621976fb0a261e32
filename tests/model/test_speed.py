"""Counted operations and the machine's peak."""

from __future__ import annotations

import pytest
import torch

from pipelines.features.store import Sequences
from pipelines.model.fitting import Fit
from pipelines.model.heads import Heads
from pipelines.model.network import EVENT_NUMBERS, NOW_NUMBERS
from pipelines.model.speed import count_flops, find_peak, look_up_peak, measure_peak
from pipelines.model.steps import Phase
from pipelines.model.timeline import Timeline
from pipelines.model.tokens import Vocabulary
from tests.model.conftest import PERIODS, TARGETS, TINY


def make_fit(shop: Sequences, vocabulary: Vocabulary, backbone: str) -> Fit:
    config = TINY.model_copy(update={"backbone": backbone, "fusion": False, "next_items": 0})
    heads = Heads.for_targets(TARGETS)
    return Fit(Timeline(shop), PERIODS, heads, TARGETS, config, vocabulary)


def test_operations_are_those_of_the_formula(shop: Sequences, vocabulary: Vocabulary) -> None:
    fit = make_fit(shop, vocabulary, "gpt")
    epoch = fit.loader.epoch(PERIODS.calibration, Phase.FIT, fit.rng)
    batch = next(fit.loader.steps(epoch)).batch
    width, layers = TINY.width, TINY.layers
    tokens = int((batch.segment > 0).sum())
    events, nows = len(batch.event_place), len(batch.now_place)
    profiles = tokens - events - nows
    config = fit.network.config
    # 3 w^2 queries, keys and values, w^2 out, 4 w^2 and 4 w^2 of the MLP.
    weights = tokens * layers * 12 * width**2
    weights += width * (profiles * 2 + events * EVENT_NUMBERS + nows * NOW_NUMBERS)
    lengths = [int((batch.segment == s).sum()) for s in range(1, profiles + 1)]
    attention = 12 * layers * width * sum(length**2 for length in lengths)
    found = count_flops(fit.network, batch, told=0, items=0, read=False)
    assert found == pytest.approx(6 * weights + attention)

    told = count_flops(fit.network, batch, told=10, items=0, read=False)
    assert told - found == pytest.approx(6 * 10 * fit.network.next.weight.numel())
    out = config.events * config.bins + 2 * config.amounts
    read = count_flops(fit.network, batch, told=0, items=0, read=True)
    assert read - found == pytest.approx(6 * nows * 2 * width * (width + out))


@pytest.mark.parametrize("backbone", ["bert", "lstm", "cnn", "mlp"])
def test_every_backbone_counts(shop: Sequences, vocabulary: Vocabulary, backbone: str) -> None:
    fit = make_fit(shop, vocabulary, backbone)
    for phase in (Phase.PRETRAIN, Phase.FIT):
        epoch = fit.loader.epoch(PERIODS.calibration, phase, fit.rng)
        assert fit._count_flops(next(fit.loader.steps(epoch))) > 0


def test_peaks_are_looked_up_by_name_and_precision() -> None:
    half, full = torch.bfloat16, torch.float32
    assert look_up_peak("NVIDIA H100 80GB HBM3", half) == 989e12
    assert look_up_peak("NVIDIA H100 80GB HBM3", full) == pytest.approx(66.9e12)
    assert look_up_peak("NVIDIA A100-SXM4-40GB", half) == 312e12
    assert look_up_peak("NVIDIA L40S", half) == 362e12
    assert look_up_peak("NVIDIA L4", half) == 121e12
    assert look_up_peak("Tesla T4", half) is None
    # A slice of a device does less, and what is not listed is not guessed.
    assert look_up_peak("NVIDIA A100-SXM4-40GB MIG 1g.5gb", half) is None
    assert look_up_peak("NVIDIA A10G", half) is None


def test_tf32_is_another_peak() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert look_up_peak("NVIDIA A100-SXM4-40GB", torch.float32) == 156e12
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_cpu_is_measured() -> None:
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    assert measure_peak(torch.float32, 1) > 1e8
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert find_peak(torch.device("meta"), torch.float32, 1) is None
