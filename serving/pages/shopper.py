"""What the page of one shopper shows: predictions, what moved them, and the events."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipelines.config import Which
from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES, from_us, to_us
from pipelines.features.store import Sequences
from pipelines.io import digest_directory
from pipelines.model.explanation import explain
from pipelines.model.heads import Target
from pipelines.model.predictor import Predictor
from pipelines.model.timeline import Timeline, feature_names
from pipelines.scoring import FEATURES, find_model

EVENTS: Final = Path("data/valid")

# A page holds so many events, reasons in either direction, and points of the integral.
SHOWN: Final = 50
REASONS: Final = 6
_STEPS: Final = 16

# What the day partitions hold of an event and the sequences do not.
_TEXTS: Final = ("item_id", "category", "brand", "quantity", "query")

_PLURAL: Final = {
    "view": "views",
    "search": "searches",
    "add_to_cart": "additions to the cart",
    "remove_from_cart": "removals from the cart",
    "wishlist": "additions to the wish list",
    "purchase": "purchases",
    "refund": "refunds",
    "review": "reviews",
    "session": "visits",
    "spend": "money spent",
    "event": "events",
    "active_day": "days with a visit",
    "purchase_day": "days with a purchase",
    "new_item": "items that were new",
    "new_category": "categories that were new",
}
_WORDS: Final = {
    "tenure": "time since first seen",
    "mean_purchase": "money spent at a purchase",
    "mean_price": "prices of what was looked at",
    "top_item": "coming back to one item",
    "top_category": "keeping to one category",
    "age": "age",
    "gender": "gender",
    "region": "region",
}


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Something that moved the prediction.

    Attributes:
        text: for people.
        effect: what it adds to the log odds.
        ts: when it happened, where it is an event.
    """

    text: str
    effect: float
    ts: datetime | None = None


@dataclass(frozen=True, kw_only=True)
class Story:
    """One shopper.

    Attributes:
        events: what happened, the newest first; ``effect`` is None where none was computed.
        hidden: older events that are not shown.
        moved: events that were explained, the strongest first.
        curves: event name -> (days, probability) pairs.
        explained: the target that the reasons are about; None where there is none.
        reasons: counts, recencies, rhythm and the like, the strongest first.
        gap: by how much the parts of the explanation miss its whole, log odds.
    """

    events: list[dict[str, Any]]
    hidden: int
    moved: list[Reason]
    curves: dict[str, list[tuple[float, float]]]
    explained: Target | None
    reasons: list[Reason]
    gap: float


class Storyteller:
    """Reads shoppers' histories and asks the model that scored them about its reasons."""

    def __init__(self, root: Path, plan: dict[str, Any]) -> None:
        """Load the model.

        Raises:
            UserError: the model that scored is not there any more.
        """
        _, folder = find_model(root, Which(plan["role"]))
        if digest_directory(folder) != plan["model"]:
            raise UserError("another model serves by now than the one that scored")
        self._root = root
        self._plan = plan
        self._predictor = Predictor.load(folder)
        self._sequences = Sequences.load(root / FEATURES / "sequences")
        # Gradients of one model at a time: two requests would share its parameters' buffers.
        self._lock = threading.Lock()

    def tell(self, row: dict[str, Any], target: str | None) -> Story:
        """Tell about one shopper.

        Args:
            row: of data/scores.
            target: name of the binary target to explain; others and None: the first one.

        Raises:
            UserError: the events are not those that were scored.
        """
        user = row["user"]
        if user >= self._sequences.users:
            raise UserError("data/features has changed since these scores were made")
        timeline = Timeline(self._sequences.slice(user, user + 1))
        at = to_us(datetime.fromisoformat(self._plan["at"]))
        cuts = timeline.cuts(np.zeros(1, dtype=np.int64), np.array([at]))
        count = int(cuts.position[0])
        if count != row["events"] or timeline.ts[count - 1] != to_us(row["last_event_ts"]):
            raise UserError("data/features has changed since these scores were made")
        binary = [t for t in self._predictor.targets if t.kind == "binary"]
        chosen = next((t for t in binary if t.name == target), binary[0] if binary else None)
        effects = np.full(count, np.nan)
        reasons: list[Reason] = []
        gap = 0.0
        with self._lock:
            if chosen is not None:
                found = explain(self._predictor, timeline, cuts, chosen, steps=_STEPS)
                # Of churn, the explanation is about that something happens.
                sign = -1.0 if chosen.event is None else 1.0
                effects[found.event] = sign * found.effect
                reasons = _describe(sign * found.feature_effect[0])
                gap = float(found.gap[0])
            curves = self._draw(timeline, cuts)
        events = self._read_events(row, count, timeline)
        for event, effect in zip(events, effects, strict=True):
            event["effect"] = None if np.isnan(effect) else float(effect)
        moved = [
            Reason(text=name_event(e), effect=e["effect"], ts=e["ts"])
            for e in events
            if e["effect"] is not None
        ]
        events.reverse()
        return Story(
            events=events[:SHOWN],
            hidden=max(0, count - SHOWN),
            moved=sorted(moved, key=lambda reason: -abs(reason.effect)),
            curves=curves,
            explained=chosen,
            reasons=reasons,
            gap=gap,
        )

    def _draw(self, timeline: Timeline, cuts: Any) -> dict[str, list[tuple[float, float]]]:
        """Read the probability of every event by every day of the model's grid."""
        heads, calibration = self._predictor.spec.heads, self._predictor.spec.calibration
        raw = self._predictor.raw(timeline, cuts)
        (corrected,) = calibration.probability(heads.events, 1.0 - raw.survival)
        days = [0.0, *map(float, heads.grid)]
        return {
            name: list(zip(days, [0.0, *curve.tolist()], strict=True))
            for name, curve in zip(heads.events, corrected, strict=True)
        }

    def _read_events(
        self, row: dict[str, Any], count: int, timeline: Timeline
    ) -> list[dict[str, Any]]:
        """Return the events in the order of the sequences, with their texts where they are known.

        Sequences hold hashes; the texts stand in the day partitions.
        """
        sequences = timeline.sequences
        texts = dict.fromkeys(_TEXTS)
        plain = [
            texts
            | {
                "ts": from_us(int(sequences.ts[i])),
                "event_type": EVENT_TYPES[int(sequences.type[i]) - 1],
                "price": None if np.isnan(sequences.price[i]) else float(sequences.price[i]),
            }
            for i in range(count)
        ]
        folder = self._root / EVENTS
        if not folder.is_dir():
            return plain
        dataset = ds.dataset(folder, format="parquet", exclude_invalid_files=True)
        at = datetime.fromisoformat(self._plan["at"])
        wanted = (pc.field("user_id") == row["user_id"]) & (pc.field("ts") < at)
        columns = ["ts", "event_id", "event_type", "price", *_TEXTS]
        table = dataset.to_table(columns=columns, filter=wanted)
        found = table.sort_by([("ts", "ascending"), ("event_id", "ascending")]).to_pylist()
        same = [e["ts"] for e in found] == [e["ts"] for e in plain]
        return found if same else plain


def name_event(event: dict[str, Any]) -> str:
    """Say in words what happened."""
    words = [event["event_type"].replace("_", " ")]
    if event.get("query"):
        words.append(f"“{event['query']}”")
    return " ".join([*words, event.get("item_id") or ""]).strip()


def _describe(effects: Any) -> list[Reason]:
    """Put the strongest features into words."""
    if len(effects) == 0:
        return []
    names = feature_names()
    totals: dict[str, float] = {}
    for name, effect in zip(names, effects.tolist(), strict=True):
        text = describe_feature(name)
        totals[text] = totals.get(text, 0.0) + effect
    ranked = sorted(totals.items(), key=lambda pair: -abs(pair[1]))
    return [Reason(text=text, effect=effect) for text, effect in ranked[: 2 * REASONS]]


def describe_feature(feature: str) -> str:
    """Name the group of a feature: windows of one kind move together and are told together."""
    if feature in _WORDS:
        return _WORDS[feature]
    if feature.startswith("focus_"):
        return "interest in the category seen last"
    if feature.startswith("gap_"):
        return f"rhythm of {_PLURAL[feature.split('_', 2)[2]]}"
    if feature.startswith("after_purchase_"):
        return f"{_PLURAL[feature.removeprefix('after_purchase_')]} since the last purchase"
    if feature.startswith("since_"):
        return f"time without {_PLURAL[feature.removeprefix('since_')]}"
    kind, _, window = feature.rpartition("_")
    if window == "ever":
        return f"{_PLURAL[kind]} in all"
    days = float(window.removesuffix("d"))
    return f"{_PLURAL[kind]} in the last {'days' if days <= 7 else 'months'}"
