"""Several networks that answer as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.features.store import Sequences
from pipelines.model.committee import join
from pipelines.model.explanation import explain
from pipelines.model.heads import buyer_mean, survival
from pipelines.model.network import Outputs
from pipelines.model.predictor import Predictor
from pipelines.model.timeline import DAY, Timeline
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import TrainedModel, train_model
from tests.model.conftest import PERIODS, START, TARGETS, TINY


def test_probabilities_and_amounts_are_means() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return 3 * torch.randn(*shape, generator=generator)

    members = [
        Outputs(hazard=draw(7, 3, 5), amount_mean=draw(7, 2), amount_scale=draw(7, 2))
        for _ in range(3)
    ]
    joined = join(members)
    np.testing.assert_allclose(
        survival(joined), np.mean([survival(m) for m in members], axis=0), rtol=1e-5
    )
    np.testing.assert_allclose(
        buyer_mean(joined), np.mean([buyer_mean(m) for m in members], axis=0), rtol=1e-4
    )


def test_certainty_stays_finite() -> None:
    sure = Outputs(
        hazard=torch.full((1, 1, 4), 80.0),
        amount_mean=torch.zeros(1, 1),
        amount_scale=torch.zeros(1, 1),
    )
    assert torch.isfinite(join([sure, sure]).hazard).all()


@pytest.fixture(scope="module")
def pair(shop: Sequences, vocabulary: Vocabulary) -> TrainedModel:
    config = TINY.model_copy(update={"members": 2, "epochs": 1})
    return train_model(shop, PERIODS, TARGETS, config, vocabulary)


def test_members_differ_and_the_model_is_stored(
    shop: Sequences, pair: TrainedModel, tmp_path: Path
) -> None:
    one, two = pair.shipped.networks
    assert not torch.equal(one.category.weight, two.category.weight)
    pair.save(tmp_path)
    loaded = Predictor.load(tmp_path)
    assert loaded.spec == pair.shipped.spec
    now = np.full(shop.users, START + 44 * DAY, dtype=np.int64)
    expected = pair.shipped.predict(shop, now)
    for name, values in loaded.predict(shop, now).items():
        np.testing.assert_array_equal(values, expected[name])


def test_epochs_are_numbered_through(shop: Sequences, vocabulary: Vocabulary) -> None:
    told: list[dict[str, float]] = []
    config = TINY.model_copy(update={"members": 2, "epochs": 1, "refit_epochs": 1})
    train_model(shop, PERIODS, TARGETS, config, vocabulary, told.append)
    assert [epoch["epoch"] for epoch in told] == [1, 2, 3, 4]
    assert all(np.diff([epoch["step"] for epoch in told]) > 0)


def test_an_explanation_is_the_mean_of_the_members(shop: Sequences, pair: TrainedModel) -> None:
    timeline = Timeline(shop)
    cuts = timeline.cuts(np.arange(5), np.full(5, START + 30 * DAY))
    both = explain(pair.network, timeline, cuts, TARGETS[0], steps=4)
    alone = [
        explain(Predictor(pair.network.spec, network), timeline, cuts, TARGETS[0], steps=4)
        for network in pair.network.networks
    ]
    np.testing.assert_allclose(both.effect, np.mean([a.effect for a in alone], axis=0), atol=1e-6)
    np.testing.assert_allclose(both.value, np.mean([a.value for a in alone], axis=0), atol=1e-6)
