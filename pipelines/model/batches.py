"""Packed batches: cuts drawn over users' lives, histories cut into pieces, pieces into rows.

All of it works on flat arrays; no step loops over users.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.features.store import ranges
from pipelines.model.network import Batch
from pipelines.model.timeline import DAY, Cuts, Timeline
from pipelines.model.tokens import Tokenizer

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """P pieces of history, each with the NOW tokens of some cuts.

    Attributes:
        start, stop: int64 (P,), flat events of the piece.
        user: int64 (P,).
        cuts: M cuts ordered by piece and time.
        cut_start: int64 (P + 1,), cuts of piece p are ``cut_start[p]:cut_start[p + 1]``.
    """

    start: Ints
    stop: Ints
    user: Ints
    cuts: Cuts
    cut_start: Ints

    @property
    def lengths(self) -> Ints:
        """Tokens of every piece: profile, events, NOWs."""
        return 1 + (self.stop - self.start) + np.diff(self.cut_start)


def sample_cuts(
    timeline: Timeline,
    *,
    count: int,
    first: int,
    last: int,
    active_days: float | None,
    half_life_days: float | None,
    rng: np.random.Generator,
) -> Cuts:
    """Draw cuts over the time that users spend in the population, lately more than long ago.

    A user is in the population while their last event is at most ``active_days`` old. The draw
    is stratified (one uniform point in each of ``count`` equal slices of that time), so equal
    time gets equal weight, whoever's it is, but for its age: shoppers and seasons change, so
    that what is a half-life older counts half.

    Args:
        timeline: all events.
        count: cuts to draw.
        first, last: microseconds, bounds of the cuts.
        active_days: None = for ever after the first event.
        half_life_days: None = all time counts alike.
        rng: source of chance.

    Returns:
        Cuts ordered by user and time; none when nobody is ever in the population.
    """
    ts = timeline.ts
    until = np.full(len(ts), last, dtype=np.int64)
    if len(ts):
        same = timeline.user[1:] == timeline.user[:-1]
        until[:-1] = np.where(same, ts[1:], last)
    if active_days is not None:
        # A cut exactly active_days after the event still counts it.
        until = np.minimum(until, ts + int(active_days * DAY))
    since = np.maximum(ts, first)
    span = np.maximum(np.minimum(until, last) - since, 0).astype(np.float64)
    density = np.ones(len(span))
    if half_life_days is not None:
        # What comes after the last has no span, and must not overflow.
        age = np.maximum(last - since - span / 2, 0.0)
        density = np.exp2(-age / (half_life_days * DAY))
    weight = np.cumsum(span * density)
    total = weight[-1] if len(weight) else 0.0
    if total <= 0:
        empty = np.zeros(0, dtype=np.int64)
        return Cuts(user=empty, ts=empty, position=empty)
    points = (np.arange(count) + rng.random(count)) * (total / count)
    event = np.minimum(np.searchsorted(weight, points, side="right"), len(ts) - 1)
    # A cut lies after its event, and at latest when the interval ends.
    ahead = ((weight[event] - points) / density[event]).astype(np.int64)
    stop = np.minimum(until[event], last)
    cut = np.maximum(stop - ahead, since[event] + 1)
    return timeline.cuts(timeline.user[event], np.minimum(cut, np.maximum(stop, ts[event] + 1)))


def cut_pieces(
    timeline: Timeline, cuts: Cuts, *, context: int, stride: int, shift: NDArray[np.int64] | None
) -> Pieces:
    """Group cuts into pieces of history that they share.

    A user with at most ``context`` events is one piece. Longer histories are cut every
    ``stride`` events, and a piece begins ``context - stride`` events before, so that every cut
    sees at least as many (or all there are).

    Args:
        timeline: all events.
        cuts: ordered by user and time.
        context: most events of a piece.
        stride: events between pieces, below ``context``.
        shift: int64 (U,), moves each user's grid; None = the piece ends at its last cut, which
            is what a prediction wants.
    """
    offset = timeline.offsets[cuts.user]
    seen = cuts.position - offset
    if shift is None:
        group = np.arange(len(cuts), dtype=np.int64)
        start = np.maximum(cuts.position - context, offset)
    else:
        whole = _last_seen(cuts, seen) <= context
        group = np.where(whole, 0, (seen + shift[cuts.user]) // stride)
        begin = group * stride - shift[cuts.user] - (context - stride)
        start = offset + np.where(whole, 0, np.maximum(begin, 0))
    new = np.ones(len(cuts), dtype=bool)
    new[1:] = (cuts.user[1:] != cuts.user[:-1]) | (group[1:] != group[:-1])
    first = np.flatnonzero(new)
    cut_start = np.append(first, len(cuts)).astype(np.int64)
    last = cut_start[1:] - 1
    return Pieces(
        start=start[first],
        stop=cuts.position[last],
        user=cuts.user[first],
        cuts=cuts,
        cut_start=cut_start,
    )


def _last_seen(cuts: Cuts, seen: Ints) -> Ints:
    """Return for every cut how many events the last cut of its user sees."""
    if not len(cuts):
        return seen
    ends = np.flatnonzero(np.append(cuts.user[1:] != cuts.user[:-1], True))
    return np.repeat(seen[ends], np.diff(np.concatenate([[-1], ends])))


def pack(lengths: Ints, row: int, rng: np.random.Generator | None) -> tuple[Ints, Ints]:
    """Pack pieces into rows of ``row`` places, best-fit decreasing over distinct lengths.

    A pattern (the longest piece that fits, again and again) is found once and used for as many
    rows as the counts allow, so the work depends on the number of distinct lengths, not of pieces.

    Args:
        lengths: int64 (P,), each at most ``row``.
        row: places of a row.
        rng: shuffles pieces of one length and the rows; None keeps order.

    Returns:
        Row and first column of every piece, int64 (P,) each.
    """
    order = rng.permutation(len(lengths)) if rng is not None else np.arange(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    left = np.bincount(lengths, minlength=row + 1)
    used = np.concatenate([[0], np.cumsum(left)])[:-1]  # next piece of each length in `order`
    piece_row = np.zeros(len(lengths), dtype=np.int64)
    piece_column = np.zeros(len(lengths), dtype=np.int64)
    rows = 0
    while left.any():
        pattern: list[int] = []
        free = row
        taken = left.copy()
        while free > 0:
            fitting = np.flatnonzero(taken[: free + 1])
            if not len(fitting):
                break
            length = int(fitting[-1])
            pattern.append(length)
            taken[length] -= 1
            free -= length
        needed = np.bincount(pattern, minlength=row + 1)
        kinds = np.flatnonzero(needed)
        times = int((left[kinds] // needed[kinds]).min())
        column = 0
        for length in pattern:
            pieces = order[used[length] : used[length] + times]
            piece_row[pieces] = rows + np.arange(times)
            piece_column[pieces] = column
            used[length] += times
            left[length] -= times
            column += length
        rows += times
    if rng is not None and rows:
        piece_row = rng.permutation(rows)[piece_row]
    return piece_row, piece_column


@dataclass(frozen=True, kw_only=True)
class Collated:
    """A batch and where its NOW and event tokens come from.

    Attributes:
        batch: the network's input.
        cuts: M cuts, in the order of ``batch.now_place``.
        rows: int64 (M,), index of each in the pieces' cuts.
        events: int64 (E,), flat index of every event token, in the order of
            ``batch.event_place``.
    """

    batch: Batch
    cuts: Cuts
    rows: Ints
    events: Ints


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the pieces of a batch lie.

    Attributes:
        chosen: int64 (P,), which pieces.
        place: int64 (P,), flat place of the first token of each.
        shape: rows and places of a row.
    """

    chosen: Ints
    place: Ints
    shape: tuple[int, int]


def lay_out(
    pieces: Pieces, *, row: int, tokens_per_batch: int, rng: np.random.Generator | None
) -> list[Placement]:
    """Pack pieces into batches of about ``tokens_per_batch`` places.

    Args:
        pieces: what to pack.
        row: places of a row; grown to the longest piece where that is longer.
        tokens_per_batch: places of a batch.
        rng: shuffles; None keeps order.
    """
    lengths = pieces.lengths
    if not len(lengths):
        return []
    row = max(row, int(lengths.max()))
    piece_row, piece_column = pack(lengths, row, rng)
    by_row = np.argsort(piece_row * row + piece_column, kind="stable")
    rows = int(piece_row.max()) + 1
    per_batch = max(1, tokens_per_batch // row)
    bounds = np.searchsorted(piece_row[by_row], np.arange(0, rows + per_batch, per_batch))
    placed = []
    for batch, (low, high) in enumerate(pairwise(bounds)):
        chosen = by_row[low:high]
        first_row = batch * per_batch
        placed.append(
            Placement(
                chosen=chosen,
                place=(piece_row[chosen] - first_row) * row + piece_column[chosen],
                shape=(min(per_batch, rows - first_row), row),
            )
        )
    return placed


def iterate(
    timeline: Timeline,
    tokenizer: Tokenizer,
    pieces: Pieces,
    *,
    row: int,
    tokens_per_batch: int,
    features: bool,
    rng: np.random.Generator | None,
) -> Iterator[Collated]:
    """Yield packed batches.

    Args:
        timeline: all events.
        tokenizer: makes tokens.
        pieces: what to pack.
        row, tokens_per_batch, rng: see ``lay_out``.
        features: compute the snapshot features at NOW.
    """
    for placement in lay_out(pieces, row=row, tokens_per_batch=tokens_per_batch, rng=rng):
        yield from collate(timeline, tokenizer, pieces, [placement], features=features)


def collate(
    timeline: Timeline,
    tokenizer: Tokenizer,
    pieces: Pieces,
    placements: Sequence[Placement],
    *,
    features: bool,
) -> list[Collated]:
    """Lay some pieces out in rows, of several batches at a time.

    Args:
        timeline: all events.
        tokenizer: makes tokens.
        pieces: all pieces.
        placements: of every batch, which pieces lie where.
        features: compute the snapshot features at NOW.
    """
    placed = [_lay_down(timeline, pieces, placement) for placement in placements]
    # What is told of a token does not depend on its batch: it is made for all at once.
    users = _join([pieces.user[placement.chosen] for placement in placements])
    cuts = Cuts.join([part.cuts for part in placed])
    profiles = tokenizer.profiles(timeline.sequences, users)
    events = tokenizer.events(timeline, _join([part.events for part in placed]))
    nows = (
        tokenizer.nows(timeline, cuts),
        timeline.features(cuts) if features else np.zeros((len(cuts), 0), np.float32),
    )
    told = zip(
        placed,
        *_split(profiles, [len(placement.chosen) for placement in placements]),
        *_split(events, [len(part.events) for part in placed]),
        *_split(nows, [len(part.cuts) for part in placed]),
        strict=True,
    )
    collated = []
    for part, profile_numbers, profile_codes, numbers, codes, now_numbers, now_features in told:
        queries = tokenizer.queries(timeline.sequences, part.events)
        query_rows, query_tokens, query_offsets = map(torch.from_numpy, queries)
        batch = Batch(
            **part.places,
            profile_numbers=profile_numbers,
            profile_codes=profile_codes,
            event_codes=codes,
            event_numbers=numbers,
            query_rows=query_rows,
            query_tokens=query_tokens,
            query_offsets=query_offsets,
            now_numbers=now_numbers,
            now_features=now_features,
        )
        collated.append(Collated(batch=batch, cuts=part.cuts, rows=part.rows, events=part.events))
    return collated


def _join(parts: Sequence[Ints]) -> Ints:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _split(arrays: Sequence[NDArray[Any]], counts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    """Cut arrays that lie end to end into parts of so many rows."""
    tensors = [torch.from_numpy(array) for array in arrays]
    if len(counts) == 1:  # as where single histories are asked about
        return [(tensor,) for tensor in tensors]
    return [tensor.split(counts) for tensor in tensors]  # type: ignore[no-untyped-call]


@dataclass(frozen=True, kw_only=True)
class _Placed:
    """Which tokens a batch has, see ``Collated``, and of ``Batch`` what says where they lie."""

    places: dict[str, torch.Tensor]
    cuts: Cuts
    rows: Ints
    events: Ints


def _lay_down(timeline: Timeline, pieces: Pieces, placement: Placement) -> _Placed:
    chosen, place, shape = placement.chosen, placement.place, placement.shape
    start, stop = pieces.start[chosen], pieces.stop[chosen]
    cut_start = pieces.cut_start[chosen]
    cut_counts = pieces.cut_start[chosen + 1] - cut_start
    event_counts = stop - start
    events = ranges(start, event_counts)
    event_piece = np.repeat(np.arange(len(chosen)), event_counts)
    rows = ranges(cut_start, cut_counts)
    cuts = pieces.cuts.take(rows)
    cut_piece = np.repeat(np.arange(len(chosen)), cut_counts)

    # Within a piece: profile, then events with each NOW right before the first event it may
    # not see. Keys of events and NOWs interleave in that order.
    local_event = events - start[event_piece]
    local_cut = cuts.position - start[cut_piece]
    span = int(event_counts.max(initial=0)) + 2
    cut_keys = cut_piece * span + local_cut
    event_keys = event_piece * span + local_event
    nows_before = np.searchsorted(cut_keys, event_keys, side="right")
    earlier = np.cumsum(cut_counts) - cut_counts
    event_place = place[event_piece] + 1 + local_event + nows_before - earlier[event_piece]
    number = np.arange(len(rows)) - earlier[cut_piece]
    now_place = place[cut_piece] + 1 + local_cut + number

    profiles, event_count, now_count = len(chosen), len(events), len(rows)
    size = shape[0] * shape[1]
    source = np.zeros(size, dtype=np.int64)
    source[place] = 1 + np.arange(profiles)
    source[event_place] = 1 + profiles + np.arange(event_count)
    source[now_place] = 1 + profiles + event_count + np.arange(now_count)
    segment = np.zeros(size, dtype=np.int32)
    position = np.zeros(size, dtype=np.float32)
    time = np.zeros(size, dtype=np.float32)
    # Times relative to the piece's end: float32 is exact where it matters, at short distances.
    reference = pieces.cuts.ts[pieces.cut_start[chosen + 1] - 1]
    begin = reference.copy()
    begin[event_counts > 0] = timeline.ts[start[event_counts > 0]]
    segment[place] = 1 + np.arange(profiles)
    time[place] = (begin - reference) / DAY
    segment[event_place] = 1 + event_piece
    position[event_place] = 1 + local_event
    time[event_place] = (timeline.ts[events] - reference[event_piece]) / DAY
    segment[now_place] = 1 + cut_piece
    position[now_place] = 1 + local_cut
    time[now_place] = (cuts.ts - reference[cut_piece]) / DAY
    is_now = np.zeros(size, dtype=bool)
    is_now[now_place] = True
    tensor = torch.from_numpy
    return _Placed(
        places={
            "source": tensor(source).view(shape),
            "segment": tensor(segment).view(shape),
            "is_now": tensor(is_now).view(shape),
            "position": tensor(position).view(shape),
            "time": tensor(time).view(shape),
            "now_place": tensor(now_place),
            "event_place": tensor(event_place),
        },
        cuts=cuts,
        rows=rows,
        events=events,
    )
