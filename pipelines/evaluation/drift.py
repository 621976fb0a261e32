"""Have the inputs changed since the model learned from them? Population stability index.

PSI = sum over bins of (p - q) log(p / q), the symmetric Kullback-Leibler divergence (Jeffreys
1946) of a feature's shares in ten bins; above .25 credit scoring calls it a major shift (Siddiqi
2006, "Credit risk scorecards").
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from pipelines.evaluation.metrics import Floats, clean
from pipelines.features.cuts import Split
from pipelines.features.snapshot_table import SnapshotTable

MAJOR: Final = 0.25
_BINS: Final = 10
_TOLD: Final = 10
_FLOOR: Final = 1e-4


def measure_drift(table: SnapshotTable) -> dict[str, Any]:
    """Compare the snapshot features of the test cuts with those of the cuts learnt from.

    Returns:
        The block ``drift`` of reports/evaluation.json: the share of features with a major shift,
        and the most shifted ones.
    """
    before = table.features[table.rows_of(Split.TRAIN, Split.BETWEEN)]
    after = table.features[table.rows_of(Split.TEST)]
    values = np.array([stability_index(before[:, i], after[:, i]) for i in range(before.shape[1])])
    worst = np.argsort(-values, kind="stable")[:_TOLD]
    return {
        "features": len(values),
        "major": MAJOR,
        "share": clean((values > MAJOR).mean()) if len(values) else 0.0,
        "worst": [{"feature": table.feature_names[i], "psi": clean(values[i])} for i in worst],
    }


def stability_index(before: Floats, after: Floats) -> float:
    """Return the PSI of two samples; bins are tenths of the first, unknown is one more."""
    known = before[np.isfinite(before)]
    tenths = np.linspace(0, 1, _BINS + 1)[1:-1]
    edges: Floats = np.unique(np.quantile(known, tenths)) if len(known) else known
    p, q = (_shares(sample, edges) for sample in (before, after))
    return float(((p - q) * np.log(p / q)).sum())


def _shares(sample: Floats, edges: Floats) -> Floats:
    known = np.isfinite(sample)
    # Values at an edge go below it: a count of zero is the lowest bin, not the one above.
    places = np.where(known, np.searchsorted(edges, sample, side="left"), len(edges) + 1)
    counts = np.bincount(places, minlength=len(edges) + 2).astype(np.float64)
    shares: Floats = np.maximum(counts / max(len(sample), 1), _FLOOR)
    return shares
