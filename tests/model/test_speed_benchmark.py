"""The benchmark of training measures what is there and leaves the weights as they are."""

from __future__ import annotations

import numpy as np

from benchmarks.training_speed import hold_epoch, make_epoch, repeat_steps, run_epoch
from pipelines.features.store import Sequences
from pipelines.model.fitting import Fit
from pipelines.model.heads import Heads
from pipelines.model.timeline import Timeline
from pipelines.model.tokens import Vocabulary
from tests.model.conftest import PERIODS, TARGETS, TINY


def test_prepared_steps_are_those_of_the_epoch_and_change_no_weight(
    shop: Sequences, vocabulary: Vocabulary
) -> None:
    heads = Heads.for_targets(TARGETS)
    fit = Fit(Timeline(shop), PERIODS, heads, TARGETS, TINY, vocabulary)
    fit.start(PERIODS.calibration, {})
    before = {name: tensor.clone() for name, tensor in fit.network.state_dict().items()}
    chance = fit.rng.bit_generator.state
    other = np.random.default_rng()
    other.bit_generator.state = chance
    steps = hold_epoch(fit, PERIODS.calibration, other)
    assert repeat_steps(fit, steps) > 0
    assert make_epoch(fit, PERIODS.calibration) > 0
    assert fit.rng.bit_generator.state == chance
    for name, tensor in fit.network.state_dict().items():
        assert tensor.equal(before[name])

    events, flops = run_epoch(fit, PERIODS.calibration)
    assert 0 < events < flops
    # What was held is what training went through.
    assert sum(step.events for step in steps) == fit.events
    assert fit.rng.bit_generator.state == other.bit_generator.state
    assert any(not tensor.equal(before[n]) for n, tensor in fit.network.state_dict().items())
