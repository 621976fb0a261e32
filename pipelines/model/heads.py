"""Targets as hazards on a time grid, amounts as a zero-inflated lognormal, and their losses.

The probability of an event within a horizon is one minus the product of the survival through
the grid's intervals (discrete-time survival, Singer and Willett 1993): it grows with the horizon
by construction, and each closed interval teaches the model even where the horizon is still open.
The amount is that probability times a lognormal mean (Wang, Liu and Miao 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipelines.events import EventType
from pipelines.model.network import Outputs
from pipelines.model.timeline import ANY_EVENT, Labels

# Interval ends in days besides the horizons themselves.
_GRID: Final = (1, 3, 7, 14, 28, 60, 90, 180, 365)

_MIN_LOG_SCALE: Final = -2.0
_MAX_LOG_SCALE: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """One column that is predicted.

    Attributes:
        name: for example ``purchase_14d``.
        kind: a probability or an amount.
        event: the event type; None = any event, and the target is that none happens.
        horizon_days: length of the window after the cut.
    """

    name: str
    kind: Literal["binary", "amount"]
    event: str | None
    horizon_days: int


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What the heads stand for.

    Attributes:
        events: names of the hazards.
        grid: ends of the hazards' intervals, days, ascending.
        amounts: horizons of the amounts, days, ascending.
    """

    events: tuple[str, ...]
    grid: tuple[int, ...]
    amounts: tuple[int, ...]

    @classmethod
    def for_targets(cls, targets: Sequence[Target]) -> Heads:
        """Return the heads that some targets need."""
        horizons = sorted({target.horizon_days for target in targets})
        grid = sorted({*horizons, *(day for day in _GRID if day < horizons[-1])})
        events = [t.event or ANY_EVENT for t in targets if t.kind == "binary"]
        amounts = sorted({t.horizon_days for t in targets if t.kind == "amount"})
        if amounts:
            events.append(EventType.PURCHASE.value)  # the share of buyers is half of an amount
        return cls(
            events=tuple(dict.fromkeys(str(name) for name in events)),
            grid=tuple(grid),
            amounts=tuple(amounts),
        )

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Heads:
        """Build from ``to_json``'s value."""
        return cls(**{name: tuple(value[name]) for name in ("events", "grid", "amounts")})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {name: list(value) for name, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class HazardTargets:
    """Tensors of M cuts that the losses read.

    Attributes:
        happened: float32 (M, events, bins), 1 where the event falls into the interval.
        counted: float32 (M, events, bins), 1 where it could and the interval is closed.
        log_amount: float32 (M, amounts), log amount of buyers, else 0.
        bought: float32 (M, amounts), 1 for buyers whose window is closed.
        level: float32 (M, events, bins), log odds by which everyone's hazards at the cut's time are
            above those of late.
    """

    happened: Tensor
    counted: Tensor
    log_amount: Tensor
    bought: Tensor
    level: Tensor

    def split(self, counts: Sequence[int]) -> list[HazardTargets]:
        """Return those of so many cuts each."""
        names = [field.name for field in fields(self)]
        parts = zip(*(getattr(self, name).split(list(counts)) for name in names), strict=True)
        return [HazardTargets(**dict(zip(names, part, strict=True))) for part in parts]


def encode_labels(
    heads: Heads, labels: Labels, level: NDArray[np.float32] | None = None
) -> HazardTargets:
    """Turn labels into the tensors of the losses.

    Args:
        heads: what is predicted.
        labels: of M cuts.
        level: of ``HazardTargets``; None = all times are alike.
    """
    ends = np.array(heads.grid, dtype=np.float64)
    starts = np.concatenate([[0.0], ends[:-1]])
    delay = labels.delay[:, :, None]
    at_risk = delay >= starts
    closed = (ends <= labels.observed_days[:, None])[:, None, :]
    horizons = np.array(heads.amounts, dtype=np.float64)
    known = horizons[None, :] <= labels.observed_days[:, None]
    bought = known & (labels.amount > 0)
    log_amount = np.log(np.where(bought, labels.amount, 1.0))
    happened = (at_risk & (delay < ends)).astype(np.float32)
    return HazardTargets(
        happened=torch.from_numpy(happened),
        counted=torch.from_numpy((at_risk & closed).astype(np.float32)),
        log_amount=torch.from_numpy(log_amount.astype(np.float32)),
        bought=torch.from_numpy(bought.astype(np.float32)),
        level=torch.from_numpy(np.zeros_like(happened) if level is None else level),
    )


def hazard_loss(outputs: Outputs, targets: HazardTargets) -> Tensor:
    """Return the mean negative log likelihood of a cut's first events, averaged over names."""
    loss = functional.binary_cross_entropy_with_logits(
        outputs.hazard + targets.level, targets.happened, weight=targets.counted, reduction="sum"
    )
    count, names, _ = targets.happened.shape
    return loss / (count * names)


def amount_loss(outputs: Outputs, targets: HazardTargets) -> Tensor:
    """Return the mean negative log likelihood of buyers' log amounts."""
    scale = bound_scale(outputs.amount_scale)
    error = (targets.log_amount - outputs.amount_mean) * torch.exp(-scale)
    loss = (targets.bought * (scale + 0.5 * error.square())).sum()
    return loss / targets.bought.sum().clamp(min=1.0)


def survival(outputs: Outputs) -> NDArray[np.float64]:
    """Return P(no event until the end of each interval), (M, events, bins)."""
    stay = functional.logsigmoid(-outputs.hazard.cpu().double()).cumsum(dim=2).exp()
    return np.asarray(stay.numpy())


def buyer_mean(outputs: Outputs) -> NDArray[np.float64]:
    """Return the expected amount of a buyer, (M, amounts): exp(mean + variance / 2)."""
    variance = torch.exp(2.0 * bound_scale(outputs.amount_scale).double())
    mean = torch.exp((outputs.amount_mean.double() + 0.5 * variance).clamp(max=25.0))
    return np.asarray(mean.cpu().numpy())


def bound_scale(scale: Tensor) -> Tensor:
    """Keep a log standard deviation where its exponentials are sane."""
    return scale.clamp(_MIN_LOG_SCALE, _MAX_LOG_SCALE)
