"""dvc.yaml as stages and edges: the one graph, for whoever orchestrates it.

Reads YAML and nothing else, so that a scheduler can parse it many times a minute. Of what
DVC's own graph can express it refuses what cannot be known without evaluating templates
(foreach, matrix, ${...} in a path); a template in a command is left for DVC to fill in.
"""

from __future__ import annotations

import posixpath
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
        group: under which pictures show it together with others.
    """

    pool: str | None = None
    queue: str | None = None
    timeout_minutes: int | None = None
    retries: int = 0
    group: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of dvc.yaml.

    Attributes:
        name: unique.
        command: what DVC runs.
        description: one sentence.
        deps: paths read, relative to the folder of dvc.yaml.
        outs: paths written, metrics and plots included; relative likewise.
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
        UserError: the file is missing or damaged, two outputs are the same path or lie within
            each other, the stages form a circle, a hint is wrong, or a stage uses a template
            (foreach, matrix, ${...} in a path).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    return parse_graph(text, path)


def parse_graph(text: str, path: Path) -> Graph:
    """Read the content of a dvc.yaml.

    Args:
        text: of the file.
        path: that messages name.

    Raises:
        UserError: as `load_graph`, but that the file is there.
    """
    try:
        content = yaml.load(text, Loader=_LOADER)  # noqa: S506 - a safe loader
    except yaml.YAMLError:
        raise UserError(f"{path}: not valid YAML") from None
    entries = content.get("stages") if isinstance(content, Mapping) else None
    if not isinstance(entries, Mapping) or not entries:
        raise UserError(f"{path}: no stages")
    stages = {str(name): _read_stage(path, str(name), entry) for name, entry in entries.items()}
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
    if not isinstance(entry, Mapping) or "cmd" not in entry or "matrix" in entry:
        raise UserError(f"{path}: stage {name} has no cmd (foreach and matrix are not supported)")
    command = entry["cmd"]
    folder = str(entry.get("wdir", ""))
    deps = _read_names(entry, "deps")
    outs = _read_names(entry, "outs", "metrics", "plots")
    templates = [p for p in (folder, *deps, *outs) if "${" in p]
    if templates:
        raise UserError(f"{path}: stage {name}: templates in paths are not supported: {templates}")
    return Stage(
        name=name,
        command=" && ".join(map(str, command)) if isinstance(command, list) else str(command),
        description=str(entry.get("desc", "")),
        deps=tuple(posixpath.normpath(posixpath.join(folder, dep)) for dep in deps),
        outs=tuple(posixpath.normpath(posixpath.join(folder, out)) for out in outs),
        params=tuple(_read_names(entry, "params")),
        hints=_read_hints(path, name, entry.get("meta")),
    )


def _read_hints(path: Path, name: str, meta: Any) -> Hints:
    given = meta.get("airflow") if isinstance(meta, Mapping) else None
    where = f"{path}: stage {name}: meta.airflow"
    if given is None:
        return Hints()
    if not isinstance(given, Mapping) or set(given) - set(Hints.__dataclass_fields__):
        raise UserError(f"{where} knows only {', '.join(Hints.__dataclass_fields__)}")
    hints = Hints(**given)
    for key, least in (("timeout_minutes", 1), ("retries", 0)):
        value = getattr(hints, key)
        if key in given and (type(value) is not int or value < least):
            raise UserError(
                f"{where}.{key}: expected a whole number from {least} (found {value!r})"
            )
    for key in ("pool", "queue", "group"):
        value = getattr(hints, key)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}.{key}: expected a name (found {value!r})")
    return hints


def _read_names(entry: Mapping[str, Any], *kinds: str) -> list[str]:
    return [name for kind in kinds for item in entry.get(kind) or () for name in _names(item)]


def _names(item: Any) -> Iterable[str]:
    """Paths are written plain, or as keys of a mapping with options."""
    return map(str, item) if isinstance(item, Mapping) else [str(item)]


def _connect(path: Path, stages: Mapping[str, Stage]) -> dict[str, tuple[str, ...]]:
    # Every path meets every output, at each of the scheduler's parses: plain tuples, since the same
    # on PurePosixPath took most of a parse's time.
    writers: dict[tuple[str, ...], str] = {}
    for stage in stages.values():
        for out in map(_parts, stage.outs):
            for other, writer in writers.items():
                if _overlap(out, other):
                    inner, outer = (PurePosixPath(*parts) for parts in (out, other))
                    both = f"{inner} is" if out == other else f"{outer} and {inner} overlap,"
                    raise UserError(f"{path}: {both} written by {writer} and {stage.name}")
            writers[out] = stage.name
    return {
        stage.name: tuple(
            dict.fromkeys(
                writer
                for dep in map(_parts, stage.deps)
                for out, writer in writers.items()
                if _overlap(dep, out)
            )
        )
        for stage in stages.values()
    }


def _parts(path: str) -> tuple[str, ...]:
    return PurePosixPath(path).parts


def _overlap(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether two paths, as parts, are the same or one lies within the other."""
    shared = min(len(a), len(b))
    return a[:shared] == b[:shared]
