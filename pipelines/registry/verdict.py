"""The gate's verdict, as whoever acts on it or tells it reads it: anybody can edit the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pipelines.errors import UserError
from pipelines.io import is_digest, read_json

VERDICT: Final = Path("reports/verdict.json")


def read_verdict(path: Path) -> dict[str, Any]:
    """Return the content of a verdict.

    Raises:
        UserError: it is missing, not readable, or not as the gate writes it.
    """
    verdict: Any = read_json(path)
    if not _is_whole(verdict):
        raise UserError(f"{path}: not as the gate wrote it; run: dvc repro")
    found: dict[str, Any] = verdict
    return found


def find_verdict(root: Path) -> dict[str, Any] | None:
    """Return the content of a project's verdict; None where there is none that can be read."""
    try:
        return read_verdict(root / VERDICT)
    except UserError:
        return None


def _is_whole(verdict: Any) -> bool:
    """Tell whether it holds what is read of it, and says nothing else than its checks do."""
    if not isinstance(verdict, dict) or not isinstance(verdict.get("checks"), list):
        return False
    checks = verdict["checks"]
    digests = [verdict.get(key, 0) for key in ("candidate", "champion")]
    return (
        isinstance(verdict.get("passed"), bool)
        and all(digest is None or is_digest(digest) for digest in digests)
        and all(
            isinstance(check, dict)
            and all(isinstance(check.get(key), str) for key in ("name", "why"))
            and isinstance(check.get("passed"), bool)
            for check in checks
        )
        # Without a check, nothing was judged.
        and verdict["passed"] == (bool(checks) and all(check["passed"] for check in checks))
    )
