from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from sklearn.metrics import roc_auc_score

from pipelines.errors import UserError
from pipelines.sources.oracle import filter_states, predict_oracle_table, predict_states
from pipelines.sources.shop import (
    GONE,
    N_SEGMENTS,
    N_STATES,
    N_TYPES,
    PURCHASE,
    SEARCH,
    SEGMENT_SHARES,
    build_shop,
)
from pipelines.sources.simulator import (
    SimulatedShop,
    SimulatorParams,
    draw_paths,
    initial_states,
    simulate,
)

PARAMS = SimulatorParams(users=5000, days=110, seed=11)
CUT = datetime(2025, 1, 1, tzinfo=UTC) + timedelta(days=80)
HORIZONS = (7, 14, 28)


@pytest.fixture(scope="module")
def simulated() -> SimulatedShop:
    return simulate(PARAMS)


@pytest.fixture(scope="module")
def users(simulated: SimulatedShop) -> list[str]:
    seen = simulated.events.filter(pc.less(simulated.events["ts"], pa.scalar(CUT)))
    return sorted(pc.unique(seen["user_id"]).to_pylist())


@pytest.fixture(scope="module")
def predicted(simulated: SimulatedShop, users: list[str]) -> dict[str, np.ndarray]:
    return predict_oracle_table(
        PARAMS,
        events=simulated.events,
        users=simulated.users,
        cut=CUT,
        user_ids=users,
        horizons_days=HORIZONS,
    )


def outcomes(simulated: SimulatedShop, users: list[str], days: int) -> dict[str, np.ndarray]:
    ts = simulated.events["ts"]
    ahead = simulated.events.filter(
        pc.and_(
            pc.greater_equal(ts, pa.scalar(CUT)),
            pc.less(ts, pa.scalar(CUT + timedelta(days=days))),
        )
    )

    def happened(table: pa.Table) -> np.ndarray:
        return pc.is_in(pa.array(users), value_set=table["user_id"]).to_numpy(zero_copy_only=False)

    bought = ahead.filter(pc.equal(ahead["event_type"], "purchase"))
    spend = np.zeros(len(users))
    index = pc.index_in(bought["user_id"], value_set=pa.array(users)).to_numpy()
    amount = pc.multiply(bought["price"], bought["quantity"]).to_numpy()
    known = ~np.isnan(index.astype(float))
    np.add.at(spend, index[known].astype(int), amount[known])
    return {
        "purchase": happened(bought),
        "search": happened(ahead.filter(pc.equal(ahead["event_type"], "search"))),
        "churn": ~happened(ahead),
        "spend": spend,
    }


@pytest.mark.parametrize("days", HORIZONS)
@pytest.mark.parametrize("target", ["purchase", "search", "churn"])
def test_it_is_calibrated(
    simulated: SimulatedShop,
    users: list[str],
    predicted: dict[str, np.ndarray],
    target: str,
    days: int,
) -> None:
    p = predicted[f"{target}_{days}d"]
    y = outcomes(simulated, users, days)[target]
    assert ((p >= 0) & (p <= 1)).all()
    # In each decile of the prediction the count of outcomes is a sum of independent draws.
    for part in np.array_split(np.argsort(p), 10):
        sd = np.sqrt((p[part] * (1 - p[part])).sum())
        assert abs(y[part].sum() - p[part].sum()) < 4 * sd + 1e-9


def test_expected_spend_matches_total_spend(
    simulated: SimulatedShop, users: list[str], predicted: dict[str, np.ndarray]
) -> None:
    y = outcomes(simulated, users, 28)["spend"]
    error = y.std() * np.sqrt(len(users))
    assert abs(predicted["spend_28d"].sum() - y.sum()) < 4 * error


def test_it_tells_buyers_from_others(
    simulated: SimulatedShop, users: list[str], predicted: dict[str, np.ndarray]
) -> None:
    truth = outcomes(simulated, users, 14)
    assert roc_auc_score(truth["purchase"], predicted["purchase_14d"]) > 0.75
    assert roc_auc_score(truth["search"], predicted["search_14d"]) > 0.70


def test_probabilities_grow_with_the_horizon(predicted: dict[str, np.ndarray]) -> None:
    for target in ("purchase", "search", "spend"):
        assert (predicted[f"{target}_7d"] <= predicted[f"{target}_14d"] + 1e-12).all()
        assert (predicted[f"{target}_14d"] <= predicted[f"{target}_28d"] + 1e-12).all()


def test_later_events_change_nothing(
    simulated: SimulatedShop, users: list[str], predicted: dict[str, np.ndarray]
) -> None:
    past = simulated.events.filter(pc.less(simulated.events["ts"], pa.scalar(CUT)))
    shuffled = past.take(np.random.default_rng(0).permutation(past.num_rows))
    again = predict_oracle_table(
        PARAMS,
        events=shuffled,
        users=simulated.users,
        cut=CUT,
        user_ids=users,
        horizons_days=HORIZONS,
    )
    for name, values in predicted.items():
        np.testing.assert_allclose(again[name], values, atol=1e-12)


def test_it_equals_a_brute_force_simulation_of_the_future() -> None:
    """Filter a few histories, draw many futures from the posterior, count."""
    shop = build_shop()
    random = np.random.default_rng(5)
    n, span, draws = 6, 12.0, 40_000
    segment = random.choice(N_SEGMENTS, n)
    start = random.choice(N_STATES, n, p=initial_states())
    cut = 60.0
    past = draw_paths(
        shop,
        segment=segment,
        state=start,
        begin=np.zeros(n),
        end=np.full(n, cut),
        random=random,
    )
    prior = np.tile(SEGMENT_SHARES[:, None] * initial_states(), (n, 1, 1))
    unknown = np.full(len(past.time), -1)
    posterior = filter_states(
        shop,
        prior=prior,
        offsets=np.searchsorted(past.shopper, np.arange(n + 1)),
        time=past.time,
        type_=past.type,
        category=unknown,
        item=unknown,
        begin=np.zeros(n),
        cut=np.full(n, cut),
    )
    np.testing.assert_allclose(posterior.sum((1, 2)), 1)
    closed = predict_states(shop, posterior, {1: span})
    for user in range(n):
        flat = random.choice(N_SEGMENTS * N_STATES, draws, p=posterior[user].ravel())
        of, state = np.divmod(flat, N_STATES)
        future = draw_paths(
            shop,
            segment=of,
            state=state,
            begin=np.zeros(draws),
            end=np.full(draws, span),
            random=random,
        )
        bought = future.type == PURCHASE
        counted = {
            "purchase_1d": np.bincount(future.shopper[bought], minlength=draws) > 0,
            "search_1d": np.bincount(future.shopper[future.type == SEARCH], minlength=draws) > 0,
            "churn_1d": np.bincount(future.shopper, minlength=draws) == 0,
            "spend_1d": np.bincount(
                future.shopper[bought],
                weights=shop.mean_amounts[of[future.shopper[bought]], future.state[bought]],
                minlength=draws,
            ),
        }
        for name, values in counted.items():
            error = values.std() / np.sqrt(draws)
            assert abs(values.mean() - closed[name][user]) < 4.5 * error + 1e-6, name


def test_the_dead_stay_silent() -> None:
    shop = build_shop()
    posterior = np.zeros((1, N_SEGMENTS, N_STATES))
    posterior[0, 0, GONE] = 1
    closed = predict_states(shop, posterior, {14: 14.0})
    assert closed["purchase_14d"][0] == pytest.approx(0, abs=1e-12)
    assert closed["churn_14d"][0] == pytest.approx(1)
    assert shop.emits.shape == (N_SEGMENTS, N_STATES, N_TYPES)


def test_an_unknown_user_is_named_as_a_mistake(simulated: SimulatedShop) -> None:
    with pytest.raises(UserError, match="users table"):
        predict_oracle_table(
            PARAMS,
            events=simulated.events,
            users=simulated.users,
            cut=CUT,
            user_ids=["nobody"],
            horizons_days=[7],
        )
