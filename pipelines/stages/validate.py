"""Stage: check the events with Great Expectations; quarantine bad rows, stop on bad data."""

from __future__ import annotations

import json
import math
import shutil
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import Params, ValidateEngine
from pipelines.errors import UserError
from pipelines.io import progress, replace_directory, say_count, write_json, write_table
from pipelines.sources.base import QUARANTINE_SCHEMA
from pipelines.spark import open_spark
from pipelines.validation.days import describe_days, describe_log
from pipelines.validation.suites import Outcome, Validator

EVENTS = Path("data/events")
VALID = Path("data/valid")
QUARANTINE = Path("data/quarantine/validate")
REPORT = Path("reports/validation.json")
DOCS = Path("reports/data_docs")
EXPECTATIONS = Path("expectations")

# Great Expectations costs about a second a table, so days are checked together up to so many
# rows; memory stays bounded by one such part. Spark, which bounds its own, takes all days at once.
ROWS_AT_ONCE: Final = 250_000

# What a suite gets where freshness is not checked: Great Expectations wants a number.
_ANY_AGE_DAYS: Final = 1e6


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One day's file."""

    day: date
    path: Path
    rows: int


def run(params: Params, root: Path = Path()) -> str:
    """Write data/valid, data/quarantine/validate, reports/validation.json and the Data Docs.

    Raises:
        UserError: a critical rule is broken, too many rows break row-level rules, or freshness is
            asked for and nothing says what it counts from.
    """
    if params.validate_.max_staleness_days and params.ingest.until is None:
        raise UserError(
            "validate.max_staleness_days counts from ingest.until, which is not set; "
            "forecart_retrain sets it to the last midnight"
        )
    partitions = _list_partitions(root / EVENTS)
    last = _newest(partitions[-1])
    settings = params.validate_
    with (
        replace_directory(root / VALID) as valid,
        replace_directory(root / QUARANTINE) as aside,
        replace_directory(root / DOCS) as docs,
        pq.ParquetWriter(
            aside / "part-0.parquet", QUARANTINE_SCHEMA, compression="zstd"
        ) as quarantine,
    ):
        validator = Validator(
            root / EXPECTATIONS,
            docs,
            parameters={
                "lowest_deviation": -settings.volume_sigmas,
                "highest_deviation": settings.volume_sigmas,
                "max_staleness_days": settings.max_staleness_days or _ANY_AGE_DAYS,
            },
            run_time=last,
        )
        outcomes: dict[str, list[Outcome]] = defaultdict(list)
        rows = sum(p.rows for p in partitions)
        most = settings.max_row_failure_share
        quarantined, exact = 0, True
        with _open_reader(settings.engine, root / EVENTS, partitions) as (groups, read):
            for number, group in enumerate(progress(groups, "validate", unit="part")):
                found = validator.validate(
                    "events",
                    read(group),
                    run=f"part-{number:03d}",
                    # With as many the run stops; what they are beyond that, nobody asks.
                    most_rows=math.ceil(most * rows) + 1,
                )
                for outcome in found:
                    outcomes[f"events: {outcome.key}"].append(outcome)
                reasons = _collect_reasons(found)
                count, is_exact = _count_rows(found, reasons)
                quarantined, exact = quarantined + count, exact and is_exact
                if quarantined / rows <= most:
                    _write_group(group, reasons, valid, quarantine)
        log, repeated = describe_log(
            root / EVENTS,
            last=last,
            now=datetime.now(UTC),
            reference=params.ingest.until,
        )
        days = describe_days({p.day: p.rows for p in partitions})
        for suite, frame in (("days", days), ("log", log)):
            for outcome in validator.validate(suite, frame, run="whole-log"):
                outcomes[f"{suite}: {outcome.key}"].append(outcome)
        report = _summarise(outcomes, rows=rows, quarantined=quarantined)
        _stop_on_failure(report, most, repeated, exact=exact)
        validator.write_docs()
    write_json(root / REPORT, report)
    count = len(report["warnings"])
    warned = f", {say_count(count, 'warning')} in {REPORT}" if count else ""
    return f"{rows - quarantined:,} of {rows:,} events valid in {VALID}{warned}"


def _list_partitions(folder: Path) -> list[Partition]:
    partitions = []
    for path in sorted(folder.glob("day=*/*.parquet")):
        try:
            rows = pq.read_metadata(path).num_rows
        except (pa.ArrowInvalid, OSError):
            raise UserError(f"{path}: not a readable Parquet file; run ingest again") from None
        day = date.fromisoformat(path.parent.name.removeprefix("day="))
        partitions.append(Partition(day=day, path=path, rows=rows))
    if not partitions:
        raise UserError(f"{folder}: no events; run the stages before")
    return partitions


def _newest(partition: Partition) -> datetime:
    table = pq.read_table(partition.path)
    if "ts" not in table.column_names:
        raise UserError(f"{partition.path}: missing column ts")
    newest: datetime = max(table["ts"].to_pylist())
    return newest


def _group(partitions: Sequence[Partition]) -> Iterator[list[Partition]]:
    group: list[Partition] = []
    for partition in partitions:
        if group and sum(p.rows for p in group) + partition.rows > ROWS_AT_ONCE:
            yield group
            group = []
        group.append(partition)
    yield group


@contextmanager
def _open_reader(
    engine: ValidateEngine, folder: Path, partitions: list[Partition]
) -> Iterator[tuple[list[list[Partition]], Callable[[list[Partition]], Any]]]:
    """Give the days that are checked together, and what reads them as a table."""
    if engine is ValidateEngine.PANDAS:
        yield list(_group(partitions)), _read_group
        return
    with open_spark() as session:
        yield [partitions], partial(_read_spark, session, folder)


def _read_spark(session: Any, folder: Path, partitions: Sequence[Partition]) -> Any:
    # Only now: it needs PySpark.
    from pipelines.validation.spark import read_events

    tables = [pq.read_schema(p.path).empty_table() for p in partitions]
    files = [(p.path, p.rows) for p in partitions]
    return read_events(session, folder, files, _join(tables).schema)


def _join(tables: Sequence[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise UserError(f"{EVENTS}: days differ in their columns: {error}") from None


def _read_group(group: Sequence[Partition]) -> pd.DataFrame:
    tables = [pq.ParquetFile(p.path).read() for p in group]
    frame = _join(tables).to_pandas()
    frame["day"] = np.repeat([p.day.isoformat() for p in group], [t.num_rows for t in tables])
    if "ts" in frame:
        frame["day_of_ts"] = frame["ts"].dt.strftime("%Y-%m-%d")
    return frame


def _collect_reasons(outcomes: Sequence[Outcome]) -> dict[int, list[str]]:
    """Row position -> the rules that it breaks."""
    reasons: dict[int, list[str]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.quarantine:
            for row in outcome.rows:
                reasons[row].append(outcome.key)
    return reasons


def _count_rows(outcomes: Sequence[Outcome], reasons: dict[int, list[str]]) -> tuple[int, bool]:
    """How many rows break row-level rules at least, and whether there are no more."""
    broken = [o for o in outcomes if o.quarantine and o.rows]
    count = max([len(reasons), *(o.failed_rows for o in broken)])
    is_exact = all(o.complete for o in broken) or [o.failed_rows for o in broken] == [count]
    return count, is_exact


def _write_group(
    group: Sequence[Partition],
    reasons: dict[int, list[str]],
    valid: Path,
    quarantine: pq.ParquetWriter,
) -> None:
    """Copy the days without bad rows, rewrite the others, set the bad rows aside."""
    rows = sorted(reasons)
    start = 0
    for partition in group:
        bad = rows[bisect_left(rows, start) : bisect_left(rows, start + partition.rows)]
        target = valid / partition.path.parent.name / partition.path.name
        table = pq.ParquetFile(partition.path).read() if bad else None
        if len(bad) < partition.rows:
            target.parent.mkdir(parents=True, exist_ok=True)
            if table is None:
                shutil.copyfile(partition.path, target)
            else:
                keep = np.ones(partition.rows, bool)
                keep[np.array(bad) - start] = False
                write_table(target, table.filter(pa.array(keep)))
        if table is not None:
            records = [
                {
                    "source": str(EVENTS / partition.path.parent.name / partition.path.name),
                    "row": row - start + 1,
                    "reason": ", ".join(reasons[row]),
                    "record": json.dumps(
                        table.slice(row - start, 1).to_pylist()[0], default=str, ensure_ascii=False
                    ),
                }
                for row in bad
            ]
            quarantine.write_table(pa.Table.from_pylist(records, QUARANTINE_SCHEMA))
        start += partition.rows


def _summarise(
    outcomes: dict[str, list[Outcome]], *, rows: int, quarantined: int
) -> dict[str, Any]:
    expectations: list[dict[str, Any]] = []
    for name, parts in outcomes.items():
        failed = sum(p.failed_rows for p in parts)
        expectations.append(
            {
                "suite": name.partition(":")[0],
                "rule": parts[0].rule,
                "column": parts[0].column,
                "severity": parts[0].severity,
                "quarantine": parts[0].quarantine,
                "passed": all(p.passed for p in parts),
                "failed_rows": failed,
                "share": round(failed / rows, 6),
                "examples": [e for p in parts if not p.passed for e in p.examples][:3],
            }
        )
    warnings = [
        f"{e['rule']}({e['column']}): {e['failed_rows']} rows, e.g. {', '.join(e['examples'])}"
        for e in expectations
        if not e["passed"] and e["severity"] != "critical"
    ]
    return {
        "passed": all(e["passed"] for e in expectations if e["severity"] == "critical"),
        "rows": rows,
        "quarantined": quarantined,
        "expectations": expectations,
        "warnings": warnings,
    }


def _stop_on_failure(
    report: dict[str, Any], max_share: float, repeated: list[str], *, exact: bool
) -> None:
    for e in report["expectations"]:
        if e["severity"] == "critical" and not e["passed"]:
            examples = repeated if e["column"] == "repeated_event_ids" else e["examples"]
            raise UserError(
                f"validation failed: {e['rule']} of column {e['column'] or '(table)'} in suite "
                f"{e['suite']}: {e['failed_rows']} rows, for example {', '.join(examples)}"
            )
    share = report["quarantined"] / report["rows"]
    if share > max_share:
        worst = max(
            (e for e in report["expectations"] if e["quarantine"]), key=lambda e: e["share"]
        )
        raise UserError(
            f"validation failed: {'' if exact else 'at least '}{report['quarantined']} of "
            f"{report['rows']} rows ({share:.1%}) "
            f"break row-level rules, more than validate.max_row_failure_share = {max_share}; most "
            f"often {worst['rule']} of column {worst['column']}: {worst['failed_rows']} rows, for "
            f"example {', '.join(worst['examples'])}"
        )
