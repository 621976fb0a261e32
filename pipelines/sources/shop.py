"""The simulated shop: what its shoppers do, as a hidden Markov process in continuous time.

A shopper has a fixed latent segment and a latent intent that moves as a Markov chain in
continuous time: away, browsing, researching one category (active in a session, or idle between
sessions), about to buy in that category, stocked up (five phases in a row, so that the delay to
the next need has a peak), gone for good. Each state emits marked events at its own rates; a
purchase usually moves the shopper to the first stocked-up phase. That is a marked Markovian
arrival process (Fischer & Meier-Hellstern, "The Markov-modulated Poisson process cookbook",
Performance Evaluation 18, 1993), so what is going to happen given what was seen has a closed form
(pipelines.sources.oracle).

All rates are per day of *operational* time; a deterministic daily and weekly rhythm maps it to
clock time (`operational_time`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pipelines.events import EVENT_CODES, EVENT_TYPES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SEGMENTS: Final = ("bargain", "regular", "premium", "occasional")
CATEGORIES: Final = ("shoes", "jackets", "lamps", "kitchen", "games", "garden")
ITEMS_PER_CATEGORY: Final = 60
BRANDS: Final = ("Alder", "Birch", "Cedar", "Dune", "Elm", "Fjord", "Grove", "Heath")
GENDERS: Final = ("female", "male", "other")
REGIONS: Final = ("north", "east", "south", "west")
WORDS: Final[dict[str, tuple[str, ...]]] = {
    "shoes": ("running shoes", "boots", "sneakers", "leather shoes", "trail shoes", "sandals"),
    "jackets": ("rain jacket", "parka", "down jacket", "windbreaker", "winter coat", "fleece"),
    "lamps": ("desk lamp", "floor lamp", "led bulb", "reading lamp", "pendant light", "lantern"),
    "kitchen": ("frying pan", "chef knife", "kettle", "baking tin", "coffee grinder", "wok"),
    "games": ("board game", "puzzle", "card game", "dice set", "chess", "strategy game"),
    "garden": ("garden hose", "pruning shears", "flower pot", "seed set", "rake", "lawn edge"),
}
# Searches that tell no category, equally likely in every state, so that they carry none.
GENERIC_WORDS: Final = ("gift", "sale", "new in", "best price")
GENERIC_SHARE: Final = 0.15

N_SEGMENTS: Final = len(SEGMENTS)
N_CATEGORIES: Final = len(CATEGORIES)
N_TYPES: Final = len(EVENT_TYPES)

# Layout of the states of one segment.
AWAY: Final = 0
BROWSING: Final = 1
ACTIVE: Final = 2
IDLE: Final = ACTIVE + N_CATEGORIES
BUYING: Final = IDLE + N_CATEGORIES
STOCKED: Final = BUYING + N_CATEGORIES
PHASES: Final = 5
GONE: Final = STOCKED + PHASES
N_STATES: Final = GONE + 1

SEGMENT_SHARES: Final = np.array([0.30, 0.30, 0.18, 0.22])
PURCHASE: Final = EVENT_CODES["purchase"] - 1
SEARCH: Final = EVENT_CODES["search"] - 1

# A purchase ends the need with this probability; otherwise the shopper goes on buying.
SATISFIED: Final = 0.85

QUANTITIES: Final = np.array([1.0, 2.0, 3.0])
QUANTITY_SHARES: Final = np.array([0.75, 0.18, 0.07])

# Operational time runs faster in the evening and at the weekend: the rate of time is
# 1 + sum of amplitude x cos(2 pi (t - peak) / period), t in days since the shop's start.
RHYTHM: Final = ((1.0, 0.45, 19.5 / 24), (0.5, 0.15, 12.5 / 24), (7.0, 0.15, 5.5))


@dataclass(frozen=True, kw_only=True)
class Shop:
    """All rates and distributions.

    Attributes:
        moves: (segments, states, states) rates of moving without an event; zero diagonal.
        emits: (segments, states, types) rates of events.
        focus: (segments, states, categories) which category an event is about.
        item_shares: (segments, items) which item, given its category.
        item_prices: (items,) unit price.
        item_brands: (items,) index into BRANDS.
        ages: (segments, 2) mean and standard deviation in years.
        genders: (segments, genders) shares.
        regions: (segments, regions) shares.
    """

    moves: Floats
    emits: Floats
    focus: Floats
    item_shares: Floats
    item_prices: Floats
    item_brands: Ints
    ages: Floats
    genders: Floats
    regions: Floats

    @property
    def mean_amounts(self) -> Floats:
        """(segments, states) expected price x quantity of a purchase in a state."""
        by_category = (
            (self.item_shares * self.item_prices)
            .reshape(N_SEGMENTS, N_CATEGORIES, ITEMS_PER_CATEGORY)
            .sum(-1)
        )
        amounts: Floats = np.einsum("skc,sc->sk", self.focus, by_category)
        return amounts * float(QUANTITIES @ QUANTITY_SHARES)


@cache
def build_shop() -> Shop:
    """Return the shop. It is the same for every seed: a seed draws shoppers, not shops."""
    preferences = np.array(
        [
            [0.30, 0.25, 0.10, 0.15, 0.15, 0.05],
            [0.15, 0.10, 0.20, 0.30, 0.10, 0.15],
            [0.10, 0.35, 0.25, 0.10, 0.05, 0.15],
            [0.10, 0.10, 0.10, 0.15, 0.35, 0.20],
        ]
    )
    moves = np.zeros((N_SEGMENTS, N_STATES, N_STATES))
    emits = np.zeros((N_SEGMENTS, N_STATES, N_TYPES))
    focus = np.broadcast_to(preferences[:, None, :], (N_SEGMENTS, N_STATES, N_CATEGORIES)).copy()

    def emit(state: int, scale: Floats | float, **rates: float) -> None:
        for name, rate in rates.items():
            emits[:, state, EVENT_CODES[name] - 1] = rate * scale

    visit = np.array([0.20, 0.30, 0.22, 0.10])
    need = np.array([0.012, 0.012, 0.010, 0.006])
    leave = np.array([0.004, 0.002, 0.002, 0.008])
    decide = np.array([0.8, 1.2, 1.5, 0.7])
    delay = np.array([16.0, 21.0, 34.0, 28.0])
    chatty = np.array([1.2, 1.0, 0.9, 0.8])
    likes_search = np.array([1.3, 1.0, 0.7, 0.9])

    moves[:, AWAY, BROWSING] = visit
    moves[:, AWAY, GONE] = leave
    moves[:, BROWSING, AWAY] = 50.0
    emit(BROWSING, chatty, view=200, wishlist=5, add_to_cart=8, remove_from_cart=3)
    emit(BROWSING, chatty * likes_search, search=22)
    for c in range(N_CATEGORIES):
        like = preferences[:, c]
        moves[:, AWAY, ACTIVE + c] = need * like
        moves[:, BROWSING, ACTIVE + c] = 1.0 * like
        moves[:, BROWSING, BUYING + c] = 0.1 * like
        moves[:, ACTIVE + c, IDLE + c] = 60.0
        moves[:, ACTIVE + c, BUYING + c] = 2.0 * decide
        moves[:, IDLE + c, ACTIVE + c] = 0.6
        moves[:, IDLE + c, BUYING + c] = 0.08 * decide
        moves[:, IDLE + c, AWAY] = 0.03 / decide
        moves[:, BUYING + c, IDLE + c] = 14.0
        moves[:, STOCKED + PHASES - 1, BUYING + c] = 0.55 * like * PHASES / delay
        emit(ACTIVE + c, chatty, view=190, wishlist=6, add_to_cart=10, remove_from_cart=4)
        emit(ACTIVE + c, chatty * likes_search, search=34)
        emit(BUYING + c, 1.0, view=70, add_to_cart=55, remove_from_cart=5, search=8, purchase=45)
        for state, share in ((ACTIVE + c, 0.88), (IDLE + c, 0.88), (BUYING + c, 0.95)):
            focus[:, state] *= 1 - share
            focus[:, state, c] += share
    for phase in range(PHASES):
        # Rates that differ a little keep the generator diagonalisable.
        step = PHASES / delay * (1 + 0.04 * phase)
        if phase < PHASES - 1:
            moves[:, STOCKED + phase, STOCKED + phase + 1] = step
        emit(STOCKED + phase, chatty, view=0.22, search=0.02)
    moves[:, STOCKED + PHASES - 1, AWAY] = 0.45 * PHASES / delay
    emit(STOCKED, 1.0, review=0.06, refund=0.03)
    emit(STOCKED + 1, 1.0, review=0.03, refund=0.01)

    shop = np.random.default_rng(20250101)  # the shop's own furniture, not a shopper's luck
    levels = np.array([60.0, 110.0, 45.0, 35.0, 25.0, 30.0])
    spread = np.sort(shop.normal(0, 0.55, (N_CATEGORIES, ITEMS_PER_CATEGORY)), axis=1)
    prices = np.round(levels[:, None] * np.exp(spread), 2)
    taste = np.array([-1.1, 0.0, 1.2, -0.3])
    popularity = shop.gamma(0.7, 1.0, (N_CATEGORIES, ITEMS_PER_CATEGORY)) + 0.02
    weights = popularity * np.exp(taste[:, None, None] * spread)
    weights /= weights.sum(-1, keepdims=True)
    return Shop(
        moves=moves,
        emits=emits,
        focus=focus,
        item_shares=weights.reshape(N_SEGMENTS, -1),
        item_prices=prices.ravel(),
        item_brands=shop.integers(0, len(BRANDS), N_CATEGORIES * ITEMS_PER_CATEGORY),
        ages=np.array([[27.0, 8.0], [41.0, 11.0], [52.0, 10.0], [35.0, 13.0]]),
        genders=np.array(
            [[0.55, 0.42, 0.03], [0.62, 0.36, 0.02], [0.45, 0.53, 0.02], [0.40, 0.57, 0.03]]
        ),
        regions=np.array(
            [
                [0.20, 0.35, 0.30, 0.15],
                [0.30, 0.25, 0.20, 0.25],
                [0.40, 0.15, 0.15, 0.30],
                [0.20, 0.20, 0.35, 0.25],
            ]
        ),
    )


def operational_time(days: Floats) -> Floats:
    """Map clock time to operational time, both in days since the shop's start."""
    total: Floats = np.array(days, dtype=np.float64)
    for period, amplitude, peak in RHYTHM:
        turn = 2 * np.pi / period
        total += amplitude / turn * (np.sin(turn * (days - peak)) + np.sin(turn * peak))
    return total


def clock_time(operational: Floats, low: float, high: float) -> Floats:
    """Invert `operational_time` between two clock times (days), to well below a microsecond."""
    grid = np.arange(low - 1, high + 1, 1 / 48)
    days: Floats = np.interp(operational, operational_time(grid), grid)
    for _ in range(3):  # Newton's method; the rate of time is never below 0.25
        rate = np.ones_like(days)
        for period, amplitude, peak in RHYTHM:
            rate += amplitude * np.cos(2 * np.pi / period * (days - peak))
        days = days - (operational_time(days) - operational) / rate
    return days
