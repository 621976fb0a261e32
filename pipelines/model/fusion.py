"""Snapshot features of a NOW token as one vector that joins the history.

Counts and recencies are not linear in what they tell: each feature is written as a piecewise-
linear code over its own quantiles (Gorishniy, Rubachev and Babenko 2022, "On embeddings for
numerical features"), beside one cross layer that multiplies features with each other (Wang et al.
2021, "DCN V2").
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

BINS: Final = 8
CODES: Final = 1 + BINS  # the standardised value, and the piecewise-linear code
_RANK: Final = 16  # of the cross layer's matrix
_BOUND: Final = 5.0  # standard deviations


class Fusion(nn.Module):
    """Codes of features (M, features, CODES) in, (M, width) out.

    Args:
        features: F, at least one.
        width: of what comes out.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("low", torch.zeros(features, BINS))
        self.register_buffer("steepness", torch.ones(features, BINS))
        self.mean: Tensor
        self.scale: Tensor
        self.low: Tensor
        self.steepness: Tensor
        self.cross_down = nn.Linear(features, _RANK, bias=False)
        self.cross_up = nn.Linear(_RANK, features)
        self.inner = nn.Linear(features * (1 + CODES), width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.cross_up.weight)
        nn.init.zeros_(self.cross_up.bias)

    def encode(self, raw: Tensor) -> Tensor:
        """Return the codes of raw features (M, features)."""
        x = ((raw - self.mean) * self.scale).clamp(-_BOUND, _BOUND)
        bins = ((raw[:, :, None] - self.low) * self.steepness).clamp(0.0, 1.0)
        return torch.cat([x[:, :, None], bins], dim=2)

    def forward(self, codes: Tensor) -> Tensor:
        """Join the codes."""
        x = codes[:, :, 0]
        crossed = x * self.cross_up(self.cross_down(x))
        # In two parts: nothing is laid side by side, and no gradient of the codes is computed.
        by_cross, by_code = torch.split(
            self.inner.weight, [x.shape[1], self.inner.in_features - x.shape[1]], dim=1
        )
        inner = functional.linear(codes.flatten(1), by_code, self.inner.bias)
        inner = functional.relu(torch.addmm(inner, crossed, by_cross.t()))
        return functional.relu(self.outer(inner))

    @torch.no_grad()
    def fit(self, sample: NDArray[np.floating]) -> None:
        """Set scales and quantiles from a sample of features, (N, features)."""
        values = sample.astype(np.float64)
        self.mean.copy_(torch.from_numpy(values.mean(axis=0)))
        self.scale.copy_(torch.from_numpy(1.0 / np.maximum(values.std(axis=0), 1e-2)))
        edges = np.quantile(values, np.linspace(0.0, 1.0, BINS + 1), axis=0).T
        self.low.copy_(torch.from_numpy(edges[:, :-1]))
        # Where quantiles fall together, the bin is a step right above them.
        self.steepness.copy_(torch.from_numpy(1.0 / np.maximum(np.diff(edges, axis=1), 1e-3)))
