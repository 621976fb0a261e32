"""dvc.yaml as stages and edges: the one graph, for whoever orchestrates it.

Reads YAML and nothing else, so that a scheduler can parse it many times a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pipelines.errors import UserError

# The C loader is ten times as fast; it is missing where PyYAML was built without libyaml.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, kw_only=True)
class Hints:
    """How a stage wants to be orchestrated (dvc.yaml: meta.airflow).

    Attributes:
        pool: name of a resource pool.
        queue: name of a worker queue; None = any.
        timeout_minutes: after which the stage is taken for stuck.
        retries: how often it is tried again.
    """

    pool: str | None = None
    queue: str | None = None
    timeout_minutes: int | None = None
    retries: int = 0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of dvc.yaml.

    Attributes:
        name: unique.
        command: what DVC runs.
        description: one sentence.
        deps: paths read.
        outs: paths written, metrics and plots included.
        params: keys of params.yaml that it depends on.
        hints: for the orchestrator.
    """

    name: str
    command: str
    description: str = ""
    deps: tuple[str, ...] = ()
    outs: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    hints: Hints = field(default_factory=Hints)


@dataclass(frozen=True, kw_only=True)
class Graph:
    """Stages and who waits for whom.

    Attributes:
        stages: by name, in an order in which they can run.
        upstream: stage name -> names of the stages whose outputs it reads.
    """

    stages: dict[str, Stage]
    upstream: dict[str, tuple[str, ...]]

    @property
    def edges(self) -> set[tuple[str, str]]:
        """(upstream, downstream) pairs."""
        return {(up, down) for down, ups in self.upstream.items() for up in ups}


def load_graph(path: Path) -> Graph:
    """Read a dvc.yaml.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing or damaged, two stages write the same path, the stages
            form a circle, or a stage uses a template (foreach, matrix, ${...} in a path).
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506 - a safe loader
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except yaml.YAMLError:
        raise UserError(f"{path}: not valid YAML") from None
    entries = content.get("stages") if isinstance(content, Mapping) else None
    if not isinstance(entries, Mapping) or not entries:
        raise UserError(f"{path}: no stages")
    stages = {name: _read_stage(path, name, entry) for name, entry in entries.items()}
    upstream = _connect(path, stages)
    try:
        order = list(TopologicalSorter(upstream).static_order())
    except CycleError as error:
        raise UserError(f"{path}: stages wait in a circle: {' -> '.join(error.args[1])}") from None
    # Among stages that could run at once the file's order is kept, so that pictures stay still.
    position = {name: number for number, name in enumerate(stages)}
    depth: dict[str, int] = {}
    for name in order:
        depth[name] = 1 + max((depth[up] for up in upstream[name]), default=-1)
    names = sorted(stages, key=lambda name: (depth[name], position[name]))
    return Graph(stages={name: stages[name] for name in names}, upstream=upstream)


def _read_stage(path: Path, name: str, entry: Any) -> Stage:
    if not isinstance(entry, Mapping) or "cmd" not in entry:
        raise UserError(f"{path}: stage {name} has no cmd (foreach and matrix are not supported)")
    command = entry["cmd"]
    outs = [
        out
        for kind in ("outs", "metrics", "plots")
        for item in entry.get(kind) or ()
        for out in _names(item)
    ]
    deps = list(entry.get("deps") or ())
    templates = [p for p in (*deps, *outs) if "${" in p]
    if templates:
        raise UserError(f"{path}: stage {name}: templates in paths are not supported: {templates}")
    hints = (entry.get("meta") or {}).get("airflow") or {}
    try:
        read = Hints(**hints)
    except TypeError:
        known = ", ".join(Hints.__dataclass_fields__)
        raise UserError(f"{path}: stage {name}: meta.airflow knows only {known}") from None
    return Stage(
        name=name,
        command=" && ".join(command) if isinstance(command, list) else str(command),
        description=str(entry.get("desc", "")),
        deps=tuple(deps),
        outs=tuple(outs),
        params=tuple(p for item in entry.get("params") or () for p in _names(item)),
        hints=read,
    )


def _names(item: Any) -> Iterable[str]:
    """Paths are written plain, or as keys of a mapping with options."""
    return list(item) if isinstance(item, Mapping) else [str(item)]


def _connect(path: Path, stages: Mapping[str, Stage]) -> dict[str, tuple[str, ...]]:
    writers: dict[PurePosixPath, str] = {}
    for stage in stages.values():
        for out in stage.outs:
            place = PurePosixPath(out)
            if place in writers:
                raise UserError(f"{path}: {out} is written by {writers[place]} and {stage.name}")
            writers[place] = stage.name
    return {
        stage.name: tuple(
            dict.fromkeys(
                writer
                for dep in map(PurePosixPath, stage.deps)
                for out, writer in writers.items()
                if writer != stage.name and (dep.is_relative_to(out) or out.is_relative_to(dep))
            )
        )
        for stage in stages.values()
    }
