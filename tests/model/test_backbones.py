"""Both forms of the same formula: the one that trains and the one that predicts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.model.backbones import Layout, Rotary, draw_kept, make_backbone

ROWS, PLACES, WIDTH = 2, 12, 16


@pytest.mark.parametrize("name", ["gpt", "bert"])
def test_predicting_says_what_training_says(name: str) -> None:
    torch.manual_seed(1)
    backbone = make_backbone(name, width=WIDTH, layers=2, heads=2, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    x = torch.randn(ROWS, PLACES, WIDTH)
    layout = Layout(
        segment=torch.ones(ROWS, PLACES, dtype=torch.int32),
        is_now=torch.arange(PLACES).expand(ROWS, -1) == PLACES - 1,
        position=torch.arange(PLACES, dtype=torch.float32).expand(ROWS, -1),
        time=torch.rand(ROWS, PLACES).cumsum(dim=1),
    )
    trained = backbone(x, layout)
    assert trained.requires_grad
    with torch.inference_mode():
        predicted = backbone(x, layout)
    assert float(predicted.sub(x).std()) > 0.1
    torch.testing.assert_close(predicted, trained.detach(), rtol=1e-5, atol=1e-5)


def test_heads_turn_by_time_and_by_position() -> None:
    rotary = Rotary(heads=3, head_width=8)
    time = torch.rand(ROWS, PLACES) * 300
    position = torch.arange(PLACES, dtype=torch.float32).expand(ROWS, -1)
    turn = rotary(time, position)
    assert turn.shape == (ROWS, PLACES, 1, 3, 4)
    by_time = np.exp(1j * time.numpy()[..., None] * rotary.time_rate.numpy())
    by_place = np.exp(1j * position.numpy()[..., None] * rotary.place_rate.numpy())
    np.testing.assert_allclose(turn[:, :, 0, 0].numpy(), by_time, atol=2e-4)
    for head in (1, 2):
        np.testing.assert_allclose(turn[:, :, 0, head].numpy(), by_place, atol=2e-5)


def test_dropout_keeps_its_share_and_what_is_expected() -> None:
    torch.manual_seed(5)
    like = torch.empty(3, 1001, 33)  # no multiple of the four numbers that are drawn at once
    for share in (0.1, 0.5):
        kept = draw_kept(like, share)
        assert kept.shape == like.shape
        assert kept.dtype == like.dtype
        values = kept.unique().tolist()
        assert values == pytest.approx([0.0, 1 / (1 - share)], abs=1e-4)
        # Within four standard errors, overall and in every fourth place alike.
        for place in range(4):
            some = kept.flatten()[place::4]
            error = 4 * (share * (1 - share) / some.numel()) ** 0.5
            assert (some == 0).float().mean().item() == pytest.approx(share, abs=error)
        assert kept.mean().item() == pytest.approx(1.0, abs=5e-3 / (1 - share))
        # Neighbours know nothing of each other.
        flat = (kept.flatten() == 0).float() - share
        for step in (1, 2, 3, 4):
            product = (flat[step:] * flat[:-step]).mean().item()
            assert abs(product) < 4 * share * (1 - share) / flat.numel() ** 0.5
    torch.manual_seed(6)
    again = draw_kept(like, 0.1)
    torch.manual_seed(6)
    assert torch.equal(again, draw_kept(like, 0.1))
