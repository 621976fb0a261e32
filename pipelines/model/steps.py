"""What training steps read: packed batches with all that is told of them, made ahead on the CPU.

An epoch is drawn as a whole, then its steps are made: how many threads do changes nothing.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from itertools import chain, islice
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import Train
from pipelines.model.ahead import in_order
from pipelines.model.batches import (
    Collated,
    Pieces,
    Placement,
    collate,
    cut_pieces,
    lay_out,
    sample_cuts,
)
from pipelines.model.heads import HazardTargets, Heads, encode_labels
from pipelines.model.items import RECENT
from pipelines.model.levels import measure_odds, shrink, weigh
from pipelines.model.network import Batch
from pipelines.model.timeline import DAY, Cuts, Ints, Timeline, population, spread
from pipelines.model.tokens import Tokenizer

T = TypeVar("T")

NEXT_CODES: Final = 64  # classes of the next event's content
_NEXT_SHARE: Final = 4  # one event in so many carries the next-event loss
_LEFT_OUT: Final = 0.15  # of the events, in bidirectional pretraining (Devlin et al. 2019)
_ITEM_SHARE: Final = 4  # likewise one NOW token, in pretraining event, the next-item loss
_BIDIRECTIONAL_CUTS: Final = 4
_FREE_CUTS: Final = 1 << 18  # an epoch may have, however few events there are
_PRETRAIN_CUTS: Final = 4  # NOW tokens only mark which histories are read
_TOGETHER: Final = 16384  # places of the batches that are made at a time
_LEVEL_STEP: Final = 7 * DAY  # between times whose levels are told apart
_LEVEL_ROWS: Final = 20_000  # shoppers that tell one
_ITEM_SAMPLE: Final = 512  # items that stand for all of them in the next-item loss


class Phase(StrEnum):
    """What a run of epochs is for."""

    PRETRAIN = "pretrain"
    FIT = "fit"
    REFIT = "refit"


@dataclass(frozen=True, kw_only=True)
class Following:
    """Events that are to be told, N of them.

    Attributes:
        places: int64 (N,), flat places from which they are told.
        classes: int64 (N,) each: type, interval of the gap before, content.
        priced: int64 (K,), which of them have a price.
        price: float32 (K,), their standardised log prices.
    """

    places: Tensor
    classes: tuple[Tensor, ...]
    priced: Tensor
    price: Tensor


@dataclass(frozen=True, kw_only=True)
class FollowingItems:
    """Items that are to be told, N of them.

    Attributes:
        places: int64 (N,), flat places of the tokens before them: NOWs, in pretraining events.
        recent: int64 (N, RECENT), codes of the items touched last, latest first, -1 = none.
        truth: int64 (N,), codes.
        sample: int64 (S,), codes drawn uniformly.
    """

    places: Tensor
    recent: Tensor
    truth: Tensor
    sample: Tensor


@dataclass(frozen=True, kw_only=True)
class Step:
    """A batch and what is told of it; nothing else is read by a training step.

    Attributes:
        batch: E events, M NOW tokens.
        events, cuts: E and M.
        left_out: bool (E,), events whose content must be guessed; None = none.
        targets: what followed the NOW tokens; None = they are not read.
        following: events to tell; None = none.
        items: items to tell; None = none.
    """

    batch: Batch
    events: int
    cuts: int
    left_out: Tensor | None = None
    targets: HazardTargets | None = None
    following: Following | None = None
    items: FollowingItems | None = None


def in_groups(parts: Iterable[T], count: int) -> Iterator[list[T]]:
    """Yield so many parts together, at last those left over."""
    left = iter(parts)
    while group := list(islice(left, count)):
        yield group


@dataclass(frozen=True, kw_only=True)
class Chance:
    """What is drawn for a step, and so what is told in it.

    Attributes:
        event: the first event that tells the next one; None = none does.
        item: the first NOW token, in pretraining event, that tells the next item; likewise.
        sample: int64 (S,), items that stand for all.
        left_out: bool (E,), events that are told themselves; None = none.
    """

    event: int | None = None
    item: int | None = None
    sample: NDArray[np.int64] | None = None
    left_out: NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What is drawn for an epoch: enough to make its steps.

    Attributes:
        close: microseconds, windows close by then.
        phase: what it is for.
        pieces: of histories.
        placements: of the pieces, one a step.
        chances: one a step.
        state: of the source of chance after all of it was drawn.
    """

    close: int
    phase: Phase
    pieces: Pieces
    placements: list[Placement]
    chances: list[Chance]
    state: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.placements)

    def take(self, batches: Sequence[int]) -> Epoch:
        """Return some of the batches."""
        return replace(
            self,
            placements=[self.placements[batch] for batch in batches],
            chances=[self.chances[batch] for batch in batches],
        )

    def count_cuts(self, batch: int) -> int:
        """Return how many NOW tokens a batch has, before it is made."""
        chosen, start = self.placements[batch].chosen, self.pieces.cut_start
        return int((start[chosen + 1] - start[chosen]).sum())

    def digest(self) -> int:
        """Return 32 bits of which histories lie where, and of the chance drawn after them."""
        found = zlib.crc32(repr(self.state).encode())
        for placement in self.placements:
            found = zlib.crc32(placement.chosen.tobytes(), found)
            found = zlib.crc32(placement.place.tobytes(), found)
        return found


class Loader:
    """Draws epochs and makes their steps.

    Args:
        timeline: all events.
        tokenizer: makes tokens.
        heads: what is predicted.
        config: settings of training.
        tokens_per_batch: places of a batch.
        first: microseconds, no cut is before.
        active_days: who is in the population at a cut; None = everyone seen so far.
    """

    def __init__(
        self,
        timeline: Timeline,
        tokenizer: Tokenizer,
        heads: Heads,
        config: Train,
        *,
        tokens_per_batch: int,
        first: int,
        active_days: float | None,
    ) -> None:
        self.timeline = timeline
        self.tokenizer = tokenizer
        self.heads = heads
        self.config = config
        self.tokens_per_batch = tokens_per_batch
        self.first = first
        self.active_days = active_days
        # Events see later events of their segment.
        self.bidirectional = config.backbone == "bert"
        self.items = len(tokenizer.vocabulary.item)
        self._level_times: Ints = np.zeros(0, dtype=np.int64)
        self._levels = np.zeros((0, len(heads.events), len(heads.grid)), dtype=np.float32)

    def epoch(self, close: int, phase: Phase, rng: np.random.Generator) -> Epoch:
        """Draw an epoch on windows that close by ``close``.

        Args:
            close: microseconds.
            phase: what it is for.
            rng: source of chance.
        """
        pieces, placements = self.place(close, phase, rng)
        return Epoch(
            close=close,
            phase=phase,
            pieces=pieces,
            placements=placements,
            chances=[self.draw(phase, rng, pieces, placement) for placement in placements],
            state=rng.bit_generator.state,
        )

    def steps(self, epoch: Epoch, workers: int = 0) -> Iterator[Step]:
        """Make an epoch's steps.

        Args:
            epoch: drawn.
            workers: threads that make steps ahead; 0 = none.
        """
        together = max(1, _TOGETHER // self.tokens_per_batch)
        drawn = zip(epoch.placements, epoch.chances, strict=True)
        tasks = (partial(self.make, epoch, some) for some in in_groups(drawn, together))
        return chain.from_iterable(in_order(tasks, workers))

    def place(
        self, close: int, phase: Phase, rng: np.random.Generator
    ) -> tuple[Pieces, list[Placement]]:
        """Draw cuts, cut histories into pieces and say where each lies."""
        config = self.config
        cuts = self.sample(close, self._count_cuts(phase, close), rng)
        users = self.timeline.sequences.users
        # A bidirectional piece has one NOW token, at its end.
        shift = None if self.bidirectional else rng.integers(config.stride, size=users)
        pieces = cut_pieces(
            self.timeline, cuts, context=config.context, stride=config.stride, shift=shift
        )
        row = config.context + 1 + int(np.diff(pieces.cut_start).max(initial=1))
        placed = lay_out(pieces, row=row, tokens_per_batch=self.tokens_per_batch, rng=rng)
        return pieces, placed

    def sample(self, close: int, count: int, rng: np.random.Generator) -> Cuts:
        """Draw so many cuts whose shortest window closes by ``close``."""
        return sample_cuts(
            self.timeline,
            count=count,
            first=self.first,
            last=close - self.heads.grid[0] * DAY,
            active_days=self.active_days,
            half_life_days=self.config.half_life_days,
            rng=rng,
        )

    def targets(self, cuts: Cuts, close: int) -> HazardTargets:
        """Return what followed some cuts, as far as ``close`` lets see."""
        labels = self.timeline.labels(
            cuts, events=self.heads.events, horizons=self.heads.amounts, close=close
        )
        return encode_labels(self.heads, labels, self._find_levels(cuts.ts))

    def measure_levels(self, close: int) -> None:
        """Tell the times before ``close`` apart, so that nobody's hazard is learnt from them.

        A week apart: the level of everyone's hazards, less a mean that counts old weeks less.
        """
        heads = self.heads
        last = max(close - heads.grid[0] * DAY, self.first)
        times = np.arange(last, self.first - 1, -_LEVEL_STEP)[::-1]
        counts = []
        for ts in times:
            cuts = population(self.timeline, int(ts), self.active_days)
            cuts = cuts.take(spread(len(cuts), _LEVEL_ROWS))
            labels = self.timeline.labels(
                cuts, events=heads.events, horizons=heads.amounts, close=close
            )
            told = encode_labels(heads, labels)
            happened = told.happened * told.counted
            counts.append(torch.stack([happened.sum(0), told.counted.sum(0)]).double())
        odds, information = measure_odds(*torch.stack(counts, dim=1).numpy())
        level = shrink(odds, information)
        age = (times[-1] - times) / DAY
        late = weigh(level, information, age, self.config.half_life_days)
        self._level_times, self._levels = times, (level - late).astype(np.float32)

    def _find_levels(self, ts: Ints) -> NDArray[np.float32] | None:
        """Return the levels of the nearest times, (M, events, bins)."""
        if not len(self._levels):
            return None
        place = np.rint((ts - self._level_times[0]) / _LEVEL_STEP).astype(np.int64)
        found: NDArray[np.float32] = self._levels[place.clip(0, len(self._levels) - 1)]
        return found

    def next_items(self, cuts: Cuts, close: int) -> NDArray[np.int64]:
        """Return the code of the item touched next from every cut on, -1 = none or unknown."""
        return self.tokenizer.items(self.timeline.next_item(cuts, np.full(len(cuts), close)))

    def _count_cuts(self, phase: Phase, close: int) -> int:
        per_user = self.config.cuts_per_user
        if self.bidirectional:
            # Each cut takes a pass of its own: an epoch is to cost a few times another's only.
            per_user = math.ceil(per_user / _BIDIRECTIONAL_CUTS)
        elif phase is Phase.PRETRAIN:
            per_user = math.ceil(per_user / _PRETRAIN_CUTS)
        # Of many who came once, so many would be most of an epoch, and say the same.
        most = max(int((self.timeline.ts < close).sum()), _FREE_CUTS)
        return max(1, min(per_user * self.timeline.sequences.users, most))

    def draw(
        self, phase: Phase, rng: np.random.Generator, pieces: Pieces, placement: Placement
    ) -> Chance:
        """Draw what a step tells."""
        pretraining = phase is Phase.PRETRAIN
        left_out = event = item = sample = None
        if self.bidirectional:
            if pretraining:
                chosen = placement.chosen
                events = int((pieces.stop[chosen] - pieces.start[chosen]).sum())
                left_out = rng.random(events) < _LEFT_OUT
        elif pretraining or self.config.next_event_weight:
            event = int(rng.integers(_NEXT_SHARE))
        if self.items and self.config.item_weight and left_out is None:
            item = int(rng.integers(_ITEM_SHARE))
            sample = rng.integers(self.items, size=_ITEM_SAMPLE)
        return Chance(event=event, item=item, sample=sample, left_out=left_out)

    def make(self, epoch: Epoch, drawn: Sequence[tuple[Placement, Chance]]) -> list[Step]:
        """Make some steps at a time, which takes less than one by one; two threads may."""
        read, close = epoch.phase is not Phase.PRETRAIN, epoch.close
        placements, chances = zip(*drawn, strict=True)
        made = collate(
            self.timeline,
            self.tokenizer,
            epoch.pieces,
            placements,
            features=self.config.fusion and read,
        )
        targets: list[HazardTargets] | list[None] = [None] * len(made)
        if read:
            whole = self.targets(Cuts.join([collated.cuts for collated in made]), close)
            targets = whole.split([len(collated.cuts) for collated in made])
        return [
            Step(
                batch=collated.batch,
                events=len(collated.events),
                cuts=len(collated.cuts),
                left_out=None if chance.left_out is None else torch.from_numpy(chance.left_out),
                targets=told,
                following=self._follow(collated, close, chance),
                items=self._follow_items(collated, close, chance, read=read),
            )
            for collated, told, chance in zip(made, targets, chances, strict=True)
        ]

    def _follow(self, collated: Collated, close: int, chance: Chance) -> Following | None:
        """Describe the event after some events, or those left out themselves."""
        timeline, events = self.timeline, collated.events
        if chance.left_out is not None:
            chosen = np.flatnonzero(chance.left_out)
            before = events[chosen] - 1
            chosen = chosen[before >= timeline.offsets[timeline.user[events[chosen]]]]
            known = events[chosen] - 1
        elif chance.event is None:
            return None
        else:
            chosen = np.arange(chance.event, len(events), _NEXT_SHARE)
            index = events[chosen]
            inside = index + 1 < timeline.offsets[timeline.user[index] + 1]
            following = np.minimum(index + 1, len(timeline.ts) - 1)
            chosen = chosen[inside & (timeline.ts[following] < close)]
            known = events[chosen]
        if not len(chosen):
            return None
        truth = self.tokenizer.next_events(timeline, known, NEXT_CODES)
        priced = np.flatnonzero(np.isfinite(truth.price))
        return Following(
            places=collated.batch.event_place[torch.from_numpy(chosen)],
            classes=tuple(map(torch.from_numpy, truth.classes)),
            priced=torch.from_numpy(priced),
            price=torch.from_numpy(truth.price[priced]),
        )

    def _follow_items(
        self, collated: Collated, close: int, chance: Chance, *, read: bool
    ) -> FollowingItems | None:
        """Tell the item after some NOW tokens, or, where those are not read, after some events."""
        if chance.item is None or chance.sample is None:
            return None
        places = collated.batch.now_place if read else collated.batch.event_place
        chosen = np.arange(chance.item, len(places), _ITEM_SHARE)
        after = self.timeline.after
        cuts = collated.cuts.take(chosen) if read else after(collated.events[chosen])
        truth = self.next_items(cuts, close)
        known = np.flatnonzero(truth >= 0)
        if not len(known):
            return None
        recent = self.timeline.recent_items(cuts.take(known), RECENT)
        return FollowingItems(
            places=places[torch.from_numpy(chosen[known])],
            recent=torch.from_numpy(self.tokenizer.items(recent)),
            truth=torch.from_numpy(truth[known]),
            sample=torch.from_numpy(chance.sample),
        )
