"""What a user may get wrong, each told in one line, and odd shops that must still go through."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Project

START = datetime(2025, 1, 1, tzinfo=UTC)
MAPPING = {
    "user_id": "user",
    "ts": "time",
    "event_type": {"column": "action", "values": {"see": "view", "buy": "purchase"}},
    "item_id": "item",
    "price": "price",
}
Row = dict[str, Any]


def make_rows(users: int = 60, days: int = 100, *, buy: float = 0.15) -> list[Row]:
    """A little shop: every user looks every few days and sometimes buys."""
    chance = random.Random(3)
    rows = []
    for user in range(users):
        day = chance.random() * 5
        while day < days:
            action = "buy" if chance.random() < buy else "see"
            time = START + timedelta(days=day)
            rows.append(
                {
                    "user": f"u{user}",
                    "time": time.isoformat(),
                    "action": action,
                    "item": f"i{chance.randrange(20)}",
                    "price": f"{chance.uniform(1, 50):.2f}",
                }
            )
            day += chance.expovariate(0.4)
    return rows


def use_rows(project: Project, rows: Iterable[Row], columns: tuple[str, ...] = ()) -> Path:
    """Make the project read these rows from a CSV file."""
    file = project.path / "shop.csv"
    rows = list(rows)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, columns or tuple(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    project.change(
        {
            "ingest": {"source": "files", "files": {"path": "shop.csv", "mapping": MAPPING}},
            "cuts": {"train": 1},
            "gate": {"min_users": 5, "min_positives": 1},
        }
    )
    return file


def refused(project: Project, stage: str, *named: str) -> None:
    """Assert that a stage ends with code 2 and one line that names what is wrong."""
    result = project.run("forecart", stage, check=False)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("forecart: ")]
    assert len(lines) == 1, result.stderr
    for word in named:
        assert word in lines[0]


def ingest(project: Project) -> dict[str, Any]:
    project.run("forecart", "fingerprint")
    project.run("forecart", "ingest")
    summary: dict[str, Any] = json.loads((project.path / "reports/ingest.json").read_text())
    return summary


def test_a_missing_file(project: Project) -> None:
    use_rows(project, make_rows(2)).unlink()
    refused(project, "fingerprint", "shop.csv")


def test_a_missing_column(project: Project) -> None:
    use_rows(project, [{k: v for k, v in r.items() if k != "time"} for r in make_rows(5)])
    project.run("forecart", "fingerprint")
    refused(project, "ingest", "shop.csv", "time")


@pytest.mark.parametrize(("column", "damage"), [("action", "dance"), ("time", "yesterday")])
def test_damage_over_the_threshold_stops_the_run(
    project: Project, column: str, damage: str
) -> None:
    rows = make_rows()
    for row in rows[::5]:
        row[column] = damage
    use_rows(project, rows)
    project.run("forecart", "fingerprint")
    refused(project, "ingest", damage)
    assert not (project.path / "data/events").exists()


def test_damage_under_the_threshold_is_quarantined_with_its_reason(project: Project) -> None:
    rows = make_rows()
    rows[3]["action"] = "dance"
    rows[7]["time"] = "yesterday"
    use_rows(project, rows)
    summary = ingest(project)
    assert summary["quarantined"]["rows"] == 2
    import pyarrow.parquet as pq

    kept = pq.read_table(project.path / "data/quarantine/ingest").to_pylist()
    assert len(kept) == 2
    assert any("dance" in row["record"] for row in kept)


def test_negative_prices_are_quarantined_by_validation(project: Project) -> None:
    rows = make_rows()
    rows[3]["price"] = "-4.00"
    use_rows(project, rows)
    ingest(project)
    project.run("forecart", "validate")
    report = json.loads((project.path / "reports/validation.json").read_text())
    assert report["quarantined"] == 1


def test_repeated_lines_are_dropped(project: Project) -> None:
    rows = make_rows()
    use_rows(project, rows)
    once = ingest(project)
    use_rows(project, rows + rows[:50])
    assert ingest(project)["events"] == once["events"]


def test_no_events(project: Project) -> None:
    use_rows(project, [], columns=("user", "time", "action", "item", "price"))
    project.run("forecart", "fingerprint")
    refused(project, "ingest", "zero events")


def test_a_corrupt_parquet_file(project: Project) -> None:
    use_rows(project, make_rows(5)).unlink()
    (project.path / "shop.parquet").write_bytes(b"PAR1 this is not Parquet PAR1")
    project.change({"ingest": {"files": {"path": "shop.parquet"}}})
    project.run("forecart", "fingerprint")
    refused(project, "ingest", "shop.parquet")


def test_what_a_stage_reads_is_missing(take_finished: Callable[[], Project]) -> None:
    project = take_finished()
    for stage, missing in (
        ("features", "data/valid"),
        ("baselines", "data/valid"),
        ("baselines", "data/entities"),
        ("evaluate", "data/predictions/baselines"),
        ("package", "models/gpt"),
        ("gate", "reports/package.json"),
    ):
        kept = project.path / "kept"
        (project.path / missing).rename(kept)
        refused(project, stage, missing)
        kept.rename(project.path / missing)


def test_an_unknown_key(project: Project) -> None:
    project.change({"train": {"epocs": 3}})
    refused(project, "train", "params.yaml", "train.epocs")


def test_a_shop_where_nobody_buys_and_a_robot_looks_100_000_times_goes_through(
    project: Project,
) -> None:
    rows = make_rows(buy=0)
    step = timedelta(days=99) / 100_000
    rows += [
        {
            "user": "robot",
            "time": (START + i * step).isoformat(),
            "action": "see",
            "item": f"i{i % 20}",
            "price": "1.00",
        }
        for i in range(100_000)
    ]
    use_rows(project, rows)
    project.run("dvc", "repro")
    evaluation = json.loads((project.path / "reports/evaluation.json").read_text())
    assert evaluation["data"]["events"] > 100_000
    assert "churn_7d" in evaluation["targets"]
    assert "purchase_14d" not in evaluation["targets"]
    assert any("purchase_14d" in json.dumps(note) for note in evaluation["omitted"])
    assert not json.loads((project.path / "reports/verdict.json").read_text())["passed"]


def test_changed_content_of_the_source_is_noticed(project: Project) -> None:
    rows = make_rows()
    use_rows(project, rows)
    project.run("dvc", "repro", "ingest")
    assert "Running stage 'ingest'" not in project.run("dvc", "repro", "ingest").stdout
    use_rows(project, rows[1:])
    assert "Running stage 'ingest'" in project.run("dvc", "repro", "ingest").stdout
