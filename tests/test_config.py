from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines.config import Params, load_params, parse_params
from pipelines.errors import UserError

ROOT = Path(__file__).parent.parent


def test_the_shipped_file_equals_the_defaults() -> None:
    assert load_params(ROOT / "params.yaml") == Params()


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"train": {"epocs": 3}}, "unknown key train.epocs"),
        ({"package": {"name": "a" * 64}}, "package.name: String should have at most 63 characters"),
        ({"trian": {}}, "unknown key trian"),
        ({"train": {"epochs": "many"}}, "train.epochs"),
        ({"train": {"epochs": 0}}, "train.epochs"),
        ({"train": {"precision": "float16"}}, "train.precision"),
        ({"train": {"compile": "yes"}}, "train.compile"),
        ({"train": {"accumulate": 0}}, "train.accumulate"),
        ({"train": {"width": 24, "heads": 5}}, "train"),
        ({"train": {"context": 64, "stride": 64}}, "stride must be below context"),
        ({"ingest": {"source": "files"}}, "files.path"),
        ({"ingest": {"source": "ftp"}}, "ingest.source"),
        ({"ingest": {"simulator": {"start": "soon"}}}, "ingest.simulator.start"),
        ({"ingest": {"files": {"mapping": {"user": "u"}}}}, "no such column: user"),
        (
            {"ingest": {"files": {"users_mapping": {"user": "u"}}}},
            "no such column: user",
        ),
        ({"ingest": {"database": {"items_mapping": {"item_id": None}}}}, "item_id is needed"),
        (
            {"ingest": {"files": {"users_mapping": {"age": {"column": "a", "only": ["view"]}}}}},
            "`only` is for events",
        ),
        ({"ingest": {"files": {"mapping": {"ts": {"timezone": "UTC"}}}}}, "column or value"),
        ({"targets": {"horizons_days": [14, 7]}}, "ascending"),
        ({"targets": {"primary_horizon_days": 5}}, "primary_horizon_days"),
        ({"targets": {"events": ["dance"]}}, "targets.events"),
        ({"targets": {"events": ["purchase", "purchase"]}}, "without repeats"),
        ([], "expected a mapping"),
        ({"train": {"compare": ["gpt"]}}, "compare must name other backbones"),
        ({"train": {"compare": ["cnn", "cnn"]}}, "compare must name other backbones"),
    ],
)
def test_a_mistake_is_named(raw: object, named: str) -> None:
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        parse_params(raw)


def test_until_without_an_offset_is_utc() -> None:
    params = parse_params({"ingest": {"until": "2011-08-01T00:00:00"}})
    assert params.ingest.until == datetime(2011, 8, 1, tzinfo=UTC)


def test_a_column_may_be_named_in_short() -> None:
    params = parse_params({"ingest": {"files": {"path": "x.csv", "mapping": {"user_id": "uid"}}}})
    assert params.ingest.files.mapping["user_id"].column == "uid"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        *((nothing, ": it is empty") for nothing in ("", "# nothing\n", "---\n")),
        ("train:\n  epochs: [1\n", ", line 3: not valid YAML"),
        ("ingest:\n  until: 2025-06-31\n", ", line 2: not a valid value (found '2025-06-31')"),
        ("train:\n  epochs: !!int x\n", ", line 2: not a valid value (found 'x')"),
        ("train: {epochs: 2}\npackage: {}\ntrain: {}\n", ", line 3: train is given a second time"),
        (
            "train:\n  epochs: 2\n  seed: 1\n  epochs: 3\n",
            ", line 4: epochs is given a second time",
        ),
        ("train: " + "[" * 3000 + "]" * 3000, ": nested too deep"),
        (
            "ingest: {until: '0001-01-01T00:00:00+14:00'}",
            ": ingest.until: in UTC this is before the first year",
        ),
        (
            "ingest: {until: 9999-12-31T23:59:59-14:00}",
            ": ingest.until: in UTC this is before the first year or after the last",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(f'{file}{told}')}[^\\n]*$"):
        load_params(file)


def test_a_file_of_another_encoding_or_a_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes("# Gr\u00f6\u00dfe\n".encode("latin-1"))
    for path, told in (
        (file, "not UTF-8"),
        (tmp_path, "is a folder"),
        (file / "params.yaml", "no such file"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {told}"):
            load_params(path)


def test_a_section_that_another_is_merged_into_may_say_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(
        "ingest:\n  files:\n    mapping:\n      user_id: &id {column: a, timezone: UTC}\n"
        "      item_id: &other {<<: *id, column: b}\n      session_id: {<<: *other, column: c}\n"
    )
    mapping = load_params(file).ingest.files.mapping
    columns = {name: origin and origin.column for name, origin in mapping.items()}
    assert columns == {"user_id": "a", "item_id": "b", "session_id": "c"}
