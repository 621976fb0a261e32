"""The event partitions as one Spark table, and what makes Great Expectations judge it as pandas.

Great Expectations knows its Spark engine's metrics by their names; importing this module replaces
some of them. Those of pandas stay what they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Final
from urllib.parse import unquote

import great_expectations.expectations as gxe
import numpy as np
import pandas as pd
import pyarrow as pa
from great_expectations.constants import MAX_RESULT_RECORDS
from great_expectations.core.metric_domain_types import MetricDomainTypes
from great_expectations.execution_engine import SparkDFExecutionEngine
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnMapMetricProvider,
    column_condition_partial,
)
from great_expectations.expectations.metrics.metric_provider import metric_value
from great_expectations.expectations.metrics.table_metric_provider import TableMetricProvider
from pyspark.sql import Window
from pyspark.sql import functions as F

from pipelines.errors import UserError

# Position of a row in the whole log, from 0.
ROW: Final = "__row"
_FILE: Final = "__file"
_START: Final = "__start"
_LAST: Final = "__last"
_BEFORE: Final = "__ts_before"
_HIDDEN: Final = frozenset({ROW, _FILE, _START, _LAST, _BEFORE})

# Values of a rule that the pages show.
_SHOWN: Final = 20

# The suites name types as pandas does.
_PANDAS_NAMES: Final = {
    "TimestampType": "Timestamp",
    "TimestampNTZType": "datetime64",
    "DoubleType": "float64",
    "FloatType": "float32",
    "LongType": "int64",
    "IntegerType": "int32",
    "StringType": "str",
    "BooleanType": "bool",
}


def read_events(
    session: Any, folder: Path, files: Sequence[tuple[Path, int]], schema: pa.Schema
) -> Any:
    """Return the events of all days as pandas would show them, with the position of each row.

    Args:
        session: of Spark, in UTC.
        folder: of the day partitions; workers must see it by the same path.
        files: each partition with its number of rows, in the order of the log.
        schema: of every partition.

    Returns:
        Spark table of the columns of the schema, ``day`` (of the partition), ``day_of_ts`` and
        what rules do not see: ``ROW`` and the time of the row before. It is sorted by ``ROW``, so
        that the first rows of a kind are always the same; for counts Spark leaves the sort out.

    Raises:
        UserError: Spark finds other rows than the partitions have.
    """
    reader = (
        session.read.option("recursiveFileLookup", True)
        .option("pathGlobFilter", "*.parquet")
        # Times long ago are what is written, in no legacy calendar.
        .option("datetimeRebaseMode", "CORRECTED")
    )
    columns = [f.name for f in schema if f.name != "day"]
    events = reader.parquet(str(folder)).select(
        *(_drop_nan(schema.field(name)) for name in columns),
        F.col("_metadata.file_path").alias(_FILE),
        F.col("_metadata.row_index").alias(ROW),
    )
    micros = F.unix_micros("ts")
    newest = F.max_by(micros, F.when(micros.isNotNull(), F.col(ROW)))
    found = {
        PurePosixPath(unquote(url)).parts[-2:]: (url, rows, last)
        for url, rows, last in events.groupBy(_FILE).agg(F.count("*"), newest).collect()
    }
    starts: list[tuple[str, str, int, int | None]] = []
    start, before = 0, None
    for file, rows in files:
        url, there, last = found.get(file.parts[-2:], ("", 0, None))
        if there != rows:
            raise UserError(f"{file}: Spark finds {there} rows of {rows}")
        starts.append((url, file.parent.name.removeprefix("day="), start, before))
        start += rows
        before = before if last is None else last
    kinds = f"{_FILE} string, day string, {_START} long, {_LAST} long"
    days = session.createDataFrame(starts, kinds)
    rows_before = Window.partitionBy(_FILE).orderBy(ROW).rowsBetween(Window.unboundedPreceding, -1)
    return (
        events.withColumn(_BEFORE, F.last(micros, ignorenulls=True).over(rows_before))
        .join(F.broadcast(days), _FILE)
        .select(
            *columns,
            "day",
            F.date_format("ts", "yyyy-MM-dd").alias("day_of_ts"),
            F.timestamp_micros(F.coalesce(_BEFORE, _LAST)).alias(_BEFORE),
            (F.col(_START) + F.col(ROW)).alias(ROW),
        )
        .orderBy(ROW)
    )


def _drop_nan(field: pa.Field) -> Any:
    """A missing number is null or NaN in a file; pandas makes no difference."""
    column = F.col(field.name)
    if not pa.types.is_floating(field.type):
        return column
    return F.when(~F.isnan(column), column).alias(field.name)


class _ColumnTypes(TableMetricProvider):  # type: ignore[misc]
    """Columns that the rules see: row numbers are none of them, as the index of pandas is none."""

    metric_name = "table.column_types"
    value_keys = ("include_nested",)
    default_kwarg_values: ClassVar = {"include_nested": True}

    @metric_value(engine=SparkDFExecutionEngine)
    def _spark(  # type: ignore[no-untyped-def]
        cls, execution_engine, metric_domain_kwargs, **kwargs
    ):
        table, _compute, _access = execution_engine.get_compute_domain(
            metric_domain_kwargs, domain_type=MetricDomainTypes.TABLE
        )
        return [{"name": f.name, "type": f.dataType} for f in table.schema if f.name not in _HIDDEN]


class _Increasing(ColumnMapMetricProvider):  # type: ignore[misc]
    """Times in the order of the log.

    That of Great Expectations 1.24 compares times by whole days, so that it passes whatever falls
    within one, and takes the order of the rows from a sort by a constant, which is none.
    """

    condition_metric_name = "column_values.increasing"
    condition_value_keys = ("strictly",)
    default_kwarg_values: ClassVar = {"strictly": False}

    @column_condition_partial(engine=SparkDFExecutionEngine)
    def _spark(cls, column, strictly, _accessor_domain_kwargs, **kwargs):  # type: ignore[no-untyped-def]
        name = _accessor_domain_kwargs["column"]
        if name != "ts":
            raise ValueError(f"on Spark the order of ts is known, that of {name} is not")
        before = F.col(_BEFORE)
        return before.isNull() | (column > before if strictly else column >= before)


class ExpectColumnValuesToBeOfType(gxe.ExpectColumnValuesToBeOfType):  # type: ignore[misc]
    """By the names of pandas: Great Expectations wants each engine's own, and a suite each."""

    def _validate_spark(self, actual_column_type: Any, expected_type: str) -> dict[str, Any]:
        spark = type(actual_column_type).__name__
        found = _PANDAS_NAMES.get(spark, spark)
        return {"success": found == expected_type, "result": {"observed_value": found}}


def ask(most_rows: int) -> dict[str, Any]:
    """Return the form of result that names at most so many rows of a rule, in their order.

    Great Expectations' COMPLETE would fetch all of them.
    """
    return {
        "result_format": "SUMMARY",
        "partial_unexpected_count": max(most_rows, MAX_RESULT_RECORDS),
        "unexpected_index_column_names": [ROW],
    }


def tell_as_pandas(result: dict[str, Any], column: str) -> None:
    """Make of what ``ask`` gave what COMPLETE gives for a pandas table, in place.

    Args:
        result: of one rule.
        column: what it looks at; empty for a pair or the table.
    """
    if "partial_unexpected_list" not in result:
        return
    missing = pd.NaT if column == "ts" else np.nan
    values = [_tell_value(v, missing) for v in result["partial_unexpected_list"]]
    rows = [entry[ROW] for entry in result["partial_unexpected_index_list"]]
    common = Counter(values).most_common(_SHOWN)
    result |= {
        "partial_unexpected_list": values[:_SHOWN],
        "partial_unexpected_counts": [
            {"value": value, "count": count}
            for value, count in sorted(common, key=lambda pair: (-pair[1], pair[0]))
        ],
        "partial_unexpected_index_list": rows[:_SHOWN],
        "unexpected_list": values,
        "unexpected_index_list": rows,
        "unexpected_index_query": f"df.filter(items={rows}, axis=0)",
    }
    del result["unexpected_index_column_names"]


def _tell_value(value: Any, missing: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_tell_value(v, missing) for v in value)
    # Spark hands out times without their zone, in that of the process.
    if isinstance(value, datetime):
        return value.astimezone(UTC)
    return missing if value is None else value
