"""Fits the behaviour model: pretraining, first fit, calibration, refit on all closed windows."""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import EnsembleTrees, Objective, Pretrain, Train
from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES
from pipelines.features.store import Sequences
from pipelines.io import progress
from pipelines.model.ahead import in_order
from pipelines.model.backbones import Transformer
from pipelines.model.boosting import Rows, collect_rows, grow_trees, measure_moves
from pipelines.model.calibration import Calibration
from pipelines.model.checkpoint import (
    Checkpoint,
    pack_optimizer,
    pack_torch_chance,
    unpack_optimizer,
    unpack_torch_chance,
)
from pipelines.model.committee import Committee
from pipelines.model.correction import calibrate, correct_refit, doubt_level
from pipelines.model.heads import Heads, Target, amount_loss, hazard_loss
from pipelines.model.items import start_bias
from pipelines.model.network import Batch, Network, NetworkConfig, to_device
from pipelines.model.predictor import ModelSpec, Predictor, choose_device
from pipelines.model.speed import count_flops
from pipelines.model.steps import (
    NEXT_CODES,
    Following,
    FollowingItems,
    Loader,
    Phase,
    Step,
    in_groups,
)
from pipelines.model.timeline import (
    DAY,
    Cuts,
    Timeline,
    feature_names,
    population,
    spread,
)
from pipelines.model.tokens import Tokenizer, Vocabulary
from pipelines.model.trees import Mix, Trees

_LABELLED: Final = ("hazard.", "calendar.", "amount.", "join.", "fusion.")  # not pretrained
_WEEKS: Final = 4  # that tell one weekday from another
_PRETRAIN_ITEMS: Final = 5.0  # times item_weight: what the next-event loss gains there as well
_SEED_STEP: Final = 10_000  # between the members of a model, so that near seeds share none
_STATISTICS_CUTS: Final = 20_000
_WARM_UP: Final = 0.05  # of all steps
_MAX_NORM: Final = 1.0
_READ: Final = 2_200_000  # events, over all epochs
_FEWEST, _MOST = 3, 6  # epochs
_FASTEST, _SLOWEST = 0.006, 0.002  # learning rates of the fewest and the most
_MOST_PLACES, _FEWEST_PLACES = 2048, 512  # of a batch
_STEPS: Final = 32  # of an epoch, from events alone
_TREE_RATE, _SLOW_TREE_RATE = 0.1, 0.01
_GPU_LOADERS: Final = 4
_NICENESS: Final = 10  # of what runs beside the steps
_MOST_CUTS: Final = 400_000  # that tell corrections
_LEVEL_CUTS: Final = 4096  # that tell the level of a refit from that of the first fit


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


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How often a fit reads the log, and how fast it learns.

    Where the settings leave it open: epochs until 2.2 million events have been read, three at
    least and six at most, and a rate that falls evenly from .006 with three to .002 with six. A
    large log is read fewer times in larger steps, to which a sparse one would be fitted too
    closely. Batches have 2,048 places, half as many where there are less than 65,536 events, and a
    quarter below 32,768, so that an epoch has steps enough. Of a log that is read six times the
    trees beside the network learn at .01 instead of .1 (all measured in benchmarks/TRIED.md).

    Attributes:
        epochs: of the first fit.
        learning_rate: at its highest.
        tokens_per_batch: places of a batch.
        tree_rate: learning rate of the trees.
    """

    epochs: int
    learning_rate: float
    tokens_per_batch: int
    tree_rate: float

    @classmethod
    def of(cls, config: Train, timeline: Timeline, close: int) -> Schedule:
        """Choose for the events before ``close``, microseconds."""
        events = max(1, int((timeline.ts < close).sum()))
        enough = min(max(round(_READ / events), _FEWEST), _MOST)
        epochs = config.epochs or enough
        between = np.interp(epochs, (_FEWEST, _MOST), (_FASTEST, _SLOWEST))
        places = _MOST_PLACES
        while places > _FEWEST_PLACES and events < _STEPS * places:
            places //= 2
        return cls(
            epochs=epochs,
            learning_rate=config.learning_rate or float(between),
            tokens_per_batch=config.tokens_per_batch or places,
            tree_rate=config.trees.learning_rate
            or (_SLOW_TREE_RATE if enough == _MOST else _TREE_RATE),
        )


def pretrain_model(
    sequences: Sequences,
    periods: Periods,
    targets: tuple[Target, ...],
    config: Train,
    pretrain: Pretrain,
    vocabulary: Vocabulary,
    on_epoch: Callable[[dict[str, float]], None] = lambda _: None,
    checkpoint: Checkpoint | None = None,
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

    Returns:
        Weights of the embeddings and the backbone by name; none when there are no epochs.

    Raises:
        UserError: there is nobody to learn from before the calibration cut.
    """
    if not pretrain.epochs:
        return {}
    seed_everything(config)
    heads = Heads.for_targets(targets)
    fit = _Fit(Timeline(sequences), periods, heads, targets, config, vocabulary)
    if not fit.resume(checkpoint, on_epoch):
        fit.start_items(fit.draw_some(periods.calibration), periods.calibration)
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

    Returns:
        The models. Equal arguments give equal weights on one kind of machine.

    Raises:
        UserError: there is nobody to learn from before the calibration cut.
    """
    timeline = Timeline(sequences)
    heads = Heads.for_targets(targets)
    with _Grower(timeline, periods, heads, targets, config) as grower:
        fits: list[_Fit] = []
        for member in range(config.members):
            own = config.model_copy(update={"seed": config.seed + member * _SEED_STEP})
            seed_everything(own)
            fit = _Fit(timeline, periods, heads, targets, own, vocabulary)
            tell = _shift_epochs(on_epoch, fits)
            if not fit.resume(checkpoint.part(member) if checkpoint else None, tell):
                fit.start(periods.calibration, pretrained or {})
            schedule = fit.schedule
            fit.run(Phase.FIT, schedule.epochs, periods.calibration, schedule.learning_rate, tell)
            fit.keep_first()
            if config.refit_epochs:
                rate = schedule.learning_rate * config.refit_rate
                fit.run(Phase.REFIT, config.refit_epochs, periods.test, rate, tell)
            fits.append(fit)
        grown = grower.take()
    joined = _join([fit.take_first() for fit in fits])
    alone = _join([fit.predictor() for fit in fits])
    cuts = _calibration_cuts(timeline, periods, targets)
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


def _shift_epochs(
    on_epoch: Callable[[dict[str, float]], None], before: Sequence[_Fit]
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


def seed_everything(config: Train) -> None:
    """Make what follows repeatable: seeds, the number of threads, deterministic kernels.

    Sums split over another number of threads round differently, so that it is a setting and not the
    machine's own. On a GPU what is outside the backbone multiplies in TensorFloat-32 where the
    backbone does in bfloat16.
    """
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    if choose_device(config.device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        half = choose_precision(config) is torch.bfloat16
        torch.set_float32_matmul_precision("high" if half else "highest")
    # Every buffer here is written before it is read; filling them first costs a tenth.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Moments of rarely met embeddings fade into denormal numbers, on which CPUs are slow.
    torch.set_flush_denormal(True)


@contextmanager
def _refuse_chance(network: Network) -> Iterator[None]:
    """On a GPU, take attention's repeatable kernels: PyTorch does where others are refused.

    Sums along a recurrence or a mean have none there, so that those backbones stay as they are.
    """
    cuda = next(network.parameters()).device.type == "cuda"
    refuse = cuda and isinstance(network.backbone, Transformer)
    torch.use_deterministic_algorithms(True, warn_only=not refuse)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def count_workers(config: Train) -> int:
    """Return how many batches may be predicted side by side, each by ``config.threads`` threads."""
    if choose_device(config.device).type != "cpu":
        return 1
    return max(1, (os.cpu_count() or 1) // config.threads)


def choose_precision(config: Train) -> torch.dtype:
    """Return what the backbone's products are computed in; ``auto`` leaves the CPU at float32."""
    if config.precision == "auto":
        half = choose_device(config.device).type == "cuda" and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        return torch.bfloat16 if half else torch.float32
    return torch.bfloat16 if config.precision == "bfloat16" else torch.float32


def compile_backbone(network: Network, config: Train) -> Callable[..., Any] | None:
    """Return the backbone compiled, None where it is to stay as it is.

    It shares the weights with the network, which stays as it is: names and predictions do not
    depend on it. ``auto`` leaves backbones without attention alone, whose shapes depend on data.
    """
    wanted = config.compile
    if wanted == "auto":
        device = next(network.parameters()).device
        wanted = device.type == "cuda" and isinstance(network.backbone, Transformer)
    if not wanted:
        return None
    return torch.compile(network.backbone, dynamic=True)


def _calibration_cuts(timeline: Timeline, periods: Periods, targets: Sequence[Target]) -> Cuts:
    """Return everyone in the population between the calibration and the test cut.

    One time a shortest horizon: all windows that close by the first test cut count, so that short
    horizons, of which several fit in, are corrected from more than one week's luck. Large shops and
    windows of very different length have more of them than tell anything, and are thinned.
    """
    shortest = min(target.horizon_days for target in targets)
    last = max(periods.calibration, periods.test - shortest * DAY)
    times = range(periods.calibration, last + 1, shortest * DAY)
    cuts = Cuts.join([population(timeline, ts, periods.active_days) for ts in times])
    return _thin(cuts, _MOST_CUTS)


def _thin(cuts: Cuts, most: int) -> Cuts:
    """Take so many of the cuts at most, evenly: features of all at once may not fit."""
    return cuts.take(spread(len(cuts), most))


class _Grower:
    """Grows trees on what lies before the calibration cut, and before the first test cut.

    Beside the networks, where their steps leave a core idle.
    """

    def __init__(
        self,
        timeline: Timeline,
        periods: Periods,
        heads: Heads,
        targets: Sequence[Target],
        config: Train,
    ) -> None:
        self._pool = ThreadPoolExecutor(1, initializer=_yield_to_others)
        self._growing: Future[_Grown] | None = None
        self._grow: Callable[[], _Grown] | None = None
        if not config.trees.rounds:
            return
        shortest = min(target.horizon_days for target in targets)
        weekly = _depends_on_weekday(targets, periods)
        collect = partial(collect_rows, calendar=weekly)

        def look_back(close: int) -> Rows:
            last = max(periods.first, close - shortest * DAY)
            times = range(last, periods.first - 1, -shortest * DAY)
            cuts = Cuts.join([population(timeline, ts, periods.active_days) for ts in times])
            return collect(timeline, _thin(cuts, config.trees.max_rows), heads, close)

        held = _thin(_calibration_cuts(timeline, periods, targets), config.trees.max_rows)
        # Here, not beside the networks: what a timeline remembers is not made for two threads.
        self._grow = partial(
            _grow,
            heads,
            look_back(periods.calibration),
            collect(timeline, held, heads, periods.test),
            look_back(periods.test),
            asked=np.isin(heads.grid, [target.horizon_days for target in targets]),
            step=shortest * DAY,
            config=config.trees,
            learning_rate=Schedule.of(config, timeline, periods.calibration).tree_rate,
            weekdays=weekly,
            half_life=config.half_life_days,
            seed=config.seed,
        )
        if choose_device(config.device).type != "cpu" or config.threads < (os.cpu_count() or 1):
            self._growing = self._pool.submit(self._grow)

    def __enter__(self) -> _Grower:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self) -> _Grown | None:
        """Wait for what has grown; None where no trees are wanted."""
        if self._growing is not None:
            return self._growing.result()
        return self._grow() if self._grow is not None else None


@dataclass(frozen=True, kw_only=True)
class _Grown:
    """Trees, and what they tell.

    Attributes:
        first: of events before the calibration cut.
        second: of events before the test cut.
        moves: (events, bins), how much the level of a window moves: see ``measure_moves``.
    """

    first: Trees
    second: Trees
    moves: NDArray[np.float64]


def _grow(
    heads: Heads,
    before: Rows,
    held: Rows,
    later: Rows,
    *,
    asked: NDArray[np.bool_],
    step: int,
    config: EnsembleTrees,
    learning_rate: float,
    weekdays: bool,
    half_life: float | None,
    seed: int,
) -> _Grown:
    """Grow trees as ``grow_trees`` does, for the intervals that are asked about, (bins,)."""
    # Between the horizons nobody is asked; there ``join`` changes the network as at the next, and
    # the next horizon tells how much levels move.
    amounts = np.ones(len(heads.amounts), dtype=np.bool_)
    first, second = grow_trees(
        before,
        held,
        later,
        amounts=len(amounts),
        wanted=np.concatenate([*[asked] * len(heads.events), amounts]),
        config=config,
        learning_rate=learning_rate,
        period=step,
        weekdays=weekdays,
        half_life=half_life,
        seed=seed,
    )
    days = np.where(asked, np.array(heads.grid, dtype=np.float64), np.nan)
    every = np.concatenate([*[days] * len(heads.events), np.full(len(amounts), np.nan)])
    moves = measure_moves(before, first, every, step=step)[: len(every) - len(amounts)]
    places = np.flatnonzero(asked)
    following = places[np.searchsorted(places, np.arange(len(asked)))]
    return _Grown(
        first=first, second=second, moves=moves.reshape(len(heads.events), -1)[:, following]
    )


def _yield_to_others() -> None:
    """Let this thread, and those it starts, run where others leave a core idle (on Linux)."""
    if sys.platform == "linux":
        this = threading.get_native_id()
        now = os.getpriority(os.PRIO_PROCESS, this)
        os.setpriority(os.PRIO_PROCESS, this, max(now, _NICENESS))


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
        self.schedule = Schedule.of(config, timeline, periods.calibration)
        self.rng = np.random.default_rng(config.seed)
        self.device = choose_device(config.device)
        vocabulary = replace(
            vocabulary,
            item=vocabulary.item[: config.next_items],
            item_id=vocabulary.item_id[: config.next_items],
        )
        self.tokenizer = Tokenizer(
            vocabulary, item_buckets=config.item_buckets, query_buckets=config.query_buckets
        )
        self.spec = ModelSpec(
            network=NetworkConfig(
                backbone=config.backbone,
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
                next_codes=NEXT_CODES,
                features=len(feature_names()) if config.fusion else 0,
                fusion_width=2 * config.width,
                events=len(heads.events),
                bins=len(heads.grid),
                amounts=len(heads.amounts),
                items=len(vocabulary.item),
                calendar=_depends_on_weekday(targets, periods),
            ),
            vocabulary=vocabulary,
            heads=heads,
            targets=targets,
            context=config.context,
            calibration=Calibration(),
            thresholds={},
            learnt_until=int(periods.test),
        )
        self.loader = Loader(
            timeline,
            self.tokenizer,
            heads,
            config,
            tokens_per_batch=self.schedule.tokens_per_batch,
            first=periods.first,
            active_days=periods.active_days,
        )
        self.network = Network(self.spec.network).to(self.device)
        self.precision = choose_precision(config)
        self.backbone = compile_backbone(self.network, config)
        self.first: dict[str, Tensor] = {}
        self.done = dict.fromkeys(Phase, 0)
        self.history: list[dict[str, float]] = []
        self.events = 0
        self.seconds = 0.0
        self.flops = 0.0
        self.step = 0
        self.checkpoint: Checkpoint | None = None
        self._optimizer_tensors: dict[str, Tensor] = {}

    def predictor(self) -> Predictor:
        """Return the network as it is, without corrections."""
        return Predictor(self.spec, self.network)

    def keep_first(self) -> None:
        """Remember the network as the first fit left it."""
        if not self.first:
            state = self.network.state_dict()
            self.first = {name: tensor.detach().clone() for name, tensor in state.items()}

    def take_first(self) -> Predictor:
        """Return the network that ``keep_first`` remembers."""
        network = Network(self.spec.network)
        network.load_state_dict(self.first)
        return Predictor(self.spec, network.to(self.device))

    def resume(
        self, checkpoint: Checkpoint | None, on_epoch: Callable[[dict[str, float]], None]
    ) -> bool:
        """Go back to the last epoch that the checkpoint holds; False when it holds none."""
        self.checkpoint = checkpoint
        found = checkpoint.read() if checkpoint else None
        if found is None:
            return False
        tensors, state = found
        self.network.load_state_dict(_strip(tensors, "network."))
        self.first = _strip(tensors, "first.")
        self._optimizer_tensors = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
        unpack_torch_chance(self.device, tensors)
        self.rng.bit_generator.state = state["chance"]
        self.done = {phase: state["done"][phase.value] for phase in Phase}
        self.events, self.seconds, self.step = state["events"], state["seconds"], state["step"]
        self.flops = state.get("flops", 0.0)
        self.history = state["history"]
        for epoch in self.history:
            on_epoch(epoch)
        return True

    def _save(self, optimizer: torch.optim.Optimizer, chance: Mapping[str, Any]) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"first.{k}": v for k, v in self.first.items()}
        tensors |= pack_optimizer(optimizer) | pack_torch_chance(self.device)
        state = {
            "done": {phase.value: count for phase, count in self.done.items()},
            "chance": chance,
            "events": self.events,
            "seconds": self.seconds,
            "flops": self.flops,
            "step": self.step,
            "history": self.history,
        }
        self.checkpoint.write(tensors, state)

    def start(self, close: int, pretrained: dict[str, Tensor]) -> None:
        """Set what is known before the first step: pretrained weights, scales, base rates."""
        unexpected = self.network.load_state_dict(pretrained, strict=False).unexpected_keys
        if unexpected:
            raise UserError(f"models/pretrained: {unexpected[0]} is not of this network")
        cuts = self.draw_some(close)
        if not len(cuts):
            raise UserError(
                "train: nobody has a history and a closed window before the calibration cut; "
                "more days of events or shorter targets.horizons_days are needed"
            )
        labels = self.loader.targets(cuts, close)
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
                self.network.fusion.fit(self.timeline.features(cuts))
        self.start_items(cuts, close)

    def draw_some(self, close: int) -> Cuts:
        """Draw cuts that tell how often something happens."""
        wanted = self.config.cuts_per_user * self.timeline.sequences.users
        return self.loader.sample(close, min(_STATISTICS_CUTS, max(1, wanted)), self.rng)

    def start_items(self, cuts: Cuts, close: int) -> None:
        """Set how often each item comes next."""
        if self.network.items is None:
            return
        following = self.loader.next_items(cuts, close)
        counts = np.bincount(following[following >= 0], minlength=self.spec.network.items)
        with torch.no_grad():
            self.network.items.bias.copy_(start_bias(counts))

    def run(
        self,
        phase: Phase,
        epochs: int,
        close: int,
        learning_rate: float,
        on_epoch: Callable[[dict[str, float]], None],
    ) -> None:
        """Train on windows that close by ``close``: warm-up, then linear decay to zero.

        ``accumulate`` batches make a step; those left over at an epoch's end make one, too.
        Epochs of the phase that a checkpoint holds are not done again.
        """
        optimizer = _make_optimizer(self.network, learning_rate, self.config.weight_decay)
        if 0 < self.done[phase] < epochs and self._optimizer_tensors:
            unpack_optimizer(optimizer, self._optimizer_tensors)
        if phase is not Phase.PRETRAIN:
            self.loader.measure_levels(close)
        self.network.train()
        workers = _count_loaders(self.device)
        draw = partial(self.loader.epoch, close, phase, self.rng)
        # The next epoch is drawn while one goes on.
        drawn = in_order(repeat(draw, epochs - self.done[phase]), 1)
        for epoch, plan in enumerate(drawn, start=self.done[phase]):
            began = time.perf_counter()
            total = torch.zeros(3, dtype=torch.float64, device=self.device)
            steps = events = 0
            flops = 0.0
            count = math.ceil(len(plan) / self.config.accumulate)
            label = f"{phase} {epoch + 1}/{epochs}"
            made = self.loader.steps(plan, workers)
            shown = progress(made, label, total=len(plan), unit="batch")
            for together in in_groups(shown, self.config.accumulate):
                done = (epoch + steps / max(count, 1)) / epochs
                rate = learning_rate * min(1.0, (done + 1e-3) / _WARM_UP) * max(1.0 - done, 0.0)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["scale"]
                # Cuts, of which the horizon losses are means, count alike in whatever batch.
                cuts = sum(step.cuts for step in together)
                for step in together:
                    share, last = step.cuts / cuts, step is together[-1]
                    total += self._train_step(step, optimizer, phase, share, last)
                    events += step.events
                    flops += self._count_flops(step)
                steps += 1
            losses = (total / max(steps, 1)).tolist()  # waits for a GPU
            seconds = time.perf_counter() - began
            self.step += steps
            self.done[phase] += 1
            self.events += events
            self.seconds += seconds
            self.flops += flops
            hazard, amount, following = losses
            told = {
                "epoch": sum(self.done.values()),
                "step": self.step,
                "loss": hazard
                + self.config.amount_weight * amount
                + (1.0 if phase is Phase.PRETRAIN else self.config.next_event_weight) * following,
                "hazard_loss": hazard,
                "amount_loss": amount,
                "next_event_loss": following,
                "events_per_s": events / max(seconds, 1e-9),
                "flops_per_s": flops / max(seconds, 1e-9),
            }
            self.history.append(told)
            self._save(optimizer, plan.state)
            on_epoch(told)
        self.network.eval()

    def _train_step(
        self,
        step: Step,
        optimizer: torch.optim.Optimizer,
        phase: Phase,
        share: float = 1.0,
        last: bool = True,
    ) -> Tensor:
        """Add a batch's share to the gradients, and after the ``last`` of its group step."""
        with _refuse_chance(self.network):
            losses = self._add_gradients(step, phase, share)
        if last and any(p.grad is not None for p in self.network.parameters()):
            nn.utils.clip_grad_norm_(self.network.parameters(), _MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses

    def _add_gradients(self, step: Step, phase: Phase, share: float) -> Tensor:
        """Add the gradients of ``share`` times the loss; return its parts times ``share``, (3,)."""
        step = to_device(step, self.device)
        hidden = self._encode(step.batch, step.left_out)
        loss = hazard = amount = following = hidden.new_zeros(())
        if step.targets is not None:
            outputs, hidden = self.network.read(step.batch, hidden)
            hazard = hazard_loss(outputs, step.targets)
            if self.heads.amounts:
                amount = amount_loss(outputs, step.targets)
            loss = hazard + self.config.amount_weight * amount
        if step.following is not None:
            following = self._event_loss(step.following, hidden)
            weight = 1.0 if phase is Phase.PRETRAIN else self.config.next_event_weight
            loss = loss + weight * following
        if step.items is not None:
            weight = self.config.item_weight
            weight *= _PRETRAIN_ITEMS if phase is Phase.PRETRAIN else 1.0
            loss = loss + weight * self._item_loss(step.items, hidden)
        if loss.requires_grad:
            (share * loss).backward()  # type: ignore[no-untyped-call]
        return share * torch.stack([hazard, amount, following]).detach().double()

    def _encode(self, batch: Batch, left_out: Tensor | None) -> Tensor:
        """Return the hidden states in float32, in which heads and losses are computed as well."""
        half = self.precision is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            tokens = self.network.embed(batch, left_out)
            return self.network.mix(batch, tokens, self.backbone).float()

    def _count_flops(self, step: Step) -> float:
        told = items = 0
        if step.following is not None:
            told = len(step.following.places)
        if step.items is not None:
            items = len(step.items.places)
        read = step.targets is not None
        return count_flops(self.network, step.batch, told=told, items=items, read=read)

    def _item_loss(self, items: FollowingItems, hidden: Tensor) -> Tensor:
        """Return the loss of the item after some NOW tokens."""
        assert self.network.items is not None  # noqa: S101 - for the type checker
        now = self.network.norm(hidden.flatten(0, 1).index_select(0, items.places))
        said: Tensor = self.network.items.loss(now, items.recent, items.truth, items.sample)
        return said

    def _event_loss(self, following: Following, hidden: Tensor) -> Tensor:
        """Cross-entropy of the event after some events, or of those left out themselves."""
        *logits, price = self.network.next_logits(hidden, following.places)
        losses = [
            functional.cross_entropy(said, was)
            for said, was in zip(logits, following.classes, strict=True)
        ]
        if len(following.priced):
            losses.append(functional.smooth_l1_loss(price[following.priced], following.price))
        return torch.stack(losses).sum()


def _count_loaders(device: torch.device) -> int:
    """Return how many threads make steps: a GPU takes more than one makes."""
    return 1 if device.type == "cpu" else max(1, min(_GPU_LOADERS, (os.cpu_count() or 1) - 1))


def _depends_on_weekday(targets: Sequence[Target], periods: Periods) -> bool:
    """Is it another question on another weekday, and is the log long enough to tell?

    Windows of whole weeks hold each weekday equally often, so that nothing is to be learnt.
    """
    weeks = (periods.calibration - periods.first) / (7 * DAY)
    return weeks >= _WEEKS and any(target.horizon_days % 7 for target in targets)


def _strip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


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
