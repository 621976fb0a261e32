"""Cuts, pieces and rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.features.store import Sequences, encode_events
from pipelines.model.batches import cut_pieces, iterate, lay_out, pack, sample_cuts
from pipelines.model.timeline import DAY, Cuts, Timeline
from pipelines.model.tokens import Tokenizer, Vocabulary
from tests.model.conftest import PERIODS


def sample(
    timeline: Timeline,
    count: int = 500,
    active_days: float | None = 14.0,
    half_life_days: float | None = None,
) -> Cuts:
    return sample_cuts(
        timeline,
        count=count,
        first=PERIODS.first,
        last=PERIODS.calibration,
        active_days=active_days,
        half_life_days=half_life_days,
        rng=np.random.default_rng(0),
    )


@pytest.mark.parametrize("days", [14, 1])  # few are silent for two weeks, most for a day
def test_cuts_lie_in_the_population_and_in_bounds(shop: Sequences, days: int) -> None:
    timeline = Timeline(shop)
    cuts = sample(timeline, active_days=float(days))
    assert len(cuts) == 500
    assert ((cuts.ts > PERIODS.first) & (cuts.ts <= PERIODS.calibration)).all()
    last = timeline.ts[cuts.position - 1]
    assert (cuts.position > timeline.offsets[cuts.user]).all()
    assert ((last < cuts.ts) & (last >= cuts.ts - days * DAY)).all()
    order = np.lexsort((cuts.ts, cuts.user))
    assert (order == np.arange(len(cuts))).all()


def test_cuts_are_uniform_over_active_time(shop: Sequences) -> None:
    cuts = sample(Timeline(shop), count=20_000, active_days=None)
    active = np.bincount(cuts.user, minlength=shop.users)
    start = np.maximum(shop.ts[shop.offsets[:-1]], PERIODS.first)
    share = np.maximum(PERIODS.calibration - start, 0).astype(float)
    expected = 20_000 * share / share.sum()
    assert np.abs(active - expected).max() <= 2  # stratified: all but exact


def test_what_is_a_half_life_older_counts_half(shop: Sequences) -> None:
    timeline = Timeline(shop)
    even = sample(timeline, count=20_000)
    aged = sample(timeline, count=20_000, half_life_days=7.0)
    ages = [(PERIODS.calibration - cuts.ts) / DAY for cuts in (even, aged)]
    weeks = np.array([[((a >= w) & (a < w + 7)).sum() for w in (0, 7, 14, 21)] for a in ages])
    ratio = weeks[1] / weeks[0]
    assert np.abs(ratio[1:] / ratio[:-1] - 0.5).max() < 0.05
    last = timeline.ts[aged.position - 1]
    assert ((last < aged.ts) & (last >= aged.ts - 14 * DAY)).all()


def test_events_after_the_last_cut_do_not_overflow(shop: Sequences) -> None:
    timeline = Timeline(shop)
    with np.errstate(over="raise", invalid="raise"):
        cuts = sample(timeline, half_life_days=0.005)
    assert (timeline.ts > PERIODS.calibration + 6 * DAY).any()
    assert (cuts.ts <= PERIODS.calibration).all()
    assert cuts.ts.min() > PERIODS.calibration - DAY


def test_nobody_in_the_population_gives_no_cuts(shop: Sequences) -> None:
    cuts = sample_cuts(
        Timeline(shop),
        count=10,
        first=0,
        last=1,
        active_days=1,
        half_life_days=None,
        rng=np.random.default_rng(0),
    )
    assert len(cuts) == 0


def test_pieces_hold_enough_history(shop: Sequences) -> None:
    timeline = Timeline(shop)
    cuts = sample(timeline)
    shift = np.random.default_rng(1).integers(6, size=shop.users)
    pieces = cut_pieces(timeline, cuts, context=10, stride=6, shift=shift)
    piece = np.repeat(np.arange(len(pieces.start)), np.diff(pieces.cut_start))
    start = pieces.start[piece]
    assert (cuts.user == pieces.user[piece]).all()
    assert (cuts.position <= pieces.stop[piece]).all()
    assert (pieces.stop - pieces.start <= 10).all()
    seen = cuts.position - start
    assert (seen >= np.minimum(4, cuts.position - timeline.offsets[cuts.user])).all()


def test_a_prediction_sees_the_newest_events_of_its_user() -> None:
    users = [[{"ts": i, "event_type": "view"} for i in range(count)] for count in (3, 20, 0)]
    timeline = Timeline(encode_events(users))
    cuts = timeline.cuts(np.array([0, 1, 1, 2]), np.array([2, 10, 100, 100]))
    pieces = cut_pieces(timeline, cuts, context=8, stride=6, shift=None)
    # Each by itself; of the second user's 10 and 20 events the last 8.
    assert pieces.start.tolist() == [0, 3 + 2, 3 + 12, 23]
    assert pieces.stop.tolist() == [2, 3 + 10, 3 + 20, 23]
    assert pieces.user.tolist() == [0, 1, 1, 2]
    assert pieces.cut_start.tolist() == [0, 1, 2, 3, 4]
    assert pieces.lengths.tolist() == [4, 10, 10, 2]


def test_a_history_that_fits_is_one_piece_and_a_longer_one_several() -> None:
    users = [[{"ts": i, "event_type": "view"} for i in range(count)] for count in (10, 11)]
    timeline = Timeline(encode_events(users))
    cuts = timeline.cuts(np.repeat([0, 1], 3), np.array([1, 7, 10, 1, 7, 11]))
    shift = np.zeros(2, dtype=np.int64)
    pieces = cut_pieces(timeline, cuts, context=10, stride=6, shift=shift)
    assert pieces.user.tolist() == [0, 1, 1]
    assert pieces.start.tolist() == [0, 10, 10 + 2]
    assert pieces.stop.tolist() == [10, 10 + 1, 10 + 11]
    assert pieces.cut_start.tolist() == [0, 3, 4, 6]


def test_a_batch_holds_about_as_many_places_as_are_asked_for(shop: Sequences) -> None:
    timeline = Timeline(shop)
    pieces = cut_pieces(timeline, sample(timeline), context=10, stride=6, shift=None)
    placements = lay_out(pieces, row=20, tokens_per_batch=100, rng=None)
    assert [p.shape for p in placements[:-1]] == [(5, 20)] * (len(placements) - 1)
    assert placements[-1].shape[0] <= 5
    assert sorted(np.concatenate([p.chosen for p in placements])) == list(range(len(pieces.start)))
    # A row grows to the longest piece, and a batch holds one row at least.
    wide = lay_out(pieces, row=1, tokens_per_batch=1, rng=None)
    assert {p.shape for p in wide} == {(1, int(pieces.lengths.max()))}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=200), st.integers(20, 30), st.booleans())
def test_packed_pieces_do_not_overlap(lengths: list[int], row: int, shuffle: bool) -> None:
    rng = np.random.default_rng(0) if shuffle else None
    piece_row, column = pack(np.array(lengths), row, rng)
    used = np.zeros((piece_row.max() + 1, row), dtype=int)
    for length, r, c in zip(lengths, piece_row, column, strict=True):
        assert c + length <= row
        used[r, c : c + length] += 1
    assert used.max() == 1
    assert (used.sum(axis=1) > 0).all()


def test_rows_are_nearly_full() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 140, size=5000)
    piece_row, _ = pack(lengths, 143, rng)
    assert lengths.sum() / ((piece_row.max() + 1) * 143) > 0.97


def test_batches_cover_every_cut_once(shop: Sequences) -> None:
    timeline = Timeline(shop)
    cuts = sample(timeline)
    shift = np.zeros(shop.users, dtype=np.int64)
    pieces = cut_pieces(timeline, cuts, context=10, stride=6, shift=shift)
    tokenizer = Tokenizer(Vocabulary(), item_buckets=4, query_buckets=4)
    rows: list[int] = []
    for collated in iterate(
        timeline,
        tokenizer,
        pieces,
        row=20,
        tokens_per_batch=100,
        features=False,
        rng=np.random.default_rng(0),
    ):
        rows += collated.rows.tolist()
        batch = collated.batch
        filled = (batch.source > 0).sum()
        listed = len(batch.profile_codes) + len(batch.event_codes) + len(batch.now_numbers)
        assert filled == listed
        assert len(np.unique(batch.source[batch.source > 0])) == listed
        # Time never runs backwards within a segment.
        same = batch.segment[:, 1:] == batch.segment[:, :-1]
        assert (batch.time.diff(dim=1)[same] >= 0).all()
    assert sorted(rows) == list(range(len(cuts)))
