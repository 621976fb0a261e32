"""Metrics of rankings against figures by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.config import Evaluation
from pipelines.evaluation.ranking import compare_rankings

CONFIG = Evaluation(bootstrap_samples=50)
TWENTY = np.arange(20)


def test_metrics_are_those_of_the_first_item() -> None:
    truth = np.array([0, 1, -1, -2, 12])
    found = compare_rankings(
        np.arange(5, dtype=np.int32),
        truth,
        {"gpt": np.tile(TWENTY, (5, 1)), "popular": np.tile(TWENTY[::-1], (5, 1))},
        candidate="gpt",
        items=30,
        config=CONFIG,
    )
    assert found is not None
    assert found["users"] == 4
    assert found["known"] == pytest.approx(0.75)
    gpt = {name: entry["value"] for name, entry in found["models"]["gpt"].items()}
    assert gpt["hit_rate_at_10"] == pytest.approx(0.5)
    assert gpt["mrr_at_20"] == pytest.approx((1 + 1 / 2 + 1 / 13) / 4)
    ndcg = (1 + 1 / math.log2(3) + 1 / math.log2(14)) / 4
    assert gpt["ndcg_at_20"] == pytest.approx(ndcg)
    paired = found["paired"]["gpt-popular"]["hit_rate_at_10"]
    assert paired["diff"] == pytest.approx(0.5 - 0.25)


def test_nobody_who_touched_an_item_means_no_comparison() -> None:
    ranked = {"gpt": np.tile(TWENTY, (2, 1))}
    user, truth = np.arange(2, dtype=np.int32), np.array([-2, -2])
    assert compare_rankings(user, truth, ranked, candidate="gpt", items=30, config=CONFIG) is None
