"""Labels: what happened in the windows after a cut."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ibis import _

from pipelines.config import TargetsConfig
from pipelines.features.cuts import Cut
from pipelines.features.engine import DAY_US


class Kind(StrEnum):
    """How a target is measured."""

    BINARY = "binary"
    AMOUNT = "amount"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Something to predict.

    Attributes:
        name: e.g. purchase_14d.
        kind: binary or amount.
        event: the event type whose occurrence is predicted; None for churn and spend.
        horizon_days: length of the window.
    """

    name: str
    kind: Kind
    event: str | None
    horizon_days: int


def list_targets(config: TargetsConfig) -> tuple[Target, ...]:
    """Return all targets asked for: events, churn and spend, each at every horizon."""
    targets: list[tuple[str, Kind, str | None, int]] = []
    for horizon in config.horizons_days:
        targets += [(str(e), Kind.BINARY, str(e), horizon) for e in config.events]
        if config.churn:
            targets.append(("churn", Kind.BINARY, None, horizon))
        if config.spend:
            targets.append(("spend", Kind.AMOUNT, None, horizon))
    return tuple(
        Target(name=f"{name}_{horizon}d", kind=kind, event=event, horizon_days=horizon)
        for name, kind, event, horizon in targets
    )


def build_labels(events: Any, population: Any, *, cut: Cut, targets: tuple[Target, ...]) -> Any:
    """Return (user, y_...) for everybody in the population at a cut.

    Args:
        events: of ``pipelines.features.engine.prepare_events``.
        population: expression with a column user.
        cut: when.
        targets: what.
    """
    longest = max(t.horizon_days for t in targets)
    ahead = events.filter((_.us >= cut.us) & (_.us < cut.us + longest * DAY_US))
    columns: dict[str, Any] = {}
    for target in targets:
        inside = _.us < cut.us + target.horizon_days * DAY_US
        if target.kind is Kind.AMOUNT:
            columns[f"y_{target.name}"] = _.cents.sum(where=inside) / 100.0
        elif target.event is None:
            columns[f"y_{target.name}"] = 1 - inside.cast("int32").max()
        else:
            columns[f"y_{target.name}"] = (
                (inside & (_.event_type == target.event)).cast("int32").max()
            )
    silent = {
        f"y_{t.name}": 1.0 if t.kind is Kind.BINARY and t.event is None else 0.0 for t in targets
    }
    seen = ahead.group_by("user").aggregate(**columns)
    rows = population.select("user").left_join(seen, "user").drop("user_right")
    return rows.mutate(
        **{name: rows[name].cast("float64").fill_null(value) for name, value in silent.items()}
    )
