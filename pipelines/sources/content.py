"""What a source holds, as one hash over its rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pipelines.sources.text import to_text


class Content:
    """Takes a hash over rows as they are read, in whatever chunks they come."""

    def __init__(self) -> None:
        """Begin with no row."""
        self._hash = hashlib.sha256()
        self._rows = 0

    def add(self, rows: Sequence[Any]) -> None:
        """Take in some rows, each a sequence of values."""
        if not rows:
            return
        values = [tuple(row) for row in rows]
        text = json.dumps(values, default=to_text, separators=(",", ":"), sort_keys=True)
        self._hash.update(text[1:-1].encode() + b",")
        self._rows += len(rows)

    def describe(self) -> dict[str, Any]:
        """Return how many rows there were, and their hash."""
        return {"rows": self._rows, "digest": f"sha256:{self._hash.hexdigest()}"}
