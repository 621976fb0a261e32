"""What is read at NOW alone is what the whole pass says there, however rows are packed."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.features.store import encode_events
from pipelines.model import backbones
from pipelines.model.batches import cut_pieces, iterate
from pipelines.model.heads import Heads
from pipelines.model.network import Batch, Network, NetworkConfig
from pipelines.model.timeline import DAY, Timeline, feature_names
from pipelines.model.tokens import Tokenizer, Vocabulary
from tests.model.conftest import START, TARGETS, make_user


def encode(network: Network, batch: Batch) -> tuple[Tensor, int]:
    """Encode at NOW, and count how often it was written down who may attend to whom."""
    with mock.patch.object(backbones, "attention_mask", wraps=backbones.attention_mask) as mask:
        return network.encode_now(batch), mask.call_count


def make_config(backbone: str, heads: Heads) -> NetworkConfig:
    return NetworkConfig(
        backbone=backbone, width=16, layers=2, heads=2, dropout=0.0, types=10, categories=4,
        brands=2, genders=2, regions=2, item_buckets=16, query_buckets=16, next_codes=8,
        features=len(feature_names()), fusion_width=16, events=len(heads.events),
        bins=len(heads.grid), amounts=len(heads.amounts), items=0,
    )  # fmt: skip


def test_a_log_without_prices_makes_no_noise(recwarn: pytest.WarningsRecorder) -> None:
    heads = Heads.for_targets([target for target in TARGETS if target.kind == "binary"])
    network = Network(make_config("gpt", heads))
    assert network.amount.weight.shape == (0, 16)
    assert not recwarn.list


@pytest.mark.parametrize("backbone", ["gpt", "bert", "lstm"])
@pytest.mark.parametrize(
    ("row", "days"),
    [(18, (60, 3, 20, 9, 60)), (60, (60, 3, 20, 9, 60)), (18, (60, 30, 40, 50, 60))],
)
def test_now_alone_is_now_of_the_whole(backbone: str, row: int, days: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    timeline = Timeline(encode_events([make_user(rng, days=d) for d in days]))
    heads = Heads.for_targets(TARGETS)
    config = make_config(backbone, heads)
    torch.manual_seed(1)
    network = Network(config).eval()
    # Blocks begin as the identity, which would hide what they do.
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    cuts = timeline.cuts(np.arange(5), np.full(5, START + 61 * DAY))
    pieces = cut_pieces(timeline, cuts, context=16, stride=1, shift=None)
    tokenizer = Tokenizer(Vocabulary(), item_buckets=16, query_buckets=16)
    batches = iterate(
        timeline, tokenizer, pieces, row=row, tokens_per_batch=200, features=True, rng=None
    )
    with torch.inference_mode():
        for collated in batches:
            batch = collated.batch
            whole, hidden = network(batch)
            now, written = encode(network, batch)
            # A row of its own for everyone, some of them shorter than the row.
            alone = len(batch.source) == len(batch.now_place)
            assert alone == (min(days) > 20)
            assert bool((batch.source == 0).any())
            if backbone == "gpt":
                assert written == (0 if alone else 1)
            torch.testing.assert_close(now, network.at_now(batch, hidden), rtol=1e-4, atol=1e-5)
            told = network.read_now(batch, now)
            torch.testing.assert_close(told.hazard, whole.hazard, rtol=1e-4, atol=1e-4)
            assert float(whole.hazard.std()) > 0.1
