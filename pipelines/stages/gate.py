"""Stage gate: evaluation, validation, package and champion -> reports/verdict.json."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import Params
from pipelines.io import digest_directory, read_json, write_json
from pipelines.registry.champion import read_champion
from pipelines.registry.gate import decide

REPORTS = Path("reports")
MODEL = Path("models/gpt")
FEATURES = Path("data/features")


def run(params: Params, root: Path = Path()) -> str:
    """Decide about the candidate and write the verdict.

    Args:
        params: the ``gate`` section is read.
        root: the project's folder.

    Raises:
        UserError: a report, the model or champion.json is missing or damaged.
    """
    path = root / REPORTS / "verdict.json"
    verdict = decide(
        read_json(root / REPORTS / "evaluation.json"),
        read_json(root / REPORTS / "validation.json"),
        read_json(root / REPORTS / "package.json"),
        params.gate,
        candidate=digest_directory(root / MODEL),
        champion=read_champion(root).digest,
        data=digest_directory(root / FEATURES),
    )
    write_json(path, verdict)
    failed = [check["why"] for check in verdict["checks"] if not check["passed"]]
    if failed:
        return f"not passed: {'; '.join(failed)}; see {path}"
    return f"passed {len(verdict['checks'])} checks; see {path}"
