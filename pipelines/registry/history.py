"""Past and present champions, for people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipelines.address import lacks_registry
from pipelines.registry.champion import VERDICT_TAG, read_digest
from pipelines.registry.connection import open_registry
from pipelines.registry.promotion import CHAMPION_ALIAS, HISTORY_TAG


@dataclass(frozen=True, kw_only=True)
class Reign:
    """A version that is or was champion.

    Attributes:
        version: in the registry.
        digest: of the model's files.
        verdict: digest of the verdict that it was promoted with.
        registered: when, UTC.
        run_id: the training run.
        present: it is champion now.
    """

    version: int
    digest: str
    verdict: str | None
    registered: datetime
    run_id: str | None
    present: bool


def list_champions(root: Path) -> list[Reign]:
    """Return champions, the newest first; none where nothing was ever registered.

    Raises:
        UserError: a champion was not made by forecart.
        Exception: the registry cannot be reached; MLflow's own.
    """
    if lacks_registry(root):
        return []
    registry, name = open_registry(root)
    found = [m for m in registry.search_registered_models(f"name = '{name}'") if m.name == name]
    if not found or CHAMPION_ALIAS not in found[0].aliases:
        return []
    present = int(found[0].aliases[CHAMPION_ALIAS])
    history: list[int] = json.loads(found[0].tags.get(HISTORY_TAG, "[]"))
    # What follows the present champion belongs to an act that was killed half-way.
    while history and history[-1] != present:
        history.pop()
    reigns = []
    for number in history or [present]:
        version = registry.get_model_version(name, str(number))
        reigns.append(
            Reign(
                version=number,
                digest=read_digest(version),
                verdict=version.tags.get(VERDICT_TAG),
                registered=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
                run_id=version.run_id,
                present=number == present,
            )
        )
    return reigns[::-1]
