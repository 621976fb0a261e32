"""Runs the Great Expectations suites of expectations/ and reads their results."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import pandas as pd

from pipelines.errors import UserError

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")

_EXAMPLES: Final = 3
_UUID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TIME: Final = re.compile(r"\d{8}T\d{6}\.\d{6}Z")
_REMOTE_IMAGE: Final = re.compile(r"https://great-expectations-web-assets[^\"\s]*")
_NO_IMAGE: Final = "data:,"
_DOCS: Final = "docs"
_SOURCE: Final = "forecart"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The result of one expectation on one table.

    Attributes:
        rule: the expectation's type without "expect_".
        column: what it looks at; empty for the table.
        severity: critical, warning or info.
        quarantine: rows that fail are set aside.
        passed: whether it holds.
        failed_rows: how many rows do not fit; 0 or 1 for rules on the table.
        rows: positions of these rows, of a Spark table perhaps the first of them only.
        complete: whether all of them are named.
        examples: the first values that do not fit.
    """

    rule: str
    column: str
    severity: str
    quarantine: bool
    passed: bool
    failed_rows: int
    rows: tuple[int, ...]
    complete: bool
    examples: tuple[str, ...]

    @property
    def key(self) -> str:
        """Name of the rule and its column, for people."""
        return f"{self.rule}({self.column})" if self.column else self.rule


class Validator:
    """Great Expectations in memory, with Data Docs written to a folder.

    Args:
        expectations: folder of the suites.
        docs: empty folder for the HTML pages.
        parameters: values of the suites' $PARAMETER entries.
        run_time: stands in the pages; a time of the data, so that equal data give equal pages.
    """

    def __init__(
        self,
        expectations: Path,
        docs: Path,
        *,
        parameters: Mapping[str, float],
        run_time: datetime,
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of optional engines that are not used here
            import great_expectations as gx
            from great_expectations.data_context.types.base import ProgressBarsConfig

        # Its loggers tell every temporary store; failures are told by the results.
        logging.getLogger("great_expectations").setLevel(logging.ERROR)
        self._gx = gx
        self._folder = expectations
        self._docs = docs
        self._parameters = dict(parameters)
        self._run_time = run_time
        self._context = gx.get_context(mode="ephemeral")
        self._context.variables.progress_bars = ProgressBarsConfig(globally=False)
        for site in list(self._context.get_site_names()):
            self._context.delete_data_docs_site(site)
        self._context.add_data_docs_site(
            site_name=_DOCS,
            site_config={
                "class_name": "SiteBuilder",
                "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
                "store_backend": {
                    "class_name": "TupleFilesystemStoreBackend",
                    "base_directory": str(docs.resolve()),
                },
            },
        )
        self._source = self._context.data_sources.add_pandas(_SOURCE)
        self._definitions: dict[str, Any] = {}

    def validate(self, suite: str, frame: Any, run: str, most_rows: int = 0) -> list[Outcome]:
        """Run one suite on one table.

        Args:
            suite: file name in the expectations folder, without ending. It stays with the kind of
                table that it ran on first.
            frame: a pandas table with a RangeIndex, or a Spark table of
                ``pipelines.validation.spark``.
            run: name of this part of the data in the pages.
            most_rows: of a Spark table no more rows than these are fetched for a rule.

        Raises:
            UserError: the suite's file is damaged, or an expectation cannot be computed.
        """
        spark: Any = None
        if not isinstance(frame, pd.DataFrame):
            # Only now: it needs PySpark.
            from pipelines.validation import spark
        run_id = self._gx.RunIdentifier(run_name=run, run_time=self._run_time)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            definition = self._definitions.get(suite) or self._define(
                suite, on_spark=spark is not None
            )
            result = definition.run(
                batch_parameters={"dataframe": frame},
                expectation_parameters=self._parameters,
                result_format=spark.ask(most_rows) if spark else {"result_format": "COMPLETE"},
                run_id=run_id,
            )
        if spark:
            for single in result.results:
                column = single.expectation_config.kwargs.get("column", "")
                spark.tell_as_pandas(single.result, column)
            store = self._context.validation_results_store
            (key,) = (k for k in store.list_keys() if k.run_id == run_id)
            store.update(key, result)
        return [self._read(suite, r) for r in result.results]

    def write_docs(self) -> None:
        """Write the HTML pages of everything that was validated."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._context.build_data_docs(site_names=[_DOCS])
        for page in sorted(self._docs.rglob("*.html")):
            page.write_text(
                _settle_page(page.read_text(encoding="utf-8"), self._run_time), encoding="utf-8"
            )

    def _define(self, name: str, *, on_spark: bool) -> Any:
        path = self._folder / f"{name}.json"
        suite = self._gx.ExpectationSuite(name=name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            entries = content["expectations"]
        except FileNotFoundError:
            raise UserError(f"{path}: no such suite") from None
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f"{path}: not a suite of Great Expectations") from None
        for entry in entries:
            try:
                single = self._gx.ExpectationSuite(name=name, expectations=[entry])
                suite.add_expectation(single.expectations[0])
            except Exception as error:  # GX raises many kinds; each is a mistake in the file
                first = str(error).strip().splitlines()[0] if str(error).strip() else "invalid"
                kind = entry.get("type") if isinstance(entry, dict) else entry
                raise UserError(f"{path}: expectation {kind!r}: {first}") from None
        asset = self._take_source(on_spark=on_spark).add_dataframe_asset(name)
        batch = asset.add_batch_definition_whole_dataframe("all")
        self._context.suites.add(suite)
        definition = self._gx.ValidationDefinition(name=name, data=batch, suite=suite)
        self._definitions[name] = self._context.validation_definitions.add(definition)
        return self._definitions[name]

    def _take_source(self, *, on_spark: bool) -> Any:
        """Return the source of tables of one kind. Either has the same name, as pages show it."""
        sources = self._context.data_sources
        if (self._source.type == "spark") != on_spark:
            sources.delete(_SOURCE)
            # Persisting would sort and keep the whole log; a rule reads a column or two of it.
            self._source = (
                sources.add_spark(_SOURCE, persist=False)
                if on_spark
                else sources.add_pandas(_SOURCE)
            )
        return self._source

    def _read(self, suite: str, result: Any) -> Outcome:
        config = result.expectation_config
        rule = config.type.removeprefix("expect_")
        column = config.kwargs.get("column") or config.kwargs.get("column_A") or ""
        if result.exception_info.get("raised_exception"):
            lines = str(result.exception_info.get("exception_message") or "").splitlines()
            why = next((line for line in lines if line.strip()), "it cannot be computed")
            raise UserError(f"{self._folder / suite}.json: {rule}({column}): {why}")
        details = result.result or {}
        rows = tuple(int(r) for r in details.get("unexpected_index_list") or ())
        failed = int(details.get("unexpected_count", len(rows)) or len(rows))
        if not result.success and not failed:
            failed = 1
        examples = details.get("partial_unexpected_list") or [details.get("observed_value", "")]
        return Outcome(
            rule=rule,
            column=column,
            severity=str(getattr(config.severity, "value", config.severity)),
            quarantine=(config.meta or {}).get("on_failure") == "quarantine",
            passed=bool(result.success),
            failed_rows=failed if not result.success else 0,
            rows=rows,
            complete=len(rows) >= int(details.get("unexpected_count") or 0),
            examples=tuple(str(e) for e in examples[:_EXAMPLES]),
        )


def _settle_page(html: str, run_time: datetime) -> str:
    """Make equal results equal pages, and let no page call home.

    Great Expectations gives parts of a page random names, prints when it ran, and loads its logo
    from a server with the time of the build.
    """
    names: dict[str, str] = {}
    settled = _UUID.sub(lambda m: names.setdefault(m[0], f"{len(names):08d}"), html)
    settled = _REMOTE_IMAGE.sub(_NO_IMAGE, settled)
    return _TIME.sub(run_time.strftime("%Y%m%dT%H%M%S.%fZ"), settled)
