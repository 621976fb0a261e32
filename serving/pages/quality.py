"""What the page of the model shows: lineage, checks, and the comparison with the baselines."""

from __future__ import annotations

import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipelines.errors import UserError
from pipelines.evaluation.rivals import CANDIDATE
from pipelines.evaluation.summary import order_models
from pipelines.io import read_json
from pipelines.registry.champion import read_champion
from pipelines.registry.history import Reign, list_champions
from pipelines.registry.verdict import find_verdict

REPORTS: Final = Path("reports")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What is known of the models.

    Attributes:
        champion: digest, version and verdict of the champion; None in all while there is none.
        evaluation: content of reports/evaluation.json, or None.
        verdict: content of reports/verdict.json, or None.
        history: champions, the newest first.
        trouble: why the history could not be read, or None.
        row: the name under which the champion stands in the evaluation, or None.
    """

    champion: Any
    evaluation: dict[str, Any] | None
    verdict: dict[str, Any] | None
    history: list[Reign]
    trouble: str | None
    row: str | None

    @property
    def models(self) -> list[str]:
        """Names of all models that were compared, best known first."""
        targets = (self.evaluation or {"targets": {}})["targets"].values()
        return order_models({model for target in targets for model in target["models"]})


def read_quality(root: Path) -> Quality:
    """Read what there is; what is missing is None.

    Raises:
        UserError: champion.json is damaged.
    """
    champion = read_champion(root)
    evaluation = _read(root / REPORTS / "evaluation.json")
    verdict = find_verdict(root)
    history: list[Reign] = []
    trouble = None
    try:
        history = list_champions(root)
    except Exception as error:  # whatever ails the registry, the page has more to show
        _log.warning("the registry cannot be read: %s", error)
        trouble = f"the registry cannot be read ({type(error).__name__})"
    return Quality(
        champion=champion,
        evaluation=evaluation,
        verdict=verdict,
        history=history,
        trouble=trouble,
        row=find_row(champion.digest, verdict) if evaluation else None,
    )


def find_row(model: str | None, verdict: dict[str, Any] | None) -> str | None:
    """Return the name under which a model stands in the evaluation.

    Args:
        model: digest of its files; None = no model.
        verdict: content of reports/verdict.json, which says whom the evaluation is about.

    Returns:
        None where the evaluation is about others.
    """
    if model is None or verdict is None:
        return None
    if verdict.get("candidate") == model:
        return CANDIDATE
    return "champion" if verdict.get("champion") == model else None


def read_curve(root: Path, curve: str, target: str) -> dict[str, list[dict[str, float]]]:
    """Return the rows of reports/plots/CURVE.csv about a target, by model; none without a file."""
    path = root / REPORTS / "plots" / f"{curve}.csv"
    found: dict[str, list[dict[str, float]]] = {}
    if not path.is_file():
        return found
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row.pop("target") == target:
                model = row.pop("model")
                found.setdefault(model, []).append({k: float(v) for k, v in row.items()})
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = read_json(path)
    except UserError as error:
        if path.exists():
            _log.warning("%s", error)
        return None
    return content if isinstance(content, dict) else None
