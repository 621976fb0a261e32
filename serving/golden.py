"""Golden predictions: a packaged model has to reproduce what it said before it was packaged.

`python -m serving.golden`, run in a Bento's source folder, loads the model that lies there with
the code that lies there, predicts the histories in golden.json and compares.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from pipelines.errors import UserError
from pipelines.features.store import Sequences
from pipelines.io import digest_directory, read_json

if TYPE_CHECKING:
    from pipelines.model.predictor import Predictor

GOLDEN_FILE: Final = Path("golden.json")
MODEL: Final = Path("model")

# Absolute for probabilities, relative for amounts above one.
TOLERANCE: Final = 1e-5


def decode_sequences(columns: dict[str, dict[str, Any]]) -> Sequences:
    """Build sequences from their JSON form.

    Args:
        columns: for every column of ``Sequences`` its ``dtype`` and ``values``; NaN is null.
    """
    return Sequences(
        **{
            name: np.array(
                [np.nan if v is None else v for v in column["values"]], dtype=column["dtype"]
            )
            for name, column in columns.items()
        }
    )


def locate_golden(model: Path) -> Path:
    """Return where the golden predictions of a model's folder lie, if there are any.

    In a Bento it is golden.json beside the folder; where many models lie side by side each has a
    file of its own.
    """
    own = model.with_name(f"{model.name}.{GOLDEN_FILE}")
    return own if own.is_file() else model.parent / GOLDEN_FILE


def find_difference(folder: Path) -> str | None:
    """Compare a model's predictions with the golden ones.

    Args:
        folder: holds ``model/`` and ``golden.json``.

    Returns:
        What differs, or None.
    """
    from pipelines.model.predictor import Predictor

    golden = read_json(folder / GOLDEN_FILE)
    predictor = Predictor.load(folder / MODEL)
    return compare_predictions(predictor, golden, digest_directory(folder / MODEL))


def compare_predictions(predictor: Predictor, golden: dict[str, Any], digest: str) -> str | None:
    """Compare a model's predictions with golden ones.

    Args:
        predictor: the model.
        golden: content of golden.json.
        digest: of the model's files.

    Returns:
        What differs, or None.
    """
    if digest != golden["model"]:
        return "not the model that the golden predictions come from"
    sequences = decode_sequences(golden["sequences"])
    now = np.full(sequences.users, golden["now_us"], dtype=np.int64)
    predicted = predictor.predict(sequences, now)
    if set(predicted) != set(golden["expected"]):
        return f"predicts {sorted(predicted)} instead of {sorted(golden['expected'])}"
    for name, values in sorted(golden["expected"].items()):
        expected = np.array(values)
        error = np.abs(predicted[name] - expected) / np.maximum(np.abs(expected), 1.0)
        # Negated, so that NaN fails.
        if not np.all(error <= TOLERANCE):
            return f"{name} differs by up to {np.max(error):.2g}; {TOLERANCE:g} is allowed"
    return None


def main() -> int:
    """Check the current folder; print what differs."""
    try:
        problem = find_difference(Path())
    except UserError as error:
        problem = str(error)
    if problem is not None:
        print(problem, file=sys.stderr)
    return int(problem is not None)


if __name__ == "__main__":
    sys.exit(main())
