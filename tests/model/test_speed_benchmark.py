"""The benchmark of training leaves the network as it found it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.training_speed import repeat_batch
from pipelines.features.store import Sequences
from pipelines.model.heads import Heads
from pipelines.model.timeline import Timeline
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import _Fit
from tests.model.conftest import PERIODS, TARGETS, TINY


class Compiled(nn.Module):
    """Stands for what torch.compile makes of a module."""

    calls = 0

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any, **named: Any) -> Any:
        Compiled.calls += 1
        return self.module(*given, **named)


def test_after_a_compiled_batch_the_backbone_is_eager_again(
    shop: Sequences, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", Compiled)
    heads = Heads.for_targets(TARGETS)
    fit = _Fit(Timeline(shop), PERIODS, heads, TARGETS, TINY, vocabulary)
    fit.start(PERIODS.calibration, {})
    eager = fit.network.backbone
    repeat_batch(fit, PERIODS.calibration, compiled=True, seconds=0.01)
    assert Compiled.calls
    assert fit.network.backbone is eager
