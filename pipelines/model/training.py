"""Fits the behaviour model: pretraining, first fit, calibration, refit on all closed windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from torch import Tensor

from pipelines.config import Objective, Pretrain, Train
from pipelines.features.store import Sequences
from pipelines.model.checkpoint import Checkpoint
from pipelines.model.committee import Committee
from pipelines.model.correction import calibrate, correct_refit, doubt_level
from pipelines.model.fitting import Fit
from pipelines.model.growing import Grower, calibration_cuts
from pipelines.model.heads import Heads, Target
from pipelines.model.peers import ALONE, Peers
from pipelines.model.predictor import Predictor
from pipelines.model.runtime import count_workers, seed_everything
from pipelines.model.schedule import Periods
from pipelines.model.steps import Phase
from pipelines.model.timeline import Timeline, spread
from pipelines.model.tokens import Vocabulary
from pipelines.model.trees import Mix

_LABELLED: Final = ("hazard.", "calendar.", "amount.", "join.", "fusion.")  # not pretrained
_SEED_STEP: Final = 10_000  # between the members of a model, so that near seeds share none
_LEVEL_CUTS: Final = 4096  # that tell the level of a refit from that of the first fit


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """What training yields.

    Attributes:
        first: fitted before the calibration cut, calibrated on it.
        shipped: the same after the refit.
        network_first, network: both without the trees, calibrated for themselves.
        events: event tokens that training went through.
        seconds: spent in training steps, batches included.
        flops: floating-point operations of the model in them; see ``pipelines.model.speed``.
    """

    first: Predictor
    shipped: Predictor
    network_first: Predictor
    network: Predictor
    events: int
    seconds: float
    flops: float

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.shipped.network.parameters())

    def save(self, directory: Path) -> None:
        """Write the shipped model into an existing directory."""
        self.shipped.save(directory)


def pretrain_model(
    sequences: Sequences,
    periods: Periods,
    targets: tuple[Target, ...],
    config: Train,
    pretrain: Pretrain,
    vocabulary: Vocabulary,
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
    peers: Peers = ALONE,
) -> dict[str, Tensor]:
    """Learn to tell the next event and item (``bert``: events left out), without any label.

    Args:
        sequences: all events; those before the calibration cut are looked at.
        periods: the bounds.
        targets: what will be predicted; only the sizes of heads depend on it.
        config: the network's settings.
        pretrain: how long and how fast.
        vocabulary: codes and scales, fitted before the calibration cut.
        on_epoch: called after every epoch.
        checkpoint: where a killed run is gone on with.
        peers: processes that share the steps; the others call this, too, without a checkpoint.

    Returns:
        Weights of the embeddings and the backbone by name; none when there are no epochs.

    Raises:
        UserError: there is nobody to learn from before the calibration cut.
    """
    if not pretrain.epochs:
        return {}
    seed_everything(config)
    heads = Heads.for_targets(targets)
    fit = Fit(Timeline(sequences), periods, heads, targets, config, vocabulary, peers)
    if peers.leads and not fit.resume(checkpoint, on_epoch):
        fit.start_items(fit.draw_some(periods.calibration), periods.calibration)
    fit.align()
    fit.run(Phase.PRETRAIN, pretrain.epochs, periods.calibration, pretrain.learning_rate, on_epoch)
    return {
        name: tensor.detach().clone()
        for name, tensor in fit.network.state_dict().items()
        if not name.startswith(_LABELLED)
    }


def train_model(
    sequences: Sequences,
    periods: Periods,
    targets: tuple[Target, ...],
    config: Train,
    vocabulary: Vocabulary,
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
    *,
    pretrained: dict[str, Tensor] | None = None,
    checkpoint: Checkpoint | None = None,
    threshold: Objective = "f1",
    peers: Peers = ALONE,
) -> TrainedModel:
    """Train, calibrate and refit.

    Args:
        sequences: all events; each fit looks only at those before its bound.
        periods: the bounds.
        targets: what to predict.
        config: settings.
        vocabulary: codes and scales, fitted before the calibration cut.
        on_epoch: called after every epoch with ``epoch``, ``step``, losses, ``events_per_s`` and
            ``flops_per_s``; at a resumed training with the epochs before, too.
        pretrained: of ``pretrain_model``.
        checkpoint: where a killed run is gone on with, to the same weights.
        threshold: what thresholds are chosen by.
        peers: processes that share the steps; the others call ``assist_training``.

    Returns:
        The models. Equal arguments give equal weights on one kind of machine.

    Raises:
        UserError: there is nobody to learn from before the calibration cut.
    """
    timeline = Timeline(sequences)
    heads = Heads.for_targets(targets)
    with Grower(timeline, periods, heads, targets, config) as grower:
        fits = _fit_members(
            timeline,
            periods,
            targets,
            config,
            vocabulary,
            peers,
            on_epoch,
            pretrained=pretrained or {},
            checkpoint=checkpoint,
        )
        grown = grower.take()
    joined = _join([fit.take_first() for fit in fits])
    alone = _join([fit.predictor() for fit in fits])
    cuts = calibration_cuts(timeline, periods, targets)
    beside = joined.beside(grown.first, Mix()) if grown else joined
    # What the networks say is the same with the trees and without.
    ahead, scores = beside.parts(timeline, cuts, workers=count_workers(config))
    close = periods.test
    first = alone_first = calibrate(joined, timeline, cuts, close, ahead.raw, scores, threshold)
    shipped = alone
    if grown:
        first = calibrate(beside, timeline, cuts, close, ahead.raw, scores, threshold)
        shipped = alone.beside(grown.second, first.spec.mix)
    few = spread(len(cuts), _LEVEL_CUTS)
    doubt = doubt_level(
        heads, ahead.raw, cuts.ts, periods.calibration, close, grown.moves if grown else 0.0
    )
    later, later_scores = shipped.parts(timeline, cuts.take(few), workers=count_workers(config))

    def correct(predictor: Predictor, model: Predictor) -> Predictor:
        return correct_refit(
            predictor,
            predictor.join(later.raw, later_scores),
            model,
            model.join(ahead.raw.take(few), scores[few]),
            doubt,
        )

    # What has not learnt from the calibration windows keeps what they say.
    alone = correct(alone, alone_first) if config.refit_epochs else alone_first
    shipped = correct(shipped, first) if config.refit_epochs or grown else first
    return TrainedModel(
        first=first,
        shipped=shipped,
        network_first=alone_first,
        network=alone,
        events=sum(fit.events for fit in fits),
        seconds=sum(fit.seconds for fit in fits),
        flops=sum(fit.flops for fit in fits),
    )


def assist_training(
    sequences: Sequences,
    periods: Periods,
    targets: tuple[Target, ...],
    config: Train,
    vocabulary: Vocabulary,
    peers: Peers,
) -> None:
    """Take a share of the steps of ``train_model``, which the leader calls with equal arguments.

    Pretrained weights and what a checkpoint holds come from the leader.
    """
    _fit_members(Timeline(sequences), periods, targets, config, vocabulary, peers)


def _fit_members(
    timeline: Timeline,
    periods: Periods,
    targets: tuple[Target, ...],
    config: Train,
    vocabulary: Vocabulary,
    peers: Peers,
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
    *,
    pretrained: Mapping[str, Tensor] = MappingProxyType({}),
    checkpoint: Checkpoint | None = None,
) -> list[Fit]:
    """Fit and refit the networks that answer together, one after the other."""
    heads = Heads.for_targets(targets)
    fits: list[Fit] = []
    for member in range(config.members):
        own = config.model_copy(update={"seed": config.seed + member * _SEED_STEP})
        seed_everything(own)
        fit = Fit(timeline, periods, heads, targets, own, vocabulary, peers)
        tell = _shift_epochs(on_epoch, fits)
        before = checkpoint.part(member) if checkpoint else None
        if peers.leads and not fit.resume(before, tell):
            fit.start(periods.calibration, pretrained)
        fit.align()
        schedule = fit.schedule
        fit.run(Phase.FIT, schedule.epochs, periods.calibration, schedule.learning_rate, tell)
        fit.keep_first()
        if config.refit_epochs:
            rate = schedule.learning_rate * config.refit_rate
            fit.run(Phase.REFIT, config.refit_epochs, periods.test, rate, tell)
        fits.append(fit)
    return fits


def _shift_epochs(
    on_epoch: Callable[[dict[str, float]], None], before: Sequence[Fit]
) -> Callable[[dict[str, float]], None]:
    """Number epochs and steps through all members."""
    epochs = sum(len(fit.history) for fit in before)
    steps = sum(fit.step for fit in before)
    return lambda epoch: on_epoch(
        {**epoch, "epoch": epoch["epoch"] + epochs, "step": epoch["step"] + steps}
    )


def _join(predictors: Sequence[Predictor]) -> Predictor:
    """Let several uncalibrated models answer as one."""
    if len(predictors) == 1:
        return predictors[0]
    networks = [network for predictor in predictors for network in predictor.networks]
    return Predictor(replace(predictors[0].spec, members=len(networks)), Committee(networks))
