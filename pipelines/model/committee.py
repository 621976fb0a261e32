"""Several networks that differ by their seed, and answer as one (Lakshminarayanan et al. 2017).

Averaged are probabilities, not log odds: P(no event until the end of each interval), and a
buyer's expected amount. The mean of survival curves is one, so that probabilities stay monotone
in the horizon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.model.heads import bound_scale
from pipelines.model.network import Batch, Network, Outputs

_FLOOR = 1e-12


class Committee(nn.Module):
    """The mean of some networks of one shape.

    Args:
        members: at least one.
    """

    def __init__(self, members: Sequence[Network]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Return the joint outputs, and the hidden state of the first member."""
        said = [member(batch) for member in self.members]
        return join([outputs for outputs, _ in said]), said[0][1]


def join(outputs: Sequence[Outputs]) -> Outputs:
    """Return outputs whose survival and expected amount are the means of those given."""
    stays = [functional.logsigmoid(-o.hazard.double()).cumsum(dim=2).exp() for o in outputs]
    mean = torch.stack(stays).mean(dim=0)
    before = torch.cat([torch.ones_like(mean[:, :, :1]), mean[:, :, :-1]], dim=2)
    hazard = (1 - mean / before.clamp(min=_FLOOR)).clamp(_FLOOR, 1 - _FLOOR)
    scales = torch.stack([bound_scale(o.amount_scale) for o in outputs])
    means = torch.stack([o.amount_mean for o in outputs]) + 0.5 * torch.exp(2.0 * scales)
    expected = torch.logsumexp(means, dim=0) - math.log(len(outputs))
    scale = scales.mean(dim=0)
    return Outputs(
        hazard=torch.logit(hazard),
        amount_mean=expected - 0.5 * torch.exp(2.0 * scale),
        amount_scale=scale,
    )
