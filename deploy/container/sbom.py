"""Writes a bill of materials of this environment and system as CycloneDX 1.6 JSON.

It runs in the image while that is built, with the standard library alone. There is no time and no
random serial number in it: equal images give equal bytes.
"""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

DPKG = Path("/var/lib/dpkg/status")


def list_distributions() -> list[dict[str, Any]]:
    """Return the Python distributions."""
    found = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"].lower().replace("_", "-")
        component: dict[str, Any] = {
            "type": "library",
            "name": name,
            "version": distribution.version,
            "purl": f"pkg:pypi/{quote(name)}@{quote(distribution.version)}",
        }
        licence = distribution.metadata.get("License-Expression")
        if licence:
            component["licenses"] = [{"expression": licence}]
        found[name] = component
    return [found[name] for name in sorted(found)]


def list_system() -> list[dict[str, Any]]:
    """Return the Debian packages; none where the base is another system."""
    if not DPKG.is_file():
        return []
    found = []
    for entry in DPKG.read_text(encoding="utf-8").split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in entry.splitlines() if ": " in line and line[0] != " "
        )
        if fields.get("Status", "").endswith(" installed"):
            name, version = fields["Package"], fields["Version"]
            purl = f"pkg:deb/debian/{quote(name)}@{quote(version)}?arch={fields['Architecture']}"
            found.append(
                {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl}
            )
    return sorted(found, key=lambda component: str(component["name"]))


def main() -> None:
    """Print the document."""
    python = ".".join(map(str, sys.version_info[:3]))
    components = [
        {
            "type": "platform",
            "name": "python",
            "version": python,
            "purl": f"pkg:generic/python@{python}",
        },
        *list_distributions(),
        *list_system(),
    ]
    for component in components:
        component["bom-ref"] = component["purl"]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {"type": "container", "name": "forecart", "bom-ref": "forecart"}},
        "components": components,
    }
    print(json.dumps(document, indent=1))


main()
