"""The snapshot table that the features stage wrote, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import UserError
from pipelines.features.cuts import Split
from pipelines.features.labels import Kind, Target
from pipelines.io import read_json

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_BATCH_ROWS: Final = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SnapshotTable:
    """Rows are (cut, user) pairs, sorted by cut, then user.

    Attributes:
        user: (R,) user numbers.
        cut: (R,) cut numbers.
        features: (R, F), NaN = unknown.
        feature_names: F names.
        labels: target name -> (R,), NaN where the window closes after the first test cut.
        targets: what is predicted.
        omitted: {"name", "why"} of targets that were left out.
        splits: cut number -> split.
        cut_times: cut number -> ISO time.
    """

    user: NDArray[np.int32]
    cut: NDArray[np.int32]
    features: Floats
    feature_names: list[str]
    labels: dict[str, Floats]
    targets: tuple[Target, ...]
    omitted: list[dict[str, str]]
    splits: dict[int, Split]
    cut_times: dict[int, str]

    @classmethod
    def load(cls, folder: Path) -> SnapshotTable:
        """Read data/features.

        Raises:
            UserError: a file is missing or damaged.
        """
        schema = read_json(folder / "schema.json")
        cuts = read_json(folder / "cuts.json")["cuts"]
        path = folder / "snapshots.parquet"
        names = schema["features"]
        targets = tuple(
            Target(
                name=t["name"],
                kind=Kind(t["kind"]),
                event=t["event"],
                horizon_days=t["horizon_days"],
            )
            for t in schema["targets"]
        )
        try:
            table = pq.read_table(
                path, columns=["user", "cut", *(f"y_{target.name}" for target in targets)]
            )
            features = _read_features(path, names)
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: not readable; run the features stage ({error})") from None
        return cls(
            user=table["user"].to_numpy(),
            cut=table["cut"].to_numpy(),
            features=features,
            feature_names=names,
            labels={t.name: table[f"y_{t.name}"].to_numpy() for t in targets},
            targets=targets,
            omitted=schema["omitted"],
            splits={c["index"]: Split(c["split"]) for c in cuts},
            cut_times={c["index"]: c["ts"] for c in cuts},
        )

    def rows_of(self, *splits: Split) -> Mask:
        """(R,) rows of the cuts of some kinds."""
        wanted = [index for index, split in self.splits.items() if split in splits]
        rows: Mask = np.isin(self.cut, wanted)
        return rows

    def first_cut(self, split: Split) -> datetime:
        """Return when the first cut of a kind is."""
        return min(
            datetime.fromisoformat(self.cut_times[index])
            for index, found in self.splits.items()
            if found is split
        )

    def closed_rows(self, horizon_days: int, split: Split) -> Mask:
        """(R,) rows whose windows of a horizon close by the first cut of a kind."""
        times = {index: datetime.fromisoformat(ts) for index, ts in self.cut_times.items()}
        close = self.first_cut(split)
        horizon = timedelta(days=horizon_days)
        rows: Mask = np.isin(self.cut, [i for i, ts in times.items() if ts + horizon <= close])
        return rows

    def predictions_table(self, predictions: dict[str, Any]) -> pa.Table:
        """Make the table of a predictions file.

        Args:
            predictions: target name -> values for the calibration and test rows, in order.
        """
        rows = self.rows_of(Split.CALIBRATION, Split.TEST)
        return pa.table(
            {
                "user": self.user[rows],
                "cut": self.cut[rows],
                **{n: np.asarray(v, dtype=np.float32) for n, v in predictions.items()},
            }
        )


def _read_features(path: Path, names: list[str]) -> Floats:
    """Return (R, F), read in parts: columns beside rows would take the memory twice."""
    with pq.ParquetFile(path) as file:
        features = np.empty((file.metadata.num_rows, len(names)))
        low = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=names):
            columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in names]
            np.stack(columns, axis=1, out=features[low : low + len(batch)])
            low += len(batch)
    return features
