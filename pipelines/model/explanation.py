"""Which events and features moved a prediction: integrated gradients.

Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", ICML 2017. The path leads
from a user of whom nothing is known but that there were so many events at these times (of no
particular type, without content; snapshot features at their mean) to the user as seen. Zero
embeddings would be no such start: there the norm before each layer has no direction, and the
integral does not converge. What is attributed is the log odds that the event happens within the
horizon; attributions add up to the difference between both ends, up to the error of the numeric
integral, which is told.

Where trees answer beside the network, log odds of both are averaged, and so are the attributions;
those of the trees go to the snapshot features along the paths that they took, without an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipelines.errors import UserError
from pipelines.model.batches import Collated, cut_pieces, iterate
from pipelines.model.fusion import CODES
from pipelines.model.heads import Target
from pipelines.model.network import Batch, Network, to_device
from pipelines.model.predictor import Predictor
from pipelines.model.timeline import ANY_EVENT, Cuts, Timeline, feature_names

_TOKENS_PER_BATCH = 16_384


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Attributions of M predictions, in log odds of the event (for churn: of any event).

    Attributes:
        event: int64 (E,), flat index of every event that was read, by prediction and time.
        row: int64 (E,), to which prediction it belongs.
        effect: float64 (E,), what the event adds to the log odds.
        feature_effect: float64 (M, F), the same for the snapshot features, in the order of
            ``pipelines.model.timeline.feature_names``; F = 0 with neither fusion nor trees.
        base, value: float64 (M,), log odds at both ends of the path, not calibrated; the mean
            over the members of a committee, and of network and trees.
    """

    event: NDArray[np.int64]
    row: NDArray[np.int64]
    effect: NDArray[np.float64]
    feature_effect: NDArray[np.float64]
    base: NDArray[np.float64]
    value: NDArray[np.float64]

    @property
    def gap(self) -> NDArray[np.float64]:
        """How far the attributions of each prediction miss the difference they explain, (M,)."""
        total = np.bincount(self.row, self.effect, minlength=len(self.value))
        missed = total + self.feature_effect.sum(axis=1) - (self.value - self.base)
        return np.asarray(np.abs(missed))


def explain(
    predictor: Predictor, timeline: Timeline, cuts: Cuts, target: Target, *, steps: int = 32
) -> Explanation:
    """Attribute predictions to events and features.

    Args:
        predictor: a fitted model.
        timeline: all events.
        cuts: M cuts, at most one a user.
        target: what is predicted; a binary one of the model's.
        steps: points of the integral (midpoint rule).

    Raises:
        UserError: the target is an amount.
    """
    if target.kind != "binary":
        raise UserError(f"{target.name}: amounts are not explained; choose a binary target")
    config, heads = predictor.spec.network, predictor.spec.heads
    event_name = target.event or ANY_EVENT
    name = heads.events.index(event_name)
    bins = heads.grid.index(target.horizon_days) + 1
    output = name * len(heads.grid) + bins - 1
    believed = 1.0
    if predictor.trees.known[output]:
        believed = predictor.spec.mix.events.get(event_name, 1.0)
    features = config.features > 0 or believed < 1.0
    result = Explanation(
        event=np.zeros(0, dtype=np.int64),
        row=np.zeros(0, dtype=np.int64),
        effect=np.zeros(0),
        feature_effect=np.zeros((len(cuts), len(feature_names()) if features else 0)),
        base=np.zeros(len(cuts)),
        value=np.zeros(len(cuts)),
    )
    events, rows, effects = [result.event], [result.row], [result.effect]
    pieces = cut_pieces(timeline, cuts, context=predictor.spec.context, stride=1, shift=None)
    for collated in iterate(
        timeline,
        predictor.tokenizer,
        pieces,
        row=int(pieces.lengths.max(initial=2)),
        tokens_per_batch=_TOKENS_PER_BATCH,
        features=features,
        rng=None,
    ):
        if believed < 1.0:
            effect, base = predictor.trees.attribute(predictor.look_at(collated.batch), output)
            # What the calendar adds is nobody's own, as in the network.
            of_shopper = result.feature_effect.shape[1]
            base = base + effect[:, of_shopper:].sum(axis=1)
            effect = effect[:, :of_shopper]
            result.feature_effect[collated.rows] += (1.0 - believed) * effect
            result.base[collated.rows] += (1.0 - believed) * base
            result.value[collated.rows] += (1.0 - believed) * (base + effect.sum(axis=1))
        by_event = np.zeros(len(collated.events))
        for network in predictor.networks:
            path = _Path(network, collated, name, bins)
            share = believed / len(predictor.networks)
            of_events, of_features = path.integrate(steps)
            base, value = path.ends()
            by_event += share * of_events
            if config.features:
                result.feature_effect[collated.rows] += share * of_features
            result.base[collated.rows] += share * base
            result.value[collated.rows] += share * value
        events.append(collated.events)
        rows.append(collated.rows[_owners(collated)])
        effects.append(by_event)
    event, row, effect = np.concatenate(events), np.concatenate(rows), np.concatenate(effects)
    order = np.lexsort((event, row))
    return replace(result, event=event[order], row=row[order], effect=effect[order])


def _owners(collated: Collated) -> NDArray[np.int64]:
    """Place in the batch's cuts of the prediction that each event belongs to."""
    batch = collated.batch
    segment = batch.segment.flatten()
    of_now = segment[batch.now_place].numpy()
    order = np.argsort(of_now)
    found = np.searchsorted(of_now[order], segment[batch.event_place].numpy())
    return np.asarray(order[found], dtype=np.int64)


class _Path:
    """The straight line between both ends for one batch."""

    def __init__(self, network: Network, collated: Collated, name: int, bins: int) -> None:
        self.network = network
        device = next(self.network.parameters()).device
        self.batch: Batch = to_device(collated.batch, device)
        self.name, self.bins = name, bins
        self.events = slice(
            1 + len(self.batch.profile_codes),
            1 + len(self.batch.profile_codes) + len(self.batch.event_codes),
        )
        with torch.no_grad():
            self.tokens = self.network.embed(self.batch)
            average = self.network.event_type.weight.mean(dim=0)
            self.start = average.expand_as(self.tokens[self.events])
            self.codes, self.mean = self._encode_features()

    def _encode_features(self) -> tuple[Tensor, Tensor]:
        """Return codes of the features and of their means, (M, F, CODES) both."""
        features = self.batch.now_features
        if not self.network.config.features:
            none = features.new_zeros(len(features), 0, CODES)
            return none, none
        fusion = self.network.fusion
        return fusion.encode(features), fusion.encode(fusion.mean.expand_as(features))

    def log_odds(self, share: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return log odds (M,) at a point of the path, and the event tokens and codes there."""
        events = self.start + share * (self.tokens[self.events] - self.start)
        events = events.detach().requires_grad_()
        codes = (self.mean + share * (self.codes - self.mean)).detach().requires_grad_()
        tokens = torch.cat(
            [self.tokens[: self.events.start], events, self.tokens[self.events.stop :]]
        )
        outputs, _ = self.network.read(self.batch, self.network.mix(self.batch, tokens), codes)
        stay = functional.logsigmoid(-outputs.hazard[:, self.name, : self.bins]).sum(dim=1)
        # log((1 - s) / s) with s = exp(stay)
        return torch.log(-torch.expm1(stay.clamp(max=-1e-7))) - stay, events, codes

    def integrate(self, steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return effects of events (E,) and of features (M, F)."""
        by_event = torch.zeros_like(self.tokens[self.events])
        by_feature = torch.zeros_like(self.codes)
        for step in range(steps):
            value, events, codes = self.log_odds((step + 0.5) / steps)
            inputs = [events, codes] if codes.shape[1] else [events]
            gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True)
            if gradients[0] is not None:
                by_event += gradients[0]
            if len(gradients) > 1 and gradients[1] is not None:
                by_feature += gradients[1]
        event_effect = (by_event / steps * (self.tokens[self.events] - self.start)).sum(dim=1)
        feature_effect = (by_feature / steps * (self.codes - self.mean)).sum(dim=2)
        return (
            event_effect.double().cpu().numpy(),
            feature_effect.double().cpu().numpy(),
        )

    @torch.no_grad()
    def ends(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the log odds at the start and the end of the path."""
        start, _, _ = self.log_odds(0.0)
        end, _, _ = self.log_odds(1.0)
        return start.double().cpu().numpy(), end.double().cpu().numpy()
