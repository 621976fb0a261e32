"""Take the content hash of the event source, so that changed files are noticed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

from pipelines.config import Params
from pipelines.io import write_json
from pipelines.sources.catalog import open_source

OUTPUT: Final = Path("data/source.json")


def take_digest(content: dict[str, Any]) -> str:
    """Return the digest over what a source holds."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def run(params: Params, root: Path = Path()) -> str:
    """Write ``data/source.json``: what the source holds, and a digest over that.

    Args:
        params: all settings; the ``ingest`` section is used.
        root: the project's folder.

    Returns:
        One line for people.

    Raises:
        UserError: there is nothing to read.
    """
    content = open_source(params.ingest, root).fingerprint()
    digest = take_digest(content)
    write_json(root / OUTPUT, {**content, "digest": digest})
    return f"{params.ingest.source} is {digest[:19]}, in {OUTPUT}"
