"""Simulates the shop of pipelines.sources.shop: all shoppers at once, seeded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.events import (
    EVENT_CODES,
    EVENT_SCHEMA,
    EVENT_TYPES,
    ITEM_SCHEMA,
    SESSION_GAP_SECONDS,
    USER_SCHEMA,
)
from pipelines.sources.shop import (
    AWAY,
    BRANDS,
    BROWSING,
    CATEGORIES,
    GENDERS,
    GENERIC_SHARE,
    GENERIC_WORDS,
    ITEMS_PER_CATEGORY,
    N_CATEGORIES,
    N_SEGMENTS,
    N_STATES,
    PURCHASE,
    QUANTITIES,
    QUANTITY_SHARES,
    REGIONS,
    SATISFIED,
    SEARCH,
    SEGMENT_SHARES,
    STOCKED,
    WORDS,
    Floats,
    Ints,
    Shop,
    build_shop,
    clock_time,
    operational_time,
)

DAY_US: Final = 86_400_000_000
# Half of the shoppers signed up before the shop's log starts, at most this long before.
PAST_SIGNUP_DAYS: Final = 120.0
PROFILE_MISSING: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class SimulatorParams:
    """What is drawn. The fields are those of params.yaml `ingest.simulator`."""

    users: int = 9_000
    days: int = 180
    seed: int = 7
    start: str = "2025-01-01"

    @property
    def start_us(self) -> int:
        """Start in microseconds since the epoch."""
        start = datetime.strptime(self.start, "%Y-%m-%d").replace(tzinfo=UTC)
        return int(start.timestamp()) * 1_000_000


@dataclass(frozen=True, kw_only=True)
class SimulatedShop:
    """Tables in the schemas of pipelines.events; events sorted by (user_id, ts)."""

    events: pa.Table
    users: pa.Table
    items: pa.Table


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Marked points of many shoppers, sorted by (shopper, time).

    Attributes:
        shopper: (N,) index.
        time: (N,) operational time, days.
        state: (N,) the state that emitted the event.
        type: (N,) index into EVENT_TYPES.
    """

    shopper: Ints
    time: Floats
    state: Ints
    type: Ints


def initial_states() -> Floats:
    """(states,) distribution of the state at sign-up: most sign up while browsing."""
    shares = np.zeros(N_STATES)
    shares[BROWSING] = 0.7
    shares[AWAY] = 0.3
    return shares


def draw_paths(
    shop: Shop,
    *,
    segment: Ints,
    state: Ints,
    begin: Floats,
    end: Floats,
    random: np.random.Generator,
) -> Paths:
    """Draw every shopper's events by Gillespie's direct method, all shoppers in lockstep.

    Args:
        shop: the rates.
        segment: (U,) segment of each shopper.
        state: (U,) state at the beginning.
        begin: (U,) operational time, days.
        end: (U,) operational time, days.
        random: source of chance.

    Source: D. T. Gillespie, "Exact stochastic simulation of coupled chemical reactions",
    J. Phys. Chem. 81 (1977).
    """
    rates = np.concatenate([shop.moves, shop.emits], axis=-1)  # (S, K, K + E)
    totals = rates.sum(-1)
    chances = np.cumsum(rates, axis=-1) / np.where(totals > 0, totals, 1)[..., None]
    chances[..., -1] = 1.0
    alive = np.arange(len(segment))
    segment, state, time, end = segment.copy(), state.copy(), begin.copy(), end.copy()
    parts: list[tuple[Ints, Floats, Ints, Ints]] = []
    while len(alive):
        total = totals[segment, state]
        with np.errstate(divide="ignore"):
            time = time + random.exponential(size=len(alive)) / total  # gone: infinite
        keep = time < end
        alive, segment, state = alive[keep], segment[keep], state[keep]
        time, end = time[keep], end[keep]
        draw = random.random(len(alive))
        action = (chances[segment, state] <= draw[:, None]).sum(-1)
        is_event = action >= N_STATES
        kind = action - N_STATES
        parts.append((alive[is_event], time[is_event], state[is_event], kind[is_event]))
        satisfied = (kind == PURCHASE) & (random.random(len(alive)) < SATISFIED)
        state = np.where(is_event, np.where(satisfied, STOCKED, state), action)
    shopper, times, states, kinds = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((times, shopper))
    return Paths(shopper=shopper[order], time=times[order], state=states[order], type=kinds[order])


def simulate(params: SimulatorParams) -> SimulatedShop:
    """Draw a shop's log.

    Args:
        params: size, span and seed; equal params give equal tables.

    Returns:
        Events with ts in [start, start + days), all users who signed up in that time, all items.
    """
    shop = build_shop()
    random = np.random.default_rng(params.seed)
    n = params.users
    segment = random.choice(N_SEGMENTS, size=n, p=SEGMENT_SHARES)
    early = random.random(n) < 0.5
    signup = np.where(
        early, -PAST_SIGNUP_DAYS * random.random(n), params.days * 0.9 * random.random(n)
    )
    signup_us = np.floor(signup * DAY_US).astype(np.int64)
    paths = draw_paths(
        shop,
        segment=segment,
        state=random.choice(N_STATES, size=n, p=initial_states()),
        begin=operational_time(signup_us / DAY_US),
        end=np.full(n, float(operational_time(np.array([params.days]))[0])),
        random=random,
    )
    days = clock_time(paths.time, -PAST_SIGNUP_DAYS, params.days)
    micros = _separate(np.floor(days * DAY_US).astype(np.int64), paths.shopper)
    keep = (micros >= 0) & (micros < params.days * DAY_US)
    paths = Paths(
        shopper=paths.shopper[keep],
        time=paths.time[keep],
        state=paths.state[keep],
        type=paths.type[keep],
    )
    names = np.char.add("u", np.char.zfill(np.arange(n).astype(str), len(str(max(n - 1, 1)))))
    events = _mark_events(
        shop,
        paths,
        micros=micros[keep],
        segment=segment,
        names=names,
        params=params,
        random=random,
    )
    users = _draw_users(shop, segment, names, signup_us + params.start_us, random)
    return SimulatedShop(events=events, users=users, items=_list_items(shop))


def _separate(micros: Ints, shopper: Ints) -> Ints:
    """Give events of one shopper in the same microsecond the next ones, in their order."""
    while True:
        clash = np.flatnonzero((np.diff(micros) <= 0) & (np.diff(shopper) == 0)) + 1
        if not len(clash):
            return micros
        micros[clash] = micros[clash - 1] + 1


def _mark_events(
    shop: Shop,
    paths: Paths,
    *,
    micros: Ints,
    segment: Ints,
    names: np.ndarray,
    params: SimulatorParams,
    random: np.random.Generator,
) -> pa.Table:
    count = len(paths.time)
    of = segment[paths.shopper]
    focus = np.cumsum(shop.focus, axis=-1)
    category = (focus[of, paths.state] <= random.random(count)[:, None]).sum(-1)
    category = np.minimum(category, N_CATEGORIES - 1)
    shares = np.cumsum(
        shop.item_shares.reshape(N_SEGMENTS, N_CATEGORIES, ITEMS_PER_CATEGORY), axis=-1
    )
    # One sorted search for all (segment, category) rows: row r lives in [r, r + 1).
    rows = of * N_CATEGORIES + category
    flat = shares.reshape(-1, ITEMS_PER_CATEGORY) + np.arange(N_SEGMENTS * N_CATEGORIES)[:, None]
    position = np.searchsorted(flat.ravel(), rows + random.random(count) * (1 - 1e-12), "right")
    within = np.minimum(position - rows * ITEMS_PER_CATEGORY, ITEMS_PER_CATEGORY - 1)
    item = category * ITEMS_PER_CATEGORY + within
    is_search = paths.type == SEARCH
    has_item = ~is_search
    bought = np.isin(paths.type, [PURCHASE, EVENT_CODES["add_to_cart"] - 1])
    quantity = random.choice(QUANTITIES, size=count, p=QUANTITY_SHARES)
    words = [*(w for c in CATEGORIES for w in WORDS[c]), *GENERIC_WORDS]
    per_category = len(WORDS[CATEGORIES[0]])
    generic = random.random(count) < GENERIC_SHARE
    query = np.where(
        generic,
        len(words) - len(GENERIC_WORDS) + random.integers(0, len(GENERIC_WORDS), count),
        category * per_category + random.integers(0, per_category, count),
    )
    new_user = np.diff(paths.shopper, prepend=-1) != 0
    position_in_user = np.arange(count) - np.flatnonzero(new_user)[np.cumsum(new_user) - 1]
    gap = np.diff(micros, prepend=0) > SESSION_GAP_SECONDS * 1_000_000
    session = np.cumsum(new_user | gap)
    first_session = session[np.flatnonzero(new_user)][np.cumsum(new_user) - 1]
    user_of = names[paths.shopper]

    def pick(values: list[str], index: Ints, where: np.ndarray) -> pa.Array:
        codes = pa.array(index.astype(np.int32), mask=~where)
        return pa.DictionaryArray.from_arrays(codes, pa.array(values)).cast(pa.string())

    everywhere = np.ones(count, dtype=bool)
    user_ids = pick(list(names), paths.shopper, everywhere)
    columns = {
        "event_id": _join(user_of, "-", position_in_user),
        "user_id": user_ids,
        "ts": pa.array(micros + params.start_us, pa.timestamp("us", tz="UTC")),
        "event_type": pick(list(EVENT_TYPES), paths.type, everywhere),
        "item_id": pick(item_names(), item, has_item),
        "category": pick(list(CATEGORIES), category, has_item),
        "brand": pick([BRANDS[b] for b in shop.item_brands], item, has_item),
        "price": pa.array(shop.item_prices[item], mask=~has_item),
        "quantity": pa.array(quantity, mask=~bought),
        "query": pick(words, query, is_search),
        "session_id": _join(user_of, "/", session - first_session),
    }
    return pa.table(columns, schema=EVENT_SCHEMA)


def _join(prefix: np.ndarray, mark: str, number: Ints) -> pa.Array:
    return pc.binary_join_element_wise(pa.array(prefix), pa.array(number).cast(pa.string()), mark)


def item_names() -> list[str]:
    """Names of the items, category by category."""
    return [f"{c}-{k:02d}" for c in CATEGORIES for k in range(ITEMS_PER_CATEGORY)]


def _list_items(shop: Shop) -> pa.Table:
    return pa.table(
        {
            "item_id": item_names(),
            "category": np.repeat(CATEGORIES, ITEMS_PER_CATEGORY),
            "brand": [BRANDS[b] for b in shop.item_brands],
            "price": shop.item_prices,
        },
        schema=ITEM_SCHEMA,
    )


def _draw_users(
    shop: Shop, segment: Ints, names: np.ndarray, signup_us: Ints, random: np.random.Generator
) -> pa.Table:
    n = len(segment)
    age = np.clip(np.round(random.normal(shop.ages[segment, 0], shop.ages[segment, 1])), 16, 95)

    def draw(shares: Floats, values: tuple[str, ...]) -> pa.Array:
        index = (np.cumsum(shares, axis=-1)[segment] <= random.random(n)[:, None]).sum(-1)
        index = np.minimum(index, len(values) - 1)
        known = random.random(n) >= PROFILE_MISSING
        return pa.array(np.array(values, dtype=object)[index], pa.string(), mask=~known)

    return pa.table(
        {
            "user_id": names,
            "age": pa.array(age, mask=random.random(n) < PROFILE_MISSING),
            "gender": draw(shop.genders, GENDERS),
            "region": draw(shop.regions, REGIONS),
            "signup_ts": pa.array(signup_us, pa.timestamp("us", tz="UTC")),
        },
        schema=USER_SCHEMA,
    )
