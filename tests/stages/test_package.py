from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import parse_params
from pipelines.errors import UserError
from pipelines.features.store import MISSING_TIME, encode_events
from pipelines.model.timeline import DAY
from pipelines.stages import package
from pipelines.stages.package import (
    deal_out,
    describe,
    encode_sequences,
    pin_requirements,
    run,
    shorten,
)
from serving.golden import decode_sequences

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2025, 1, 1, tzinfo=UTC)


def write_project(root: Path, needs: str, pins: str) -> None:
    text = f"[project]\nname = 'x'\n[project.optional-dependencies]\nserve = [{needs}]\n"
    (root / "pyproject.toml").write_text(text)
    (root / "constraints.txt").write_text(pins)


def test_requirements_are_the_pinned_closure_of_the_serve_extra() -> None:
    lines = pin_requirements(ROOT)
    pins = set((ROOT / "constraints.txt").read_text().splitlines())
    assert set(lines) <= pins
    names = {line.split("==")[0] for line in lines}
    assert len(names) == len(lines)
    # Needed directly, and by what is needed.
    assert {"torch", "pydantic", "pydantic-core", "starlette"} <= names
    # uvicorn does without them, but no flood is answered then (benchmarks/TRIED.md).
    assert {"httptools", "uvloop"} <= names
    assert not names & {"mlflow", "dvc", "duckdb", "pandas", "pytest", "apache-airflow-core"}


def test_only_what_is_needed_is_pinned(tmp_path: Path) -> None:
    write_project(tmp_path, "'pydantic>=2'", "pydantic==2.0\npydantic-core==2.1\nnumpy==2.0\n")
    assert pin_requirements(tmp_path) == ["pydantic==2.0", "pydantic-core==2.1"]


def test_what_another_system_needs_is_left_out(tmp_path: Path) -> None:
    write_project(tmp_path, "'pydantic>=2', \"numpy; sys_platform == 'none'\"", "pydantic==2.0\n")
    assert pin_requirements(tmp_path) == ["pydantic==2.0"]


def test_a_missing_pin_is_named(tmp_path: Path) -> None:
    write_project(tmp_path, "'pydantic>=2', 'numpy'", "pydantic==2.0\n")
    with pytest.raises(UserError, match=r"constraints\.txt: numpy is not pinned"):
        pin_requirements(tmp_path)


def test_the_sources_hold_all_that_the_service_imports(tmp_path: Path) -> None:
    """Without what is installed of the project itself, which a container lacks."""
    for name in package.SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [sys.argv[1], *(entry for entry in sys.path if entry != sys.argv[2])]
import pipelines, serving.service, serving.golden, serving.measure, serving.store
assert pipelines.__file__.startswith(sys.argv[1])
"""
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="models/gpt"):
        run(parse_params({}), tmp_path)


def test_golden_histories_keep_the_last_events_and_survive_json() -> None:
    users = [
        [
            {
                "event_type": "search",
                "ts": START + timedelta(hours=h),
                "query": f"red shoes {u} {h}",
                "price": None if h % 2 else 5.0,
            }
            for h in range(u + 1)
        ]
        for u in range(6)
    ]
    everyone = encode_events(users)
    short = shorten(everyone, np.array([1, 5]), events=3)
    expected = encode_events([users[1], users[5][-3:]])
    back = decode_sequences(json.loads(json.dumps(encode_sequences(short))))
    for name in ("offsets", "ts", "type", "price", "query", "query_offsets", "query_tokens"):
        np.testing.assert_array_equal(getattr(back, name), getattr(expected, name), err_msg=name)
        assert getattr(back, name).dtype == getattr(expected, name).dtype
    assert back.signup_ts.tolist() == everyone.signup_ts[:2].tolist()


def test_golden_histories_are_nobodys() -> None:
    """The package goes where the project does not; what is in it must not tell of a shopper."""
    chance = np.random.default_rng(1)
    users = [
        [
            {"event_type": "view", "ts": START + timedelta(seconds=int(second)), "item_id": f"{u}"}
            for second in np.sort(chance.choice(10**6, u, replace=False))
        ]
        for u in range(20)
    ]
    before = encode_events(users)
    now = int(before.ts.max()) + 10**6
    after = deal_out(before, now_us=now)
    np.testing.assert_array_equal(after.offsets, before.offsets)
    whose = np.repeat(np.arange(20), np.diff(before.offsets))
    # As much of everything, but not with whom it was.
    assert sorted(after.item) == sorted(before.item)
    assert (after.item != before.item).mean() > 0.8
    assert len(set(after.ts) & set(before.ts)) < len(users)  # somebody's last time, at most
    inner = np.diff(whose) == 0
    gaps, dealt = np.diff(before.ts)[inner], np.diff(after.ts)[inner]
    assert sorted(gaps) == sorted(dealt)
    assert (gaps != dealt).mean() > 0.8
    assert (after.ts < now).all()
    # Sessions begin after the same gaps, and with each history.
    assert after.session_start[before.offsets[1:-1]].all()
    pairs = zip(gaps, before.session_start[1:][inner], strict=True)
    assert sorted(pairs) == sorted(zip(dealt, after.session_start[1:][inner], strict=True))


def test_profiles_of_golden_histories_are_dealt_out_and_signups_told_to_the_day() -> None:
    people = [
        {"age": float(20 + u), "gender": f"g{u}", "region": f"r{u}", "signup_ts": START}
        for u in range(30)
    ]
    people[3]["signup_ts"] = None
    for number, person in enumerate(people):
        if person["signup_ts"]:
            person["signup_ts"] = START + timedelta(days=number, seconds=77)
    events = [[{"event_type": "view", "ts": START + timedelta(days=40)}] for _ in people]
    before = encode_events(events, people)
    after = deal_out(before, now_us=int(before.ts.max()) + 1)
    for name in ("age", "gender", "region"):
        assert sorted(getattr(after, name)) == sorted(getattr(before, name))
    together = [set(zip(s.age, s.gender, s.region, strict=True)) for s in (before, after)]
    assert len(together[0] & together[1]) <= 1
    days = before.signup_ts // DAY * DAY
    expected = np.where(before.signup_ts == MISSING_TIME, before.signup_ts, days)
    assert sorted(after.signup_ts) == sorted(expected)


@pytest.mark.parametrize(
    ("p99", "limit", "bound"),
    [(4.2, 200.0, 100.0), (4.2, 20.0, 20.0), (120.0, 150.0, 150.0), (151.0, 150.0, 200.0)],
)
def test_a_measured_time_is_told_as_a_bound(p99: float, limit: float, bound: float) -> None:
    told = describe("sha256:0", 1.234, p99, limit)
    assert told == {"model": "sha256:0", "size_mb": 1.23, "p99_at_most_ms": bound}
