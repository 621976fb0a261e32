from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import pytest
import yaml

from pipelines.errors import UserError
from pipelines.graph import Hints, load_graph

ROOT = Path(__file__).parent.parent


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "dvc.yaml"
    file.write_text(text)
    return file


def test_the_graph_is_dvcs_own() -> None:
    from dvc.repo import Repo

    with Repo(str(ROOT)) as repo:
        theirs = repo.index.graph
        nodes = {s.name for s in theirs.nodes}
        # DVC draws an edge from a stage to what it depends on.
        edges = {(up.name, down.name) for down, up in theirs.edges}
    ours = load_graph(ROOT / "dvc.yaml")
    assert set(ours.stages) == nodes
    assert ours.edges == edges


# What stages import without depending on it, and why their results don't.
CONTRACTS = {
    "pipelines.address": "finds what is read or recorded, by any address the same",
    "pipelines.registry.connection": "reaches what is recorded",
    "pipelines.config": "its values are the stage's params",
    "pipelines.errors": "texts for people",
    "pipelines.events": "the schema, which what is stored is written in",
    "pipelines.io": "reads and writes what it is given",
    "pipelines.spark": "starts what computes; results are the same with and without it",
}
NOT_OF_A_RESULT = {
    ("pretrain", "pipelines.registry.tracking"): "of train, whose loading it shares",
    ("pretrain", "pipelines.registry.champion"): "where it is recorded, and what must be there",
    ("train", "pipelines.registry.champion"): "where it is recorded, and what must be there",
    ("baselines", "pipelines.registry.tracking"): "as for pretrain",
    ("baselines", "pipelines.registry.champion"): "as for pretrain",
    ("baselines", "pipelines.features.engine"): "builds data/features; here a day's length",
    ("evaluate", "pipelines.features.engine"): "likewise; labels are built by the stage features",
    ("package", "pipelines.registry.champion"): "refuses files, and changes none",
    ("pretrain", "pipelines.evaluation.rivals"): "whose results are recorded, by a promotion",
    ("train", "pipelines.evaluation.rivals"): "whose results are recorded, by a promotion",
    ("baselines", "pipelines.evaluation.rivals"): "as for train",
    ("pretrain", "pipelines.registry.verdict"): "read where results are recorded, by a promotion",
    ("train", "pipelines.registry.verdict"): "read where results are recorded, by a promotion",
    ("baselines", "pipelines.registry.verdict"): "as for train",
}


def test_a_stage_runs_again_when_code_that_it_uses_changes() -> None:
    import grimp

    imports = grimp.build_graph("pipelines", cache_dir=None, exclude_type_checking_imports=True)
    undeclared = set()
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].items():
        # One that always runs need not be told when.
        if stage.get("always_changed"):
            continue
        module = f"pipelines.stages.{name}"
        for used in {module} | imports.find_upstream_modules(module):
            place = PurePosixPath(*used.split("."))
            files = (place, place.with_suffix(".py"))
            declared = any(file.is_relative_to(dep) for file in files for dep in stage["deps"])
            if used not in CONTRACTS and not declared:
                undeclared.add((name, used))
    assert undeclared == NOT_OF_A_RESULT.keys()


@pytest.fixture(scope="module")
def dvc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dvc.repo import Repo

    folder = tmp_path_factory.mktemp("dvc")
    Repo.init(str(folder), no_scm=True).close()
    return folder


def draw_stages(draw: random.Random) -> dict[str, dict[str, object]]:
    paths = ["a/x", "a/x/1", "a/y", "ab", "b", "b/x", "c/d/e", "./c/d", "d", "e/f", "f.json"]
    stages: dict[str, dict[str, object]] = {}
    for name in "stuvw"[: draw.randint(2, 4)]:
        picked = draw.sample(paths, 3)
        stage: dict[str, object] = {"cmd": "x ${later}", "desc": "d", "deps": picked[:2]}
        kind = draw.choice(["outs", "metrics", "plots"])
        stage[kind] = [{picked[2]: {"cache": False}}] if draw.random() < 0.5 else [picked[2]]
        if draw.random() < 0.2:
            stage["wdir"] = "a"
        stages[name] = stage
    return stages


def test_any_graph_is_dvcs_or_refused_by_both(dvc_folder: Path) -> None:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    (dvc_folder / "a").mkdir()
    (dvc_folder / "params.yaml").write_text("later: 1\n")
    file = dvc_folder / "dvc.yaml"
    draw, outcomes = random.Random(7), {"equal": 0, "refused": 0}
    for _ in range(120):
        stages = draw_stages(draw)
        file.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
        edges: set[tuple[str, str]] | None = None
        try:
            with Repo(str(dvc_folder)) as repo:
                theirs = repo.index.graph.edges
                edges = {(up.name, down.name) for down, up in theirs}
        except DvcException:
            with pytest.raises(UserError):
                load_graph(file)
            outcomes["refused"] += 1
            continue
        assert load_graph(file).edges == edges, stages
        outcomes["equal"] += bool(edges)
    assert min(outcomes.values()) >= 20, outcomes


def test_stages_come_in_an_order_that_can_run() -> None:
    graph = load_graph(ROOT / "dvc.yaml")
    done: set[str] = set()
    for name in graph.stages:
        assert set(graph.upstream[name]) <= done
        done.add(name)
    assert next(iter(graph.stages)) == "fingerprint"


def test_paths_within_each_other_connect(tmp_path: Path) -> None:
    graph = load_graph(
        write(
            tmp_path,
            "stages:\n"
            "  c: {cmd: x, deps: [out/a/file]}\n"
            "  a: {cmd: x, outs: [out/a]}\n"
            "  b: {cmd: x, outs: [{out/b: {cache: false}}]}\n"
            "  d: {cmd: x, deps: [out]}\n"
            "  e: {cmd: x, deps: [outer]}\n",
        )
    )
    assert graph.edges == {("a", "c"), ("a", "d"), ("b", "d")}


def test_hints_are_read(tmp_path: Path) -> None:
    file = write(
        tmp_path, "stages: {a: {cmd: x, meta: {airflow: {pool: gpu, timeout_minutes: 5}}}}"
    )
    assert load_graph(file).stages["a"].hints == Hints(pool="gpu", timeout_minutes=5)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stages: {a: {cmd: x, outs: [o]}, b: {cmd: x, outs: [o]}}", "o is written by a and b"),
        ("stages: {a: {cmd: x, outs: [o]}, b: {cmd: x, outs: [o/p]}}", "o and o/p overlap"),
        ("stages: {a: {cmd: x, deps: [o/p], outs: [o]}}", "circle: a -> a"),
        (
            "stages: {a: {cmd: x, deps: [p], outs: [o]}, b: {cmd: x, deps: [o], outs: [p]}}",
            "circle",
        ),
        ("stages: {a: {foreach: [1], do: {cmd: x}}}", "foreach"),
        ("stages: {a: {cmd: x, deps: ['${p}']}}", "templates"),
        ("stages: {a: {cmd: x, matrix: {m: [1]}}}", "matrix"),
        ("stages: {a: {cmd: x, meta: {airflow: {pol: gpu}}}}", "meta.airflow knows only"),
        ("stages: {a: {cmd: x, meta: {airflow: {retries: -1}}}}", "retries: expected"),
        ("stages: {a: {cmd: x, meta: {airflow: {timeout_minutes: soon}}}}", "found 'soon'"),
        ("stages: {a: {cmd: x, meta: {airflow: {pool: 3}}}}", "pool: expected a name"),
        ("stages: [", "not valid YAML"),
        ("{}", "no stages"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(UserError, match=named):
        load_graph(write(tmp_path, text))


def test_it_is_light() -> None:
    code = (
        "import sys, time; t = time.process_time();"
        "from pathlib import Path; from pipelines.graph import load_graph;"
        f"load_graph(Path({str(ROOT / 'dvc.yaml')!r}));"
        "heavy = {'dvc', 'mlflow', 'torch', 'pandas', 'numpy', 'bentoml', 'pydantic'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        "t = time.process_time() - t; from tests.speed import slowness; print(t / slowness())"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        out = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert time.perf_counter() - started < 30
        seconds.append(float(out.stdout))
    assert min(seconds) < 0.1
