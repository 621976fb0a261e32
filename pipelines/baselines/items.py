"""What shops recommend without a sequence model: bestsellers, the shopper's own, item-kNN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from pipelines.features.store import Sequences

TOP: Final = 20
_LATEST: Final = 200  # of a shopper's events from which neighbours are learnt
_RECENT: Final = 20  # of the shopper's own events that speak
_NEIGHBOURS: Final = 100  # kept of an item's
_SHRINKAGE: Final = 20.0  # shoppers that two items must share before half of it counts
_TREND_DAYS: Final = 28
_DAY: Final = 86_400_000_000
_ROWS: Final = 1024  # shoppers ranked at a time

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Touches:
    """Events before a cut that name a known item, by shopper and time.

    Attributes:
        user: int64 (N,), ascending; by time within.
        item: int64 (N,), codes.
        ts: int64 (N,), microseconds.
        users: U, shoppers in all.
        items: V, known items.
        cut: microseconds.
    """

    user: Ints
    item: Ints
    ts: Ints
    users: int
    items: int
    cut: int


def collect_touches(sequences: Sequences, vocabulary: NDArray[np.uint32], cut: int) -> Touches:
    """Pick the events before a cut whose item is in a vocabulary of hashes."""
    order = np.argsort(vocabulary, kind="stable")
    ts, item = np.asarray(sequences.ts), np.asarray(sequences.item)
    offsets = sequences.offsets
    user = np.repeat(np.arange(sequences.users), offsets[1:] - offsets[:-1])
    place = np.searchsorted(vocabulary[order], item)
    place = np.minimum(place, max(len(vocabulary) - 1, 0))
    known = (ts < cut) & (item > 0)
    known &= vocabulary[order][place] == item if len(vocabulary) else False
    codes = order[place[known]] if len(vocabulary) else np.zeros(0, dtype=np.int64)
    return Touches(
        user=user[known].astype(np.int64),
        item=codes.astype(np.int64),
        ts=ts[known],
        users=sequences.users,
        items=len(vocabulary),
        cut=cut,
    )


def rank_popular(touches: Touches, users: Ints) -> Ints:
    """Rank what most events of the last weeks named, the same for everybody, (M, TOP)."""
    recent = touches.ts >= touches.cut - _TREND_DAYS * _DAY
    best = _best(np.bincount(touches.item[recent], minlength=touches.items)[None, :])
    return np.repeat(best, len(users), axis=0)


def rank_recent(touches: Touches, users: Ints) -> Ints:
    """Rank what the shopper touched last, latest first, then bestsellers, (M, TOP)."""
    filler = _weigh_bestsellers(touches)
    weights = _history(touches, lambda age: 1.0 + 1.0 / (1.0 + age))
    return _rank(weights, users, lambda own: _max_rows(own, filler))


def rank_frequent(touches: Touches, users: Ints) -> Ints:
    """Rank what the shopper touched most often, of equals bestsellers first, (M, TOP).

    Hard to beat where people buy the same again (Hu et al., "Modeling Personalized Item Frequency
    Information for Next-basket Recommendation", SIGIR 2020).
    """
    filler = _weigh_bestsellers(touches)
    counts = sparse.csr_matrix(
        (np.ones(len(touches.user)), (touches.user, touches.item)),
        shape=(touches.users, touches.items),
    )
    return _rank(counts, users, lambda own: own.toarray() + filler)


def _weigh_bestsellers(touches: Touches) -> Floats:
    """Return weights of the bestsellers of late, below 1, and 0 of all others, (V,)."""
    popular = rank_popular(touches, np.zeros(1, dtype=np.int64))[0]
    weights = np.zeros(touches.items)
    weights[popular] = np.linspace(0.5, 0.1, len(popular))
    return weights


def rank_item_knn(touches: Touches, users: Ints) -> Ints:
    """Rank what is touched by the same shoppers as the shopper's latest items, (M, TOP).

    Item-based nearest neighbours (Sarwar et al. 2001): cosine of items over shoppers, shrunk
    where few shoppers are shared, summed over the shopper's latest items, later ones counting
    more. The items themselves are neighbours of their own.
    """
    late = _ages(touches) < _LATEST
    seen = sparse.csr_matrix(
        (np.ones(int(late.sum())), (touches.user[late], touches.item[late])),
        shape=(touches.users, touches.items),
    )
    seen.sum_duplicates()
    seen.data[:] = 1.0
    shared = (seen.T @ seen).tocsr()
    norm = np.sqrt(np.maximum(shared.diagonal(), 1.0))
    rows = np.repeat(np.arange(touches.items), np.diff(shared.indptr))
    cosine = shared.data / (norm[rows] * norm[shared.indices])
    shared.data = cosine * shared.data / (shared.data + _SHRINKAGE)
    near = _keep_largest(shared, _NEIGHBOURS)
    trend = np.bincount(touches.item, minlength=touches.items)
    filler = 1e-9 * trend / max(trend.max(initial=0), 1)
    weights = _history(touches, lambda age: 1.0 / (1.0 + age))
    return _rank(weights, users, lambda own: (own @ near).toarray() + filler)


RANKERS: Final[dict[str, Callable[[Touches, Ints], Ints]]] = {
    "popular": rank_popular,
    "recent": rank_recent,
    "frequent": rank_frequent,
    "item_knn": rank_item_knn,
}


def _ages(touches: Touches) -> Floats:
    """Return how many touches of the same shopper came after each, (N,)."""
    ends = np.cumsum(np.bincount(touches.user, minlength=touches.users))
    ages: Floats = (ends[touches.user] - 1 - np.arange(len(touches.user))).astype(np.float64)
    return ages


def _history(touches: Touches, weigh: Callable[[Floats], Floats]) -> sparse.csr_matrix:
    """Return weights of shoppers' latest items, (U, V); an item met twice has its larger one."""
    age = _ages(touches)
    late = age < _RECENT
    user, item, weight = touches.user[late], touches.item[late], weigh(age[late])
    # The latest of equal ones stays.
    order = np.lexsort((-weight, item, user))
    user, item, weight = user[order], item[order], weight[order]
    first = np.ones(len(user), dtype=bool)
    first[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    return sparse.csr_matrix(
        (weight[first], (user[first], item[first])), shape=(touches.users, touches.items)
    )


def _keep_largest(matrix: sparse.csr_matrix, count: int) -> sparse.csr_matrix:
    """Keep the largest entries of every row."""
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    order = np.lexsort((-matrix.data, rows))
    place = np.arange(len(rows)) - matrix.indptr[rows[order]]
    kept = order[place < count]
    return sparse.csr_matrix(
        (matrix.data[kept], (rows[kept], matrix.indices[kept])), shape=matrix.shape
    )


def _max_rows(own: sparse.csr_matrix, filler: Floats) -> Floats:
    scores: Floats = np.maximum(own.toarray(), filler)
    return scores


def _rank(
    weights: sparse.csr_matrix, users: Ints, score: Callable[[sparse.csr_matrix], Floats]
) -> Ints:
    parts = [_best(score(weights[users[low : low + _ROWS]])) for low in range(0, len(users), _ROWS)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), dtype=np.int64)


def _best(scores: NDArray[np.floating] | Ints) -> Ints:
    """Return the columns of each row's largest values, ties by column, (M, TOP)."""
    count = min(TOP, scores.shape[1])
    order = np.argsort(-scores, axis=1, kind="stable")
    return order[:, :count].astype(np.int64)
