"""Which item comes next: a softmax over known items, mixed with a pointer at the shopper's own.

Shoppers return to items, so that what they touched last is a strong answer; the head learns how
strong (pointer mixture, Merity et al. 2017, "Pointer sentinel mixture models"):

    P(item) = (1 - g) softmax(query . item + bias) + g sum of attention over places that hold it

The softmax is trained on a sample of the items (Bengio and Senecal 2008): the partition sum is
estimated from as many items as drawn, each standing for equally many.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

RECENT: Final = 20
_FLOOR: Final = 1e-9


class ItemHead(nn.Module):
    """Scores every known item at NOW tokens.

    Args:
        items: V known items, at least one.
        width: of a hidden state.
    """

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(items, width)
        self.bias = nn.Parameter(torch.zeros(items))
        self.query = nn.Linear(width, width)
        # Places from the latest event backwards, and at last whether to point at all.
        self.place = nn.Linear(width, RECENT + 1)
        nn.init.normal_(self.table.weight, std=0.1)
        nn.init.zeros_(self.place.weight)
        nn.init.zeros_(self.place.bias)

    def probabilities(self, now: Tensor, recent: Tensor) -> Tensor:
        """Return P(next item) over all known items, (M, V).

        Args:
            now: (M, width), hidden states at NOW.
            recent: int64 (M, RECENT), codes of the items touched last, latest first, -1 = none or
                unknown.
        """
        scores = functional.linear(self.query(now), self.table.weight, self.bias)
        share, attention = self._point(now, recent >= 0)
        known = scores.softmax(dim=1) * (1.0 - share)
        said: Tensor = known.scatter_add(1, recent.clamp(min=0), share * attention)
        return said

    def loss(self, now: Tensor, recent: Tensor, truth: Tensor, sample: Tensor) -> Tensor:
        """Return the mean negative log likelihood of the items that came next.

        Args:
            now: (M, width).
            recent: int64 (M, RECENT), as above.
            truth: int64 (M,), codes.
            sample: int64 (S,), codes drawn uniformly.
        """
        query = self.query(now)
        own = (query * self.table(truth)).sum(dim=1) + self.bias[truth]
        others = functional.linear(query, self.table(sample), self.bias[sample])
        others = others + math.log(self.bias.numel() / len(sample))
        others = others.masked_fill(sample == truth[:, None], -torch.inf)
        total = torch.logaddexp(own, others.logsumexp(dim=1))
        share, attention = self._point(now, recent >= 0)
        pointed = (attention * (recent == truth[:, None])).sum(dim=1)
        likelihood = (1.0 - share[:, 0]) * (own - total).exp() + share[:, 0] * pointed
        loss: Tensor = -(likelihood + _FLOOR).log().mean()
        return loss

    def _point(self, now: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much is pointed, (M, 1), and at which places, (M, RECENT)."""
        logits = self.place(now)
        places = logits[:, :RECENT].masked_fill(~there, -torch.inf)
        anything = there.any(dim=1, keepdim=True)
        # A row of nothing but -inf has no softmax.
        attention = torch.where(anything, places, torch.zeros_like(places)).softmax(dim=1)
        share: Tensor = logits[:, RECENT:].sigmoid() * anything
        return share, attention * there


def start_bias(counts: NDArray[np.int64]) -> Tensor:
    """Return log shares of items, from how often each came next, (V,)."""
    shares = (counts + 0.5) / (counts + 0.5).sum()
    return torch.from_numpy(np.log(shares).astype(np.float32))
