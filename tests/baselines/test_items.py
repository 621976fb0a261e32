"""Rankers of items against hand-made shops."""

from __future__ import annotations

import numpy as np

from pipelines.baselines.items import (
    RANKERS,
    TOP,
    Touches,
    collect_touches,
    rank_frequent,
    rank_item_knn,
    rank_popular,
    rank_recent,
)
from pipelines.features.store import encode_events, hash_text

DAY = 86_400_000_000
CUT = 100 * DAY


def make(histories: list[list[tuple[int, int]]], items: int) -> Touches:
    """Touches of (item, day) by shopper."""
    rows = [(u, i, d * DAY) for u, own in enumerate(histories) for i, d in own]
    user, item, ts = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    return Touches(user=user, item=item, ts=ts, users=len(histories), items=items, cut=CUT)


def test_popular_counts_the_last_weeks_alone() -> None:
    touches = make([[(2, 1), (2, 2), (2, 3), (1, 98)], [(1, 99), (0, 99)]], items=4)
    ranked = rank_popular(touches, np.array([0, 1]))
    assert ranked.tolist() == [[1, 0, 2, 3]] * 2


def test_recent_is_the_own_latest_then_bestsellers() -> None:
    touches = make([[(3, 90), (2, 95), (3, 96)], [(0, 99), (0, 99)], [(1, 1)]], items=5)
    ranked = rank_recent(touches, np.array([0, 2]))
    assert ranked[0, :3].tolist() == [3, 2, 0]
    assert ranked[1, :2].tolist() == [1, 0]


def test_frequent_is_what_the_shopper_touches_most_then_bestsellers() -> None:
    touches = make(
        [[(3, 10), (3, 20), (2, 95), (4, 96)], [(4, 99), (4, 99), (0, 99)], [(1, 1)]], items=6
    )
    ranked = rank_frequent(touches, np.array([0, 2]))
    assert ranked[0, :4].tolist() == [3, 4, 2, 0]
    assert ranked[1, :2].tolist() == [1, 4]


def test_item_knn_finds_what_the_same_shoppers_touch() -> None:
    together = [[(0, 10), (1, 11)] for _ in range(30)] + [[(2, 10), (3, 11)] for _ in range(40)]
    touches = make([*together, [(0, 90)]], items=6)
    ranked = rank_item_knn(touches, np.array([70]))
    assert ranked[0, :2].tolist() == [0, 1]


def test_no_more_is_ranked_than_there_is() -> None:
    touches = make([[(0, 90)]], items=3)
    for rank in RANKERS.values():
        assert sorted(rank(touches, np.array([0]))[0].tolist()) == [0, 1, 2]
    many = make([[(0, 90)]], items=50)
    for rank in RANKERS.values():
        assert rank(many, np.array([0])).shape == (1, TOP)


def test_touches_name_known_items_before_the_cut() -> None:
    events = [
        {"ts": day * DAY, "event_type": "view", "item_id": item}
        for day, item in ((90, "a"), (95, "b"), (96, "c"), (101, "a"))
    ]
    sequences = encode_events([events], [{}])
    known = np.array([hash_text("b"), hash_text("a")], dtype=np.uint32)
    touches = collect_touches(sequences, known, CUT)
    assert touches.item.tolist() == [1, 0]
    assert touches.ts.tolist() == [90 * DAY, 95 * DAY]


def test_without_known_items_nothing_is_ranked() -> None:
    events = [{"ts": 99 * DAY, "event_type": "view", "item_id": "a"}]
    sequences = encode_events([events, events], [{}, {}])
    touches = collect_touches(sequences, np.zeros(0, dtype=np.uint32), CUT)
    assert len(touches.user) == len(touches.item) == len(touches.ts) == 0
    for rank in RANKERS.values():
        assert rank(touches, np.array([0, 1])).shape == (2, 0)
