"""Every source by its name in params.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import config
from pipelines.sources.base import QUARANTINE_SCHEMA, SCHEMAS, Batch, Kind, Source
from pipelines.sources.database import DatabaseSource
from pipelines.sources.files import FilesSource
from pipelines.sources.rest import RestSource

_ROWS_PER_BATCH = 1 << 19


class SimulatorSource:
    """The simulated shop. Its params are its content, as it is seeded."""

    def __init__(self, params: config.Simulator) -> None:
        """Remember the params; the shop is simulated when it is first read."""
        self._params = params
        self._tables: dict[Kind, pa.Table] | None = None

    def fingerprint(self) -> dict[str, Any]:
        """See ``Source``."""
        return {"source": "simulator", "simulator": self._params.model_dump(mode="json")}

    def read(self, kind: Kind) -> Iterator[Batch]:
        """See ``Source``."""
        if self._tables is None:
            self._tables = self._simulate()
        # Dropped once read: the events are the bulk of the memory.
        table = self._tables.pop(kind)
        for start in range(0, table.num_rows, _ROWS_PER_BATCH):
            part = table.slice(start, _ROWS_PER_BATCH)
            yield Batch(
                source=config.Source.SIMULATOR,
                numbers=pa.array(range(start + 1, start + part.num_rows + 1), pa.int64()),
                table=part.select(SCHEMAS[kind].names).cast(SCHEMAS[kind]),
                quarantined=QUARANTINE_SCHEMA.empty_table(),
                rows=part.num_rows,
            )

    def fingerprint_read(self) -> dict[str, Any]:
        """See ``Source``."""
        return self.fingerprint()

    def tell_omissions(self) -> str:
        """See ``Source``: all is read."""
        return ""

    def _simulate(self) -> dict[Kind, pa.Table]:
        from pipelines.sources.simulator import SimulatorParams, simulate

        shop = simulate(SimulatorParams(**self._params.model_dump()))
        return {Kind.EVENTS: shop.events, Kind.USERS: shop.users, Kind.ITEMS: shop.items}


def open_source(
    params: config.Ingest, root: Path = Path(), found: dict[str, Any] | None = None
) -> Source:
    """Return the source that params.yaml names.

    Args:
        params: the ``ingest`` section.
        root: folder that relative paths start from.
        found: its fingerprint, past which a source that grows is not read.
    """
    if params.source is config.Source.DATABASE:
        return DatabaseSource(params.database, root, found)
    if params.source is config.Source.FILES:
        return FilesSource(params.files, root)
    if params.source is config.Source.REST:
        return RestSource(params.rest, params.until)
    return SimulatorSource(params.simulator)
