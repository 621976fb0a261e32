"""The `forecart` command: one subcommand per DVC stage, and the acts outside the graph.

Every subcommand says what it did, where the result is and what to do next. A mistake in the
input gets one line on standard error and exit code 2.
"""

from __future__ import annotations

import errno
import faulthandler
import os
import sys
import time
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from pipelines.config import PARAMS_FILE, Builder, Which, load_params
from pipelines.errors import UserError

# Tools that report home are told not to before any of them is imported.
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "BENTOML_DO_NOT_TRACK": "True",
    "GX_ANALYTICS_ENABLED": "false",
    "AIRFLOW__USAGE_DATA_COLLECTION__ENABLED": "false",
}

# MLflow draws its bar over three small files also where there is no terminal.
QUIET = {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}

# OpenMP threads that spin while they wait starve the other processes of the machine, and threads
# that sleep at once wake up too late. On two cores, events/s of training alone and beside one busy
# process: 33 k, 33 k without spinning; 52 k, 24 k with 3,000 turns; 61 k, 14 k with 30,000.
THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}

STAGES = {
    "fingerprint": "Take the content hash of the event source.",
    "ingest": "Read events from the source into day partitions.",
    "validate": "Check the events with Great Expectations.",
    "features": "Build sequences, snapshot features and labels.",
    "pretrain": "Teach the network to tell the next event and item, without labels.",
    "train": "Train, calibrate and refit the behaviour model.",
    "baselines": "Fit what the model must beat.",
    "evaluate": "Compare all models out of time; write the report.",
    "package": "Build the Bento, check and measure it.",
    "gate": "Decide whether the candidate may become champion.",
}

# Several processes may share these.
SHARED = ("pretrain", "train")

app = typer.Typer(
    name="forecart",
    help="Predicts for every shopper whether they will buy, search, spend or leave.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ParamsOption = Annotated[
    Path, typer.Option("--params", help="The settings file.", show_default=True)
]


def _add_stage(name: str, text: str) -> None:
    def command(params: ParamsOption = PARAMS_FILE) -> None:
        started = time.perf_counter()
        settings = load_params(params)
        if name in SHARED and _launch(name, params, settings.train.processes):
            return
        message = import_module(f"pipelines.stages.{name}").run(settings)
        if message:
            typer.echo(f"{name}: {message} ({time.perf_counter() - started:.1f} s)")

    app.command(name=name, help=text)(command)


def _launch(name: str, params: Path, count: int) -> bool:
    """Run a stage in so many processes; False where this is one of them, or is to be the only one.

    Raises:
        typer.Exit: they failed, and have said why.
    """
    if count == 1:
        return False
    from pipelines.model.peers import is_launched, launch

    if is_launched():
        return False
    command = [sys.executable, "-P", "-m", "pipelines.cli", name, "--params", str(params)]
    if code := launch(command, count):
        raise typer.Exit(code)
    return True


for _name, _text in STAGES.items():
    _add_stage(_name, _text)


@app.command()
def run() -> None:
    """Bring everything up to date; stages that don't wait for each other run side by side."""
    from pipelines.runner import run as act

    act(Path())


@app.command()
def summary() -> None:
    """Show the comparison table, the verdict and the next command."""
    from pipelines.evaluation.summary import format_summary, tell_next
    from pipelines.io import read_json
    from pipelines.registry.champion import read_champion
    from pipelines.registry.verdict import VERDICT, read_verdict

    reports = Path("reports")
    verdict = read_verdict(VERDICT)
    file = reports / "evaluation.json"
    evaluation = read_json(file)
    try:
        text = format_summary(evaluation, verdict)
    except (AttributeError, LookupError, TypeError, ValueError):
        # Anybody can edit the file.
        told = "not as the stage evaluate wrote it; run: dvc repro"
        raise UserError(f"{file}: {told}") from None
    typer.echo(text)
    typer.echo(f"\nReport: {(reports / 'index.html').resolve()}")
    typer.echo(f"Next:   {tell_next(verdict, read_champion(Path()).digest)}")


@app.command()
def tune(
    params: ParamsOption = PARAMS_FILE,
    trials: Annotated[int, typer.Option(help="Trials in all, earlier ones included.", min=1)] = 20,
    write: Annotated[bool, typer.Option(help="Write the best settings to the file.")] = True,
) -> None:
    """Search for better settings of the behaviour model; can be interrupted and gone on with."""
    from pipelines.tuning import tune as act

    typer.echo(act(load_params(params), params, Path(), trials=trials, write=write))


@app.command()
def backtest(
    folds: Annotated[int, typer.Option(help="Past days to evaluate at.", min=1, max=52)] = 4,
    step_days: Annotated[int, typer.Option(help="Days between them.", min=1, max=365)] = 14,
) -> None:
    """Train and evaluate as if today were an earlier day, many times (rolling origin)."""
    from pipelines import backtest as act
    from pipelines.io import say_count

    home = Path().resolve()
    days = act.list_folds(home, folds=folds, step_days=step_days)
    result = act.run_folds(home, days)
    typer.echo(f"{act.format_result(result)}\n\n{say_count(len(days), 'fold')} in {act.RESULT}")


RunOption = Annotated[str, typer.Option("--run", help="Any name of the run.")]
RemoteOption = Annotated[str, typer.Option(help="The git remote that the machines share.")]


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="A stage of dvc.yaml.")],
    run: RunOption,
    remote: RemoteOption = "origin",
    force: Annotated[bool, typer.Option(help="Also when DVC knows the result.")] = False,
) -> None:
    """Run one stage of a run that several machines share, over a git and a DVC remote."""
    from pipelines import relay

    home = Path().resolve()
    relay.start(home, run, {}, remote, name)
    typer.echo(relay.run_stage(home, run, name, remote, force=force))


@app.command()
def conclude(run: RunOption, remote: RemoteOption = "origin") -> None:
    """Publish the branch of a run that several machines share, once all its stages are done."""
    from pipelines import relay

    typer.echo(f"{relay.conclude(Path().resolve(), run, remote)} is on {remote}")


@app.command()
def register() -> None:
    """Put the trained model into the MLflow registry as candidate."""
    from pipelines.registry.promotion import register as act

    typer.echo(act(Path()))


@app.command()
def promote() -> None:
    """Make the registered candidate champion, if its verdict allows it."""
    from pipelines.registry.promotion import promote as act

    typer.echo(act(Path()))


@app.command()
def rollback() -> None:
    """Return to the previous champion."""
    from pipelines.registry.promotion import rollback as act

    typer.echo(act(Path()))


@app.command()
def status() -> None:
    """Show candidate, champion and history."""
    from pipelines.registry.promotion import status as act

    typer.echo(act(Path()))


ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Version or beginning of a digest; the champion where none is named."),
]


@app.command()
def lineage(model: ModelArgument = None) -> None:
    """Show where a model comes from: data, code, run, verdict, Bento, by their digests."""
    from pipelines.registry.lineage import show

    typer.echo(show(Path(), model))


@app.command()
def verify(model: ModelArgument = None) -> None:
    """Compute a model's chain of digests again and compare."""
    from pipelines.registry.lineage import verify as act

    typer.echo(act(Path(), model))


@app.command()
def score(
    model: Annotated[
        Which, typer.Option(help="auto: the champion where there is one, else the candidate.")
    ] = Which.AUTO,
    at: Annotated[
        str | None, typer.Option(help="UTC time; events from then on are not looked at.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write one CSV file.")] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Also write a vector that describes each history.")
    ] = False,
) -> None:
    """Predict every shopper as of one time, by default the data's end or now; can be resumed."""
    from pipelines.scoring import score as act

    when = _parse_time("--at", at)
    typer.echo(act(Path(), which=model, at=when, csv=csv, embeddings=embeddings))


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="The address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to bind.", min=1, max=65535)] = 3000,
) -> None:
    """Serve the champion's predictions over HTTP until interrupted."""
    from pipelines.registry.champion import CHAMPION_FILE, fetch_champion
    from serving.run import serve as act

    champion = fetch_champion(Path())
    if champion is None:
        raise UserError(
            "there is no champion to serve; run: forecart promote, or forecart status where it was "
            "promoted elsewhere"
        )
    # What is promoted next is taken without a restart.
    os.environ.setdefault("FORECART_CHAMPION", str(CHAMPION_FILE))
    act(champion, host=host, port=port)


@app.command()
def pages(
    host: Annotated[str, typer.Option(help="The address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to bind.", min=1, max=65535)] = 3001,
) -> None:
    """Show shoppers, audiences and the model on pages for people until interrupted."""
    from serving.pages.app import show
    from serving.run import check_address

    check_address(host, port)
    typer.echo(f"http://{host}:{port}  (ends with Ctrl-C)")
    show(Path(), host=host, port=port)


@app.command()
def containerize(
    tag: Annotated[str, typer.Option(help="Name of the image.")] = "forecart:latest",
    base_image: Annotated[
        str, typer.Option(help="A Linux with Python as python3.")
    ] = f"python:{sys.version_info.major}.{sys.version_info.minor}-slim",
    builder: Annotated[Builder, typer.Option(help="What builds the image.")] = Builder.AUTO,
    torch_index: Annotated[
        str, typer.Option(help="Index of PyTorch's CPU builds; empty: pip's own indexes.")
    ] = "https://download.pytorch.org/whl/cpu",
) -> None:
    """Build a lean image of the packaged service with docker, podman or buildah."""
    from pipelines.container import containerize as act

    done = act(Path(), tag=tag, base_image=base_image, builder=builder, torch_index=torch_index)
    typer.echo(done)


@app.command()
def up() -> None:
    """Start Airflow, the MLflow pages and the service, and wait until they are healthy."""
    from pipelines.platform import start

    typer.echo(start(Path()))


@app.command()
def down() -> None:
    """Stop what `forecart up` started."""
    from pipelines.platform import stop

    typer.echo(stop(Path()))


def _parse_time(option: str, text: str | None) -> datetime | None:
    """Read an ISO time; without an offset it is UTC."""
    if text is None:
        return None
    try:
        time_ = datetime.fromisoformat(text)
    except ValueError:
        raise UserError(f"{option} {text}: not a time such as 2025-06-30T00:00:00Z") from None
    return time_ if time_.tzinfo else time_.replace(tzinfo=UTC)


def main() -> None:
    """Run the command line; mistakes of the user end with one line and exit code 2."""
    for name, value in (TELEMETRY_OFF | THREADS | QUIET).items():
        os.environ.setdefault(name, value)
    # A crash in compiled code, of ours or of a library, says which call it was.
    if sys.__stderr__ is not None:
        faulthandler.enable(sys.__stderr__)
    try:
        app()
    except UserError as error:
        print(f"forecart: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("forecart: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        told = _tell_machine(error)
        if told is None:
            raise
        print(f"forecart: {told}", file=sys.stderr)
        sys.exit(2)


def _tell_machine(error: Exception) -> str | None:
    """Tell in one line what is the machine's state and not a defect to trace, else None.

    That is a missing library, a full disk or memory, a missing permission, or what ails MLflow.
    """
    # What pip installs may want a library of the system, which a new machine lacks.
    if (
        isinstance(error, OSError)
        and error.errno is None
        and "cannot open shared object file" in str(error)
    ):
        openmp = "; LightGBM needs it (Debian: apt-get install libgomp1)"
        return f"{error}{openmp if str(error).startswith('libgomp') else ''}"
    full_or_closed = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
    if isinstance(error, OSError) and error.errno in full_or_closed:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    # DuckDB's own, by name: what never imported it need not begin.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryException":
        return f"out of memory: {(str(error) or 'the machine has no more').splitlines()[0]}"
    # Importing it takes seconds; without it, it is none of its errors.
    if "mlflow.exceptions" not in sys.modules:
        return None
    from pipelines.registry.connection import explain

    return explain(error, Path())


if __name__ == "__main__":
    main()
