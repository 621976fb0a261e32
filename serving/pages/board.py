"""What the overview shows: everyone's scores, cut by segment and by the share that is reached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.io import read_json
from pipelines.model.heads import Target
from pipelines.scoring import DESCRIPTION, SCORES, guard_table

Doubles = NDArray[np.float64]

# The slider's steps: shares of the shoppers in percent.
STEPS: Final = 100
BINS: Final = 20
_ROUND: Final = tuple(number / 10**digits for digits in range(5) for number in (1, 0.5, 0.2))

LIGHT_EVENTS: Final = 5
NEW_DAYS: Final = 28
_AGES: Final = (25, 35, 50, 65)
_UNKNOWN: Final = "unknown"

# More regions than this make no readable table; the rest is one row.
_MAX_ROWS: Final = 12


@dataclass(frozen=True, kw_only=True)
class Reach:
    """What is to be expected when the shoppers with the highest scores are contacted.

    Attributes:
        contacted: int64 (STEPS + 1,), shoppers in the top k percent.
        hits: float64 (STEPS + 1,), those of them who are expected to do it.
        lowest: float64 (STEPS + 1,), the last one's score.
    """

    contacted: NDArray[np.int64]
    hits: Doubles
    lowest: Doubles

    def profit(self, *, cost: float, margin: float) -> Doubles:
        """Return margin x expected hits - cost x contacts for every step, (STEPS + 1,)."""
        return margin * self.hits - cost * self.contacted


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Shoppers with something in common.

    Attributes:
        name: for people.
        shoppers: how many.
        expected: target name -> sum over the shoppers.
    """

    name: str
    shoppers: int
    expected: dict[str, float]


class Board:
    """The content of data/scores, or the part of it that is asked for."""

    def __init__(self, table: pa.Table, plan: dict[str, Any]) -> None:
        self.table = table
        self.plan = plan
        self.targets = [Target(**target) for target in plan["targets"]]
        self.at = datetime.fromisoformat(plan["at"])

    @classmethod
    def load(cls, root: Path) -> Board:
        """Read data/scores.

        Raises:
            UserError: nothing has been scored.
        """
        plan = read_json(root / SCORES / DESCRIPTION)
        return cls(pq.read_table(root / SCORES), plan)

    @cached_property
    def active(self) -> Board:
        """The shoppers whom the model was calibrated on: those seen lately."""
        return Board(self.table.filter(self.table["active"]), self.plan)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def horizons(self) -> list[int]:
        """Days, ascending."""
        return sorted({target.horizon_days for target in self.targets})

    def targets_at(self, days: int) -> list[Target]:
        """Return the targets of a horizon, in the model's order."""
        return [target for target in self.targets if target.horizon_days == days]

    def values(self, name: str) -> Doubles:
        """Return everyone's score of a target, (N,)."""
        return np.asarray(self.table[name].to_numpy(), dtype=np.float64)

    def order(self, name: str) -> NDArray[np.int64]:
        """Return rows by score, the highest first; among equals by the row."""
        return np.argsort(-self.values(name), kind="stable")

    def reach(self, name: str) -> Reach:
        """Return what reaching the top 0, 1, ... 100 percent brings."""
        ranked = self.values(name)[self.order(name)]
        contacted = np.round(np.arange(STEPS + 1) * len(ranked) / STEPS).astype(np.int64)
        total = np.concatenate([[0.0], np.cumsum(ranked)])
        lowest = np.concatenate([[1.0], ranked])[contacted]
        return Reach(contacted=contacted, hits=total[contacted], lowest=lowest)

    def histogram(self, name: str) -> tuple[NDArray[np.int64], float]:
        """Count shoppers in BINS equal parts of what lies between 0 and a round score.

        Returns:
            int64 (BINS,), and the round score, which nobody is above.
        """
        values = self.values(name)
        highest = values.max(initial=0.0)
        end = min((score for score in _ROUND if score >= highest), default=1.0)
        return np.histogram(values, bins=BINS, range=(0.0, end))[0], end

    def segments(self, by: str) -> list[Segment]:
        """Sum every target over the segments of a kind (a key of SEGMENTS), the largest first."""
        labels = pa.array(SEGMENTS[by](self)).dictionary_encode()
        codes = labels.indices.to_numpy(zero_copy_only=False)
        count = len(labels.dictionary)
        shoppers = np.bincount(codes, minlength=count)
        sums = {t.name: np.bincount(codes, self.values(t.name), count) for t in self.targets}
        found = [
            Segment(
                name=str(name),
                shoppers=int(shoppers[i]),
                expected={target: float(values[i]) for target, values in sums.items()},
            )
            for i, name in enumerate(labels.dictionary.to_pylist())
        ]
        if by != "region":
            return sorted(found, key=lambda segment: segment.name)
        found.sort(key=lambda segment: -segment.shoppers)
        return [*found[:_MAX_ROWS], *_merge(found[_MAX_ROWS:])]

    def find(self, user_id: str) -> dict[str, Any] | None:
        """Return a shopper's row."""
        rows = self.table.filter(pc.equal(self.table["user_id"], pa.scalar(user_id, pa.string())))
        return rows.slice(0, 1).to_pylist()[0] if rows.num_rows else None

    def search(self, text: str, *, limit: int) -> list[dict[str, Any]]:
        """Return shoppers whose id holds a text, in any case."""
        matches = pc.match_substring(self.table["user_id"], text, ignore_case=True)
        rows: list[dict[str, Any]] = self.table.filter(matches).slice(0, limit).to_pylist()
        return rows

    def audience(self, name: str, share: int) -> Iterator[bytes]:
        """Return the top shoppers as CSV, in pieces."""
        chosen = self.order(name)[: int(self.reach(name).contacted[share])]
        columns = ["user_id", *(t.name for t in self.targets), "last_event_ts", "region"]
        rows = self.table.select(columns).take(pa.array(chosen))
        sink = pa.BufferOutputStream()
        pacsv.write_csv(guard_table(rows), sink)
        content = memoryview(sink.getvalue())
        for low in range(0, len(content), 1 << 16):
            yield bytes(content[low : low + (1 << 16)])


def _merge(rest: Sequence[Segment]) -> list[Segment]:
    if not rest:
        return []
    names = rest[0].expected
    return [
        Segment(
            name=f"{len(rest)} others",
            shoppers=sum(segment.shoppers for segment in rest),
            expected={name: sum(s.expected[name] for s in rest) for name in names},
        )
    ]


def _by_region(board: Board) -> list[str]:
    return [region or _UNKNOWN for region in board.table["region"].to_pylist()]


def _by_age(board: Board) -> list[str]:
    lows = (0, *_AGES)
    names = [f"{low} to {high - 1}" for low, high in pairwise(lows)]
    names += [f"{lows[-1]} and over", _UNKNOWN]
    age = board.table["age"].to_numpy().astype(np.float64)
    band = np.where(np.isnan(age), len(names) - 1, np.searchsorted(_AGES, age, side="right"))
    return [names[i] for i in band]


def _by_history(board: Board) -> list[str]:
    first = board.table["first_event_ts"]
    new = pc.greater_equal(first, pa.scalar(board.at - timedelta(days=NEW_DAYS), first.type))
    light = pc.less(board.table["events"], LIGHT_EVENTS)
    names = np.select(
        [np.asarray(new), np.asarray(light)],
        [f"new (first seen in {NEW_DAYS} days)", f"light (under {LIGHT_EVENTS} events)"],
        "regular",
    )
    return [str(name) for name in names]


SEGMENTS: Final = {"region": _by_region, "age": _by_age, "history": _by_history}
