"""The exact oracle of the simulated shop: the best prediction that its log allows.

The shop is a hidden Markov process in continuous time whose parameters are known, so what a
history tells about the latent segment and state, and what follows from these, has a closed form.
With, per segment, generator Q = M + R_jump (moves, and the jumps that purchases cause), event
rates r_e and D0 = M - diag(row sums of M) - diag(sum over e of r_e):

- Filtering (the forward algorithm, Rabiner, Proc. IEEE 77, 1989, in continuous time:
  Fischer & Meier-Hellstern, Performance Evaluation 18, 1993): between events
  a(t + s) = a(t) exp(D0 s); at an event with mark m, a := a diag(rate of m) J, with J the jump
  that a purchase causes, else the identity; then a is normalised over segments and states.
- P(no event of type e in the next s) = a exp((Q - R_e) s) 1, with R_e the flow of e taken out:
  the killed generator. All event types taken out gives churn.
- E[spend in s] = a (integral from 0 to s of exp(Q u) du) w, with w the purchase rate times the
  mean amount, read off exp of the generator augmented by w (Van Loan, IEEE TAC 23, 1978).

Times are operational (pipelines.sources.shop.operational_time): the rhythm is a deterministic
change of time. Marks that carry nothing (quantity, the words of a search given its category) drop
out of the likelihood.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.linalg import expm
from scipy.stats import norm

from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES
from pipelines.sources.shop import (
    CATEGORIES,
    GENDERS,
    GENERIC_WORDS,
    N_CATEGORIES,
    N_SEGMENTS,
    N_STATES,
    N_TYPES,
    PURCHASE,
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
    operational_time,
)
from pipelines.sources.simulator import (
    DAY_US,
    SimulatorParams,
    initial_states,
    item_names,
)

# Users filtered at once: enough for fast matrix products, little enough to stay in cache.
_CHUNK: Final = 2048
_UNKNOWN: Final = -1


def killed_generator(shop: Shop, segment: int, killed: Sequence[int]) -> Floats:
    """(states, states) generator of a segment with the flows of some event types taken out."""
    moves, emits = shop.moves[segment], shop.emits[segment]
    generator: Floats = moves - np.diag(moves.sum(-1))
    jump = SATISFIED * emits[:, PURCHASE]
    if PURCHASE not in killed:
        generator[:, STOCKED] += jump
        generator -= np.diag(jump)
    generator -= np.diag(emits[:, list(killed)].sum(-1))
    return generator


class _Propagator:
    """a -> a exp(G s) for many (a, s) at once, by eigendecomposition of each segment's G."""

    def __init__(self, generators: Floats) -> None:
        values, right = np.linalg.eig(generators)
        self.values = values  # (S, K)
        self.right = right  # (S, K, K)
        self.left = np.linalg.inv(right)

    def __call__(self, a: Floats, span: Floats) -> Floats:
        """Propagate.

        Args:
            a: (S, U, K) weights.
            span: (U,) operational days.
        """
        scaled = (a @ self.right) * np.exp(self.values[:, None, :] * span[:, None])
        moved: Floats = np.maximum(np.real(scaled @ self.left), 0.0)  # rounding may leave -1e-18
        return moved


def filter_states(
    shop: Shop,
    *,
    prior: Floats,
    offsets: Ints,
    time: Floats,
    type_: Ints,
    category: Ints,
    item: Ints,
    begin: Floats,
    cut: Floats,
) -> Floats:
    """Posterior of (segment, state) at the cut, given a history.

    Args:
        shop: the rates.
        prior: (U, S, K) distribution at `begin`.
        offsets: (U + 1,) slices of the event columns, one per user, times ascending.
        time: (N,) operational days.
        type_: (N,) index into EVENT_TYPES.
        category: (N,) index into CATEGORIES, -1 unknown.
        item: (N,) index into the items, -1 none.
        begin: (U,) operational days when observation begins.
        cut: (U,) operational days; no event is at or after it.

    Returns:
        (U, S, K), summing to 1 per user.
    """
    propagate = _Propagator(
        np.stack([killed_generator(shop, s, range(N_TYPES)) for s in range(N_SEGMENTS)])
    )
    counts = np.diff(offsets)
    posterior = np.empty_like(prior)
    # Long histories first: at step k the users that still have events are a prefix.
    order = np.argsort(-counts, kind="stable")
    for low in range(0, len(order), _CHUNK):
        users = order[low : low + _CHUNK]
        a = np.ascontiguousarray(prior[users].transpose(1, 0, 2))  # (S, U, K)
        last = begin[users].copy()
        steps = counts[users]
        for k in range(steps[0] if len(steps) else 0):
            live = int(np.searchsorted(-steps, -k, side="left"))  # users with more than k events
            rows = offsets[users[:live]] + k
            now = propagate(a[:, :live], time[rows] - last[:live])
            now *= _mark_rates(shop, type_[rows], category[rows], item[rows])
            bought = np.flatnonzero(type_[rows] == PURCHASE)
            satisfied = SATISFIED * now[:, bought].sum(-1)
            now[:, bought] *= 1 - SATISFIED
            now[:, bought, STOCKED] += satisfied
            now /= now.sum((0, 2))[:, None]
            a[:, :live] = now
            last[:live] = time[rows]
        a = propagate(a, cut[users] - last)
        a /= a.sum((0, 2))[:, None]
        posterior[users] = a.transpose(1, 0, 2)
    return posterior


def _mark_rates(shop: Shop, type_: Ints, category: Ints, item: Ints) -> Floats:
    """(S, U, K) rate of one event per user with its observed marks."""
    rates: Floats = shop.emits[:, :, type_].transpose(0, 2, 1)
    known = category != _UNKNOWN
    focus = shop.focus[:, :, np.where(known, category, 0)].transpose(0, 2, 1)
    rates = rates * np.where(known[:, None], focus, 1.0)
    has_item = item != _UNKNOWN
    shares = shop.item_shares[:, np.where(has_item, item, 0)]
    return rates * np.where(has_item, shares, 1.0)[..., None]


def predict_states(shop: Shop, posterior: Floats, spans: dict[int, float]) -> dict[str, Floats]:
    """What follows from a posterior at a cut.

    Args:
        shop: the rates.
        posterior: (U, S, K).
        spans: horizon in days -> length of its window in operational days.

    Returns:
        purchase, search, churn, spend per horizon: (U,) each, named like the targets.
    """
    predictions: dict[str, Floats] = {}
    for horizon, span in spans.items():
        values = {name: np.empty((N_SEGMENTS, N_STATES)) for name in ("p", "s", "churn", "spend")}
        for s in range(N_SEGMENTS):
            ones = np.ones(N_STATES)
            values["p"][s] = expm(killed_generator(shop, s, [PURCHASE]) * span) @ ones
            values["s"][s] = expm(killed_generator(shop, s, [SEARCH]) * span) @ ones
            values["churn"][s] = expm(killed_generator(shop, s, range(N_TYPES)) * span) @ ones
            augmented = np.zeros((N_STATES + 1, N_STATES + 1))
            augmented[:-1, :-1] = killed_generator(shop, s, [])
            augmented[:-1, -1] = shop.emits[s, :, PURCHASE] * shop.mean_amounts[s]
            values["spend"][s] = expm(augmented * span)[:-1, -1]
        means = {k: np.einsum("usk,sk->u", posterior, v) for k, v in values.items()}
        predictions[f"purchase_{horizon}d"] = 1 - means["p"]
        predictions[f"search_{horizon}d"] = 1 - means["s"]
        predictions[f"churn_{horizon}d"] = means["churn"]
        predictions[f"spend_{horizon}d"] = means["spend"]
    return predictions


def profile_prior(shop: Shop, users: pa.Table) -> Floats:
    """(U, S) share of each segment given age, gender and region; missing ones tell nothing."""
    weights = np.tile(SEGMENT_SHARES, (users.num_rows, 1))
    age = users["age"].to_numpy().astype(float)
    known = np.isfinite(age)
    # Ages are rounded and clipped to [16, 95]: the likelihood is of the interval.
    mean, sd = shop.ages[:, 0], shop.ages[:, 1]
    low = np.where(age[known] <= 16, -np.inf, age[known] - 0.5)[:, None]
    high = np.where(age[known] >= 95, np.inf, age[known] + 0.5)[:, None]
    weights[known] *= norm.cdf(high, mean, sd) - norm.cdf(low, mean, sd)
    for column, shares, values in (
        ("gender", shop.genders, GENDERS),
        ("region", shop.regions, REGIONS),
    ):
        index = _index(users[column], values)
        weights[index >= 0] *= shares[:, index[index >= 0]].T
    total: Floats = weights / weights.sum(-1, keepdims=True)
    return total


def _index(column: pa.ChunkedArray, values: Sequence[str]) -> Ints:
    found = pc.index_in(column, value_set=pa.array(values, pa.string()))
    index: Ints = pc.fill_null(found, _UNKNOWN).to_numpy().astype(np.int64)
    return index


def predict_oracle_table(
    params: SimulatorParams,
    *,
    events: pa.Table,
    users: pa.Table,
    cut: datetime,
    user_ids: Sequence[str],
    horizons_days: Sequence[int],
) -> dict[str, Floats]:
    """Predict for some users at one cut.

    Args:
        params: those that the shop was simulated with.
        events: in the schema of pipelines.events, any order; later ones than the cut are ignored.
        users: the simulator's users table (profiles and sign-up times are part of the model).
        cut: UTC time.
        user_ids: whom to predict, in the order of the result.
        horizons_days: window lengths.

    Returns:
        target name -> (len(user_ids),) predictions.

    Raises:
        UserError: a user is not in the users table.
    """
    shop = build_shop()
    wanted = pa.array(user_ids, pa.string())
    rows = pc.index_in(wanted, value_set=users["user_id"].combine_chunks())
    if rows.null_count:
        raise UserError("the oracle needs the simulator's users table; a user is not in it")
    profiles = users.take(rows)
    cut_days = (int(cut.timestamp()) * 1_000_000 - params.start_us) / DAY_US

    cut_scalar = pa.scalar(cut, pa.timestamp("us", tz="UTC"))
    known = events.filter(
        pc.and_(pc.less(events["ts"], cut_scalar), pc.is_in(events["user_id"], value_set=wanted))
    )
    user = pc.index_in(known["user_id"], value_set=wanted).to_numpy()
    micros = known["ts"].cast(pa.int64()).to_numpy() - params.start_us
    order = np.lexsort((micros, user))
    offsets = np.searchsorted(user[order], np.arange(len(user_ids) + 1))
    category = _index(known["category"], CATEGORIES)
    words = [*(w for c in CATEGORIES for w in WORDS[c]), *GENERIC_WORDS]
    word = _index(known["query"], words)
    of_word = np.array(
        [
            *np.repeat(range(N_CATEGORIES), len(WORDS[CATEGORIES[0]])),
            *[_UNKNOWN] * len(GENERIC_WORDS),
            _UNKNOWN,
        ]
    )
    category = np.where(category >= 0, category, of_word[word])

    signup = profiles["signup_ts"].cast(pa.int64()).to_numpy() - params.start_us
    begin = operational_time(np.maximum(signup, 0) / DAY_US)
    prior = profile_prior(shop, profiles)[:, :, None] * _states_at_begin(shop, signup)
    posterior = filter_states(
        shop,
        prior=prior,
        offsets=offsets,
        time=operational_time(micros[order] / DAY_US),
        type_=_index(known["event_type"], EVENT_TYPES)[order],
        category=category[order],
        item=_index(known["item_id"], item_names())[order],
        begin=begin,
        cut=np.full(len(user_ids), operational_time(np.array([cut_days]))[0]),
    )
    ends = operational_time(cut_days + np.array([0, *horizons_days], dtype=float))
    spans = {h: float(end - ends[0]) for h, end in zip(horizons_days, ends[1:], strict=True)}
    return predict_states(shop, posterior, spans)


def _states_at_begin(shop: Shop, signup: Ints) -> Floats:
    """(U, S, K) states when observation begins: at sign-up, or unseen since an earlier one."""
    propagate = _Propagator(np.stack([killed_generator(shop, s, []) for s in range(N_SEGMENTS)]))
    before = operational_time(np.zeros(len(signup))) - operational_time(
        np.minimum(signup, 0) / DAY_US
    )
    at_signup = np.broadcast_to(initial_states(), (N_SEGMENTS, len(signup), N_STATES)).astype(float)
    states: Floats = propagate(at_signup, before).transpose(1, 0, 2)
    return states
