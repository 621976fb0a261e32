"""Fits the behaviour model: first fit, calibration, refit up to the last closed window."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import Train
from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES
from pipelines.features.store import Sequences
from pipelines.io import progress
from pipelines.model.batches import Collated, cut_pieces, iterate, sample_cuts
from pipelines.model.calibration import Calibration, choose_threshold, fit_probability
from pipelines.model.heads import Heads, Target, amount_loss, encode_labels, hazard_loss
from pipelines.model.network import Network, NetworkConfig
from pipelines.model.predictor import ModelSpec, Predictor, choose_device, select
from pipelines.model.timeline import ANY_EVENT, DAY, Cuts, Labels, Timeline, feature_names
from pipelines.model.tokens import Tokenizer, Vocabulary

_NEXT_CODES: Final = 64  # classes of the next event's content
_NEXT_SHARE: Final = 4  # one event in so many carries the next-event loss
_STATISTICS_CUTS: Final = 20_000
_WARM_UP: Final = 0.05  # of all steps
_MAX_NORM: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Periods:
    """Times that bound what each fit may see, microseconds since the epoch.

    Attributes:
        first: no training cut is before.
        calibration: the calibration cut; windows of the first fit close before it.
        test: the first test cut; windows of the refit close before it.
        active_days: who is in the population at a cut; None = everyone seen so far.
    """

    first: int
    calibration: int
    test: int
    active_days: float | None


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What training yields.

    Attributes:
        first: fitted before the calibration cut, calibrated on it.
        shipped: the same after the refit.
        events: event tokens that training went through.
        seconds: spent in training steps, batches included.
    """

    first: Predictor
    shipped: Predictor
    events: int
    seconds: float

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.shipped.network.parameters())

    def save(self, directory: Path) -> None:
        """Write the shipped model into an existing directory."""
        self.shipped.save(directory)


def train_model(
    sequences: Sequences,
    periods: Periods,
    targets: tuple[Target, ...],
    config: Train,
    vocabulary: Vocabulary,
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
) -> TrainedModel:
    """Train, calibrate and refit.

    Args:
        sequences: all events; each fit looks only at those before its bound.
        periods: the bounds.
        targets: what to predict.
        config: settings.
        vocabulary: codes and scales, fitted before the calibration cut.
        on_epoch: called after every epoch with ``epoch``, ``step``, losses and ``events_per_s``.

    Returns:
        The models. Equal arguments give equal weights on one kind of machine.

    Raises:
        UserError: there is nobody to learn from before the calibration cut.
    """
    seed_everything(config.seed)
    timeline = Timeline(sequences)
    heads = Heads.for_targets(targets)
    fit = _Fit(timeline, periods, heads, targets, config, vocabulary)
    fit.start(periods.calibration)
    fit.run(config.epochs, periods.calibration, config.learning_rate, on_epoch)
    first = calibrate(fit.predictor(), timeline, periods, copy_network=config.refit_epochs > 0)
    if config.refit_epochs:
        rate = config.learning_rate * config.refit_rate
        fit.run(config.refit_epochs, periods.test, rate, on_epoch)
    shipped = fit.predictor().calibrated(first.spec.calibration, first.spec.thresholds)
    return TrainedModel(first=first, shipped=shipped, events=fit.events, seconds=fit.seconds)


def seed_everything(seed: int) -> None:
    """Make what follows repeatable: seeds, the number of threads, deterministic kernels."""
    torch.manual_seed(seed)
    # Sums split over another number of threads round differently.
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Every buffer here is written before it is read; filling them first costs a tenth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Moments of rarely met embeddings fade into denormal numbers, on which CPUs are slow.
    torch.set_flush_denormal(True)


def population(timeline: Timeline, ts: int, active_days: float | None) -> Cuts:
    """Return a cut at ``ts`` for everyone in the population then."""
    users = np.arange(timeline.sequences.users, dtype=np.int64)
    cuts = timeline.cuts(users, np.full(len(users), ts, dtype=np.int64))
    inside = cuts.position > timeline.offsets[:-1]
    if active_days is not None and len(timeline.ts):
        last = timeline.ts[np.maximum(cuts.position - 1, 0)]
        inside &= last >= ts - int(active_days * DAY)
    return cuts.take(np.flatnonzero(inside))


def calibrate(
    predictor: Predictor, timeline: Timeline, periods: Periods, *, copy_network: bool
) -> Predictor:
    """Fit corrections and thresholds at the calibration cut.

    Args:
        predictor: not calibrated.
        timeline: all events.
        periods: the calibration cut; windows that close by the first test cut are used.
        copy_network: leave the result untouched by further training of the network.
    """
    heads = predictor.spec.heads
    cuts = population(timeline, periods.calibration, periods.active_days)
    raw = predictor.raw(timeline, cuts)
    labels = timeline.labels(cuts, events=heads.events, horizons=heads.amounts, close=periods.test)
    slope: dict[str, float] = {}
    shift: dict[str, list[float]] = {}
    for i, name in enumerate(heads.events):
        happened = labels.delay[:, i, None] < np.array(heads.grid)
        slope[name], shift[name] = fit_probability(1.0 - raw.survival[:, i], happened)
    calibration = Calibration(slope=slope, shift=shift)
    expected = predictor.calibrated(calibration, {}).finish(raw)
    factor: dict[str, float] = {}
    for target in select(predictor.targets, "amount"):
        actual = float(labels.amount[:, heads.amounts.index(target.horizon_days)].sum())
        total = float(expected[target.name].sum(dtype=np.float64))
        if actual > 0 and total > 0:
            factor[str(target.horizon_days)] = actual / total
    thresholds = {
        target.name: choose_threshold(
            expected[target.name].astype(np.float64), _label(target, heads, labels)
        )
        for target in select(predictor.targets, "binary")
    }
    if copy_network:
        network = Network(predictor.spec.network)
        network.load_state_dict(predictor.network.state_dict())
        device = next(predictor.network.parameters()).device
        predictor = Predictor(predictor.spec, network.to(device))
    return predictor.calibrated(Calibration(slope=slope, shift=shift, factor=factor), thresholds)


def _label(target: Target, heads: Heads, labels: Labels) -> NDArray[np.bool_]:
    happened = labels.delay[:, heads.events.index(target.event or ANY_EVENT)] < target.horizon_days
    return happened if target.event is not None else ~happened


class _Fit:
    """The state of one training: network, chance, counters."""

    def __init__(
        self,
        timeline: Timeline,
        periods: Periods,
        heads: Heads,
        targets: tuple[Target, ...],
        config: Train,
        vocabulary: Vocabulary,
    ) -> None:
        self.timeline = timeline
        self.periods = periods
        self.heads = heads
        self.config = config
        self.rng = np.random.default_rng(config.seed)
        self.device = choose_device(config.device)
        self.tokenizer = Tokenizer(
            vocabulary, item_buckets=config.item_buckets, query_buckets=config.query_buckets
        )
        self.spec = ModelSpec(
            network=NetworkConfig(
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                dropout=config.dropout,
                types=len(EVENT_TYPES) + 1,
                categories=self.tokenizer.category.size,
                brands=self.tokenizer.brand.size,
                genders=self.tokenizer.gender.size,
                regions=self.tokenizer.region.size,
                item_buckets=config.item_buckets,
                query_buckets=config.query_buckets,
                next_codes=_NEXT_CODES,
                features=len(feature_names()) if config.fusion else 0,
                fusion_width=2 * config.width,
                events=len(heads.events),
                bins=len(heads.grid),
                amounts=len(heads.amounts),
            ),
            vocabulary=vocabulary,
            heads=heads,
            targets=targets,
            context=config.context,
            calibration=Calibration(),
            thresholds={},
        )
        self.network = Network(self.spec.network).to(self.device)
        self.events = 0
        self.seconds = 0.0
        self.epoch = 0
        self.step = 0

    def predictor(self) -> Predictor:
        """Return the network as it is, without corrections."""
        return Predictor(self.spec, self.network)

    def start(self, close: int) -> None:
        """Set what data decide before the first step: scales of features, base rates."""
        cuts = self._sample(close, min(_STATISTICS_CUTS, self._cut_count()))
        if not len(cuts):
            raise UserError(
                "train: nobody has a history and a closed window before the calibration cut; "
                "more days of events or shorter targets.horizons_days are needed"
            )
        labels = encode_labels(self.heads, self._labels(cuts, close))
        counted = labels.counted.sum(dim=0)
        rate = ((labels.happened * labels.counted).sum(dim=0) + 0.5) / (counted + 1.0)
        bought = labels.bought.sum(dim=0)
        mean = (labels.log_amount * labels.bought).sum(dim=0) / bought.clamp(min=1.0)
        square = (labels.log_amount.square() * labels.bought).sum(dim=0) / bought.clamp(min=1.0)
        scale = 0.5 * torch.log((square - mean.square()).clamp(min=0.05))
        with torch.no_grad():
            self.network.hazard.bias.copy_(torch.logit(rate).flatten())
            self.network.amount.bias.copy_(torch.cat([mean, scale]))
            if self.spec.network.features:
                features = self.timeline.features(cuts).astype(np.float64)
                self.network.feature_mean.copy_(torch.from_numpy(features.mean(axis=0)))
                deviation = np.maximum(features.std(axis=0), 1e-2)
                self.network.feature_scale.copy_(torch.from_numpy(1.0 / deviation))

    def run(
        self,
        epochs: int,
        close: int,
        learning_rate: float,
        on_epoch: Callable[[dict[str, float]], None],
    ) -> None:
        """Train on windows that close by ``close``: warm-up, then linear decay to zero."""
        optimizer = _make_optimizer(self.network, learning_rate, self.config.weight_decay)
        self.network.train()
        for epoch in range(epochs):
            began = time.perf_counter()
            total = np.zeros(3)
            steps = events = 0
            count, batches = self._batches(close)
            label = f"epoch {self.epoch + 1}"
            for collated in progress(batches, label, total=count, unit="batch"):
                done = (epoch + steps / max(count, 1)) / epochs
                rate = learning_rate * min(1.0, (done + 1e-3) / _WARM_UP) * (1.0 - done)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                total += self._train_step(collated, close, optimizer)
                steps += 1
                events += len(collated.events)
            seconds = time.perf_counter() - began
            self.step += steps
            self.epoch += 1
            self.events += events
            self.seconds += seconds
            hazard, amount, following = (total / max(steps, 1)).tolist()
            on_epoch(
                {
                    "epoch": self.epoch,
                    "step": self.step,
                    "loss": hazard
                    + self.config.amount_weight * amount
                    + self.config.next_event_weight * following,
                    "hazard_loss": hazard,
                    "amount_loss": amount,
                    "next_event_loss": following,
                    "events_per_s": events / max(seconds, 1e-9),
                }
            )
        self.network.eval()

    def _train_step(
        self, collated: Collated, close: int, optimizer: torch.optim.Optimizer
    ) -> NDArray[np.float64]:
        batch = collated.batch.to(self.device)
        outputs, hidden = self.network(batch)
        targets = encode_labels(self.heads, self._labels(collated.cuts, close))
        hazard = hazard_loss(outputs, targets)
        amount = amount_loss(outputs, targets) if self.heads.amounts else hazard.new_zeros(())
        loss = hazard + self.config.amount_weight * amount
        following = hazard.new_zeros(())
        if self.config.next_event_weight:
            following = self._next_event_loss(collated, batch.event_place, hidden, close)
            loss = loss + self.config.next_event_weight * following
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), _MAX_NORM)
        optimizer.step()
        return np.array([hazard.item(), amount.item(), following.item()])

    def _next_event_loss(
        self, collated: Collated, places: Tensor, hidden: Tensor, close: int
    ) -> Tensor:
        events = collated.events
        chosen = np.arange(int(self.rng.integers(_NEXT_SHARE)), len(events), _NEXT_SHARE)
        index = events[chosen]
        inside = index + 1 < self.timeline.offsets[self.timeline.user[index] + 1]
        following = np.minimum(index + 1, len(self.timeline.ts) - 1)
        chosen = chosen[inside & (self.timeline.ts[following] < close)]
        if not len(chosen):
            return hidden.new_zeros(())
        truth = self.tokenizer.next_events(self.timeline, events[chosen], _NEXT_CODES)
        logits = self.network.next_logits(hidden, places[torch.from_numpy(chosen)])
        losses = [
            functional.cross_entropy(said, torch.from_numpy(was).to(self.device))
            for said, was in zip(logits, truth, strict=True)
        ]
        return torch.stack(losses).sum()

    def _labels(self, cuts: Cuts, close: int) -> Labels:
        return self.timeline.labels(
            cuts, events=self.heads.events, horizons=self.heads.amounts, close=close
        )

    def _cut_count(self) -> int:
        return max(1, self.config.cuts_per_user * self.timeline.sequences.users)

    def _sample(self, close: int, count: int) -> Cuts:
        return sample_cuts(
            self.timeline,
            count=count,
            first=self.periods.first,
            last=close - self.heads.grid[0] * DAY,
            active_days=self.periods.active_days,
            rng=self.rng,
        )

    def _batches(self, close: int) -> tuple[int, Iterator[Collated]]:
        """Draw an epoch; return how many batches it has, about, and the batches."""
        config = self.config
        cuts = self._sample(close, self._cut_count())
        shift = self.rng.integers(config.stride, size=self.timeline.sequences.users)
        pieces = cut_pieces(
            self.timeline, cuts, context=config.context, stride=config.stride, shift=shift
        )
        row = config.context + 1 + int(np.diff(pieces.cut_start).max(initial=1))
        per_batch = max(1, config.tokens_per_batch // row) * row
        batches = iterate(
            self.timeline,
            self.tokenizer,
            pieces,
            row=row,
            tokens_per_batch=config.tokens_per_batch,
            features=config.fusion,
            rng=self.rng,
        )
        return math.ceil(int(pieces.lengths.sum()) / per_batch), batches


def _make_optimizer(
    network: Network, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; only matrices that multiply decay, tables and norms do not."""
    tables = {
        id(p)
        for m in network.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        for p in m.parameters()
    }
    decayed = [p for p in network.parameters() if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in network.parameters() if p.ndim < 2 or id(p) in tables]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "scale": 1.0},
        {"params": kept, "weight_decay": 0.0, "scale": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
