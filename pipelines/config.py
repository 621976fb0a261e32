"""params.yaml, typed and validated, with errors that name the key.

The models below are the only list of settings; a key that is not a field is refused, so
that a misspelt setting cannot silently keep its default.
"""

from __future__ import annotations

import codecs
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self
from urllib.parse import urlsplit

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pipelines.errors import UserError
from pipelines.events import EVENT_SCHEMA, ITEM_SCHEMA, USER_SCHEMA, EventType

PARAMS_FILE = Path("params.yaml")

# So many characters of a wrong value are shown.
_SHOWN: Final = 40

# In a parameter of a REST API, stands for ingest.until.
UNTIL: Final = "{until}"

# What a probability from which on a positive is called is chosen by.
Objective = Literal["f1", "youden", "break_even"]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent coercion of text."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class Simulator(Section):
    """The simulated shop (pipelines.sources.simulator)."""

    users: Annotated[int, Field(gt=0, le=5_000_000)] = 9_000
    days: Annotated[int, Field(ge=1, le=3650)] = 180
    seed: Annotated[int, Field(ge=0)] = 7
    start: str = "2025-01-01"

    @field_validator("start")
    @classmethod
    def _check_start(cls, value: str) -> str:
        datetime.strptime(value, "%Y-%m-%d").replace(tzinfo=UTC)
        return value


class ColumnMapping(Section):
    """Where one event column comes from: a source column, or one value for all rows."""

    column: str | None = None
    value: str | float | None = None
    # Source value -> event value. For event_type it is the complete list, and null leaves
    # events of that type out on purpose; elsewhere a value not listed stays as it is, and null
    # empties it.
    values: dict[str, str | None] | None = None
    format: str | None = None  # strptime format of text timestamps; null = ISO 8601
    unit: Literal["s", "ms", "us"] | None = None  # of epoch numbers
    timezone: str = "UTC"  # of timestamps that carry none
    only: tuple[EventType, ...] | None = None  # filled for these event types alone; null = all

    @field_validator("values", mode="before")
    @classmethod
    def _name_numbers(cls, value: Any) -> Any:
        # YAML reads the key of `4: purchase` as a number; sources often code types so.
        return {str(k): v for k, v in value.items()} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _check_one_origin(self) -> ColumnMapping:
        if (self.column is None) == (self.value is None):
            raise ValueError("give either column or value")
        if self.format is not None and self.unit is not None:
            raise ValueError("give either format (text) or unit (epoch numbers)")
        return self


class FileFormat(StrEnum):
    """File formats that the files source reads."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


_MAPPED_SCHEMAS: Final = {
    "mapping": EVENT_SCHEMA,
    "users_mapping": USER_SCHEMA,
    "items_mapping": ITEM_SCHEMA,
}


class Mapped(Section):
    """A source whose columns have names of their own."""

    # Column of the schema -> origin; null leaves it empty. Others come from the column of their
    # name.
    mapping: dict[str, ColumnMapping | None] = {}
    users_mapping: dict[str, ColumnMapping | None] = {}
    items_mapping: dict[str, ColumnMapping | None] = {}

    @field_validator("mapping", "users_mapping", "items_mapping", mode="before")
    @classmethod
    def _expand_short_form(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: {"column": v} if isinstance(v, str) else v for k, v in value.items()}

    @field_validator("mapping", "users_mapping", "items_mapping")
    @classmethod
    def _check_targets(
        cls, value: dict[str, ColumnMapping | None], info: ValidationInfo
    ) -> dict[str, ColumnMapping | None]:
        schema = _MAPPED_SCHEMAS[str(info.field_name)]
        for column, mapping in value.items():
            if column not in schema.names:
                raise ValueError(f"no such column: {column}; there are {', '.join(schema.names)}")
            needed = column != "event_id" and not schema.field(column).nullable
            if needed and (mapping is None or mapping.only is not None):
                raise ValueError(f"{column} is needed by every row: neither null nor `only`")
            if mapping is not None and mapping.only is not None and schema is not EVENT_SCHEMA:
                raise ValueError(f"{column}: `only` is for events")
            if mapping is not None and column == "event_type":
                _check_event_types(mapping)
        return value


class Files(Mapped):
    """Events from files: path, folder, glob or fsspec URL."""

    path: str | None = None
    format: FileFormat | None = None
    users: str | None = None  # optional table in the users schema, same formats
    items: str | None = None  # optional table in the items schema
    encoding: str = "utf-8"  # of CSV and JSON Lines
    # Of numbers in CSV; with a comma, dots may group the digits before it by three.
    decimal: Literal[".", ","] = "."
    # False: quotation marks in CSV are text, and every separator separates.
    quoted: bool = True
    # False: a line that repeats another one in every event column is dropped as a duplicate.
    keep_repeats: bool = False

    @field_validator("encoding")
    @classmethod
    def _check_encoding(cls, value: str) -> str:
        try:
            "".encode(value)
        except LookupError:
            raise ValueError("no such encoding; utf-8, cp1252 and utf-16 are some") from None
        return codecs.lookup(value).name


def _check_event_types(mapping: ColumnMapping) -> None:
    given = [*(mapping.values or {}).values(), mapping.value]
    unknown = [v for v in given if v is not None and v not in set(EventType)]
    if unknown:
        raise ValueError(f"no event type {unknown[0]!r}; there are {', '.join(EventType)}")


class Database(Mapped):
    """Events from an SQL database (SQLAlchemy URL)."""

    # null: the variable FORECART_STORE, which is the place for addresses with a password.
    url: str | None = None
    events: str = "events"  # tables, perhaps with their schema before a dot
    users: str | None = None
    items: str | None = None


class Paging(StrEnum):
    """How an answer of a REST API leads to the next one."""

    LINK = "link"  # header Link: <...>; rel="next"
    URL = "url"  # address in the answer
    CURSOR = "cursor"  # value in the answer, sent back as a parameter
    PAGE = "page"  # number that goes up by one
    OFFSET = "offset"  # number of records before


class Pages(Section):
    """How the next page of a REST API is found."""

    by: Paging | None = None  # null: there is one page
    path: str | None = None  # dotted, of the next address or cursor in the answer
    parameter: str | None = None  # of the query, that takes the cursor or number
    first: Annotated[int, Field(ge=0)] | None = None  # number to begin with; null = 1, of offset 0

    @model_validator(mode="after")
    def _check_parts(self) -> Pages:
        needed = {
            Paging.URL: ("path",),
            Paging.CURSOR: ("path", "parameter"),
            Paging.PAGE: ("parameter",),
            Paging.OFFSET: ("parameter",),
        }
        numbered = self.by in (Paging.PAGE, Paging.OFFSET)
        for name in ("path", "parameter", "first"):
            wanted = self.by is not None and name in needed.get(self.by, ())
            given = getattr(self, name) not in (None, "")
            if wanted and not given:
                raise ValueError(f"by: {self.by} needs {name}")
            if given and not wanted and not (name == "first" and numbered):
                raise ValueError(f"by: {self.by or 'null'} has no use for {name}")
        return self


class Endpoint(Section):
    """One list of a REST API."""

    url: str | None = None
    # Dotted path of the list in an answer; null: the answer, or the only list at its top.
    records: str | None = None
    query: dict[str, str] = {}  # parameters of every first request
    pages: Pages | None = None  # null: of users and items those of the events, else one page

    @field_validator("query", mode="before")
    @classmethod
    def _write_values(cls, value: Any) -> Any:
        return {k: _write_value(v) for k, v in value.items()} if isinstance(value, dict) else value

    # After: the error does not show the address, which may hold a password.
    @model_validator(mode="after")
    def _check_url(self) -> Self:
        if self.url is not None:
            try:
                parts = urlsplit(self.url)
                valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:
                valid = False
            if not valid or not self.url.isprintable() or set(" \\") & set(self.url):
                raise ValueError("url: expected an address, such as https://shop.example/orders")
            if parts.username is not None:
                raise ValueError("url: a login goes into the variable FORECART_REST_HEADER")
        return self


def _write_value(value: Any) -> Any:
    """Return a number, date or truth of YAML as it stands in a query."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, date):
        return value.isoformat()
    return str(value) if isinstance(value, int | float) else value


class Rest(Endpoint, Mapped):
    """Events from a REST API that answers in JSON."""

    # Dotted path of a list in a record, each of whose entries makes a row; null: a record is one.
    each: str | None = None
    users: Endpoint | None = None
    items: Endpoint | None = None

    @field_validator("users", "items", mode="before")
    @classmethod
    def _expand_address(cls, value: Any) -> Any:
        return {"url": value} if isinstance(value, str) else value

    @property
    def names_until(self) -> bool:
        """Whether a query asks for what is before ``ingest.until``."""
        queries = (e.query for e in (self, self.users, self.items) if e is not None)
        return any(UNTIL in value for query in queries for value in query.values())

    @model_validator(mode="after")
    def _check_hosts(self) -> Rest:
        for name in ("users", "items"):
            endpoint: Endpoint | None = getattr(self, name)
            if endpoint is None:
                continue
            if endpoint.url is None:
                raise ValueError(f"{name} needs a url")
            # The header with the login goes to both.
            if urlsplit(endpoint.url)[:2] != urlsplit(self.url or endpoint.url)[:2]:
                raise ValueError(f"{name}: url is on another host than that of the events")
        return self


class Builder(StrEnum):
    """A program that builds images."""

    AUTO = "auto"
    DOCKER = "docker"
    PODMAN = "podman"
    BUILDAH = "buildah"


class Which(StrEnum):
    """The model that scores."""

    AUTO = "auto"  # the champion where there is one, else the candidate
    CHAMPION = "champion"
    CANDIDATE = "candidate"


class Source(StrEnum):
    """Where events come from."""

    SIMULATOR = "simulator"
    FILES = "files"
    DATABASE = "database"
    REST = "rest"


class Ingest(Section):
    """The ingest stage."""

    source: Source = Source.SIMULATOR
    until: datetime | None = None
    max_quarantine_share: Share = 0.05
    simulator: Simulator = Simulator()
    files: Files = Files()
    database: Database = Database()
    rest: Rest = Rest()

    @field_validator("until")
    @classmethod
    def _default_to_utc(cls, value: datetime | None) -> datetime | None:
        if value is None:
            return None
        try:
            return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
        except OverflowError:
            raise ValueError("in UTC this is before the first year or after the last") from None

    @model_validator(mode="after")
    def _check_path(self) -> Ingest:
        if self.source is Source.FILES and self.files.path is None:
            raise ValueError("source: files needs files.path")
        if self.source is Source.REST:
            if self.rest.url is None:
                raise ValueError("source: rest needs rest.url")
            if self.until is None and self.rest.names_until:
                raise ValueError("rest.query names {until}: set ingest.until")
        return self


class ValidateEngine(StrEnum):
    """What Great Expectations checks the events with."""

    PANDAS = "pandas"
    SPARK = "spark"


class Validate(Section):
    """The validate stage."""

    engine: ValidateEngine = ValidateEngine.PANDAS
    max_row_failure_share: Share = 0.02
    max_staleness_days: Annotated[float, Field(gt=0)] | None = None
    volume_sigmas: Annotated[float, Field(gt=0)] = 6.0


class Population(Section):
    """Who is predicted at a cut."""

    active_within_days: Annotated[float, Field(gt=0)] | None = 28


class TargetsConfig(Section):
    """What is predicted, and how far ahead."""

    horizons_days: Annotated[list[Positive], Field(min_length=1, max_length=8)] = [7, 14, 28]
    primary_horizon_days: Positive = 14
    events: Annotated[list[EventType], Field(min_length=1)] = [EventType.PURCHASE, EventType.SEARCH]
    churn: bool = True
    spend: bool = True

    @model_validator(mode="after")
    def _check_horizons(self) -> TargetsConfig:
        if sorted(set(self.horizons_days)) != self.horizons_days:
            raise ValueError("horizons_days must be ascending and without repeats")
        if self.primary_horizon_days not in self.horizons_days:
            raise ValueError("primary_horizon_days must be one of horizons_days")
        if len(set(self.events)) < len(self.events):
            raise ValueError("events must be without repeats")
        return self


class Cuts(Section):
    """Global cut times: train < calibration < test."""

    train: Positive = 12
    step_days: Positive = 7
    test: Positive = 1
    min_history_days: Annotated[int, Field(ge=0)] = 14


class Engine(StrEnum):
    """Which Ibis backend builds features."""

    DUCKDB = "duckdb"
    SPARK = "spark"


class Features(Section):
    """The features stage."""

    windows_days: Annotated[list[Positive], Field(min_length=1)] = [1, 3, 7, 14, 28, 90]
    max_vocabulary: Positive = 20_000
    max_shoppers: Annotated[int, Field(ge=100)] | None = 100_000
    engine: Engine = Engine.DUCKDB


class TreeSettings(Section):
    """Size and pace of LightGBM's trees."""

    learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.05
    num_leaves: Annotated[int, Field(ge=2)] = 31
    min_child_samples: Positive = 40


class EnsembleTrees(Section):
    """Trees that answer beside the network."""

    rounds: Annotated[int, Field(ge=0, le=10_000)] = 1000
    early_stopping: Positive = 20
    # None: pipelines.model.schedule.Schedule.
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    num_leaves: Annotated[int, Field(ge=2)] = 15
    min_child_samples: Positive = 40
    max_rows: Annotated[int, Field(ge=100)] = 200_000


MAX_EPOCHS: Final = 1000
Backbone = Literal["gpt", "bert", "lstm", "cnn", "mlp"]


class Train(Section):
    """The train stage."""

    backbone: Backbone = "gpt"
    compare: tuple[Backbone, ...] = ()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", True, False] = "auto"
    width: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 64
    layers: Annotated[int, Field(ge=1, le=64)] = 2
    heads: Annotated[int, Field(ge=1, le=64)] = 4
    context: Annotated[int, Field(ge=8, le=8192)] = 128
    stride: Positive = 96
    # None of these, of tokens_per_batch and learning_rate: pipelines.model.schedule.Schedule.
    epochs: Annotated[int, Field(ge=1, le=MAX_EPOCHS)] | None = None
    refit_epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 1
    cuts_per_user: Annotated[int, Field(ge=1, le=64)] = 16
    tokens_per_batch: Annotated[int, Field(ge=256)] | None = None
    accumulate: Annotated[int, Field(ge=1, le=1024)] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] | None = None
    refit_rate: Annotated[float, Field(gt=0, le=1)] = 0.3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    next_event_weight: Annotated[float, Field(ge=0)] = 0.2
    amount_weight: Annotated[float, Field(ge=0)] = 0.1
    fusion: bool = True
    members: Annotated[int, Field(ge=1, le=32)] = 1
    trees: EnsembleTrees = EnsembleTrees()
    item_buckets: Positive = 4096
    half_life_days: Annotated[float, Field(gt=0)] | None = 90.0
    next_items: Annotated[int, Field(ge=0)] = 5000
    item_weight: Annotated[float, Field(ge=0)] = 0.1
    query_buckets: Positive = 2048
    seed: Annotated[int, Field(ge=0)] = 1

    @model_validator(mode="after")
    def _check_heads(self) -> Train:
        if len({self.backbone, *self.compare}) <= len(self.compare):
            raise ValueError("compare must name other backbones than train.backbone, each once")
        if self.accumulate % self.processes:
            raise ValueError("accumulate must be a multiple of processes, which share its batches")
        if self.stride >= self.context:
            raise ValueError("stride must be below context")
        if self.width % (2 * self.heads):
            raise ValueError("width must be a multiple of 2 x heads (rotary pairs)")
        return self


class Pretrain(Section):
    """The pretrain stage; the network's settings are those of train."""

    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] = 1
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-3


class LightGBMConfig(TreeSettings):
    """Settings of the LightGBM baseline."""

    rounds: Positive = 400
    early_stopping: Positive = 30
    # Tried besides the setting above; the calibration cut chooses.
    search: tuple[TreeSettings, ...] = (
        TreeSettings(learning_rate=0.05, num_leaves=15, min_child_samples=80),
    )


class LstmConfig(Section):
    """Settings of the LSTM baseline."""

    # None: as many as the behaviour model; 0: no such baseline.
    epochs: Annotated[int, Field(ge=0, le=MAX_EPOCHS)] | None = None
    width: Annotated[int, Field(ge=8, le=4096, multiple_of=8)] = 64
    layers: Annotated[int, Field(ge=1, le=64)] = 1
    context: Annotated[int, Field(ge=8, le=8192)] = 128
    tokens_per_batch: Annotated[int, Field(ge=256)] | None = None  # None: as the behaviour model's
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 4e-3


class Baselines(Section):
    """The baselines stage."""

    seed: Annotated[int, Field(ge=0)] = 1
    lightgbm: LightGBMConfig = LightGBMConfig()
    lstm: LstmConfig = LstmConfig()


class Evaluation(Section):
    """The evaluate stage."""

    bootstrap_samples: Annotated[int, Field(ge=50, le=100_000)] = 500
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    threshold: Objective = "f1"
    conformal_level: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    seed: Annotated[int, Field(ge=0)] = 1


class Gate(Section):
    """The policy that a candidate must pass."""

    primary_target: str = "purchase_14d"
    primary_metric: Literal["roc_auc", "pr_auc", "log_loss", "brier"] = "roc_auc"
    margin: Annotated[float, Field(ge=0)] = 0.01
    max_ece: Share = 0.05
    min_users: Positive = 200
    min_positives: Positive = 20
    # Outside of these the data or the target is broken more likely than the shop is unusual.
    min_base_rate: Share = 0.001
    max_base_rate: Share = 0.99
    ece_tolerance: Share = 0.01
    slice_margin: Share = 0.02
    max_drifted_share: Share = 0.5
    max_latency_ms: Annotated[float, Field(gt=0)] = 200.0
    max_size_mb: Annotated[float, Field(gt=0)] = 100.0


class Package(Section):
    """The package stage."""

    # BentoML takes no longer one.
    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=63)] = "forecart"
    golden_users: Positive = 32


class Params(Section):
    """All of params.yaml."""

    ingest: Ingest = Ingest()
    validate_: Annotated[Validate, Field(alias="validate")] = Validate()
    population: Population = Population()
    targets: TargetsConfig = TargetsConfig()
    cuts: Cuts = Cuts()
    features: Features = Features()
    pretrain: Pretrain = Pretrain()
    train: Train = Train()
    baselines: Baselines = Baselines()
    evaluation: Evaluation = Evaluation()
    gate: Gate = Gate()
    package: Package = Package()


def parse_params(raw: Any, where: str = "params") -> Params:
    """Validate a parsed YAML document.

    Raises:
        UserError: naming the first offending key, its value and what is expected.
    """
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise UserError(f"{where}: expected a mapping of sections, found {type(raw).__name__}")
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_describe(e) for e in error.errors())) from None


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        return f"unknown key {key}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict | list):
        return f"{key}: {message}"
    return f"{key}: {message} (found {error['input']!r})"


class _MistakeError(yaml.MarkedYAMLError):
    """A mistake in valid YAML, with the words for it."""


class _Loader(yaml.SafeLoader):
    """Safe, and names the line of what YAML's own loader lets pass or ends with other errors."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Refuse a key that is given twice: of the first nothing would count."""
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name = (key.tag, key.value)
                if name in lines:
                    told = f"{key.value} is given a second time, first in line {lines[name]}"
                    raise _MistakeError(problem=told, problem_mark=key.start_mark)
                lines[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """Refuse a value that looks like a date or a number, and is none."""
        try:
            return super().construct_object(node, deep=deep)
        except (ArithmeticError, AttributeError, LookupError, ValueError):
            told = f"not a valid value (found {node.value[:_SHOWN]!r})"
            raise _MistakeError(problem=told, problem_mark=node.start_mark) from None


def read_settings(path: Path) -> Any:
    """Read a params file without a look at its keys and values.

    Args:
        path: a YAML file.

    Returns:
        Its content; None where it is empty.

    Raises:
        UserError: the file is missing, no YAML, or gives a key twice.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a safe one
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; run in the project's folder") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; name a file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deep") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        told = error.problem if isinstance(error, _MistakeError) else "not valid YAML"
        raise UserError(f"{path}{line}: {told}") from None


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate a params file.

    Args:
        path: a YAML file.

    Raises:
        UserError: the file is missing, is empty or no YAML, gives a key twice, or has a wrong key
            or value.
    """
    raw = read_settings(path)
    # Every default would hold: a run of the simulated shop that nobody asked for.
    if raw is None:
        raise UserError(f"{path}: it is empty; git checkout {path.name} brings it back")
    return parse_params(raw, str(path))
