"""Labels: what happened in the windows after a cut.

Whatever is learnt from before the test cuts closes by the first of them: what a later window of
an earlier cut holds is not told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ibis
from ibis import _

from pipelines.config import TargetsConfig
from pipelines.events import EVENT_CODES
from pipelines.features.cuts import Cut, Split
from pipelines.features.engine import AMOUNT_SCALE, DAY_US, stack_cuts


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


def build_labels(
    events: Any, population: Any, *, cuts: Sequence[Cut], targets: Sequence[Target]
) -> Any:
    """Return (cut, user, y_...) for everybody in the population; null where not known in time.

    Args:
        events: of ``pipelines.features.engine.prepare_events``.
        population: expression with the columns cut and user.
        cuts: when; numbered from 0 without holes.
        targets: what.
    """
    longest = max(t.horizon_days for t in targets)
    ahead = stack_cuts(
        events, [c.us for c in cuts], lambda us: (_.us >= us) & (_.us < us + longest * DAY_US)
    ).mutate(lead_us=_.us - _.cut_us)
    columns: dict[str, Any] = {}
    silent: dict[str, float] = {}
    for target in targets:
        name = f"y_{target.name}"
        inside = _.lead_us < target.horizon_days * DAY_US
        is_churn = target.kind is Kind.BINARY and target.event is None
        silent[name] = float(is_churn)
        if target.kind is Kind.AMOUNT:
            columns[name] = _.amount_units.sum(where=inside).cast("float64") / AMOUNT_SCALE
        elif target.event is None:
            columns[name] = 1 - inside.cast("int32").max()
        else:
            happens = inside & (_.code == EVENT_CODES[target.event])
            columns[name] = happens.cast("int32").max()
    seen = ahead.group_by("cut", "user").aggregate(**columns)
    rows = population.select("cut", "user").left_join(seen, ["cut", "user"])
    rows = rows.drop("cut_right", "user_right")
    told = {name: rows[name].cast("float64").fill_null(value) for name, value in silent.items()}
    for target in targets:
        late = _find_late(cuts, target.horizon_days)
        if late:
            name = f"y_{target.name}"
            told[name] = ibis.ifelse(rows.cut.isin(late), ibis.null("float64"), told[name])
    return rows.mutate(**told)


def _find_late(cuts: Sequence[Cut], horizon_days: int) -> list[int]:
    """Return the cuts before the test whose windows of a horizon close after it began."""
    begin = min(c.us for c in cuts if c.split is Split.TEST)
    return [
        c.index for c in cuts if c.split is not Split.TEST and c.us + horizon_days * DAY_US > begin
    ]
