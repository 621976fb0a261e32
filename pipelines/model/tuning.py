"""Search for settings of the behaviour model: Optuna, pruned and resumable; trials in MLflow.

A trial pretrains as stage ``pretrain`` does, fits the model on the windows before the calibration
cut and is judged by the mean log loss of all binary targets on that cut; the test cuts are never
looked at. Better are settings whose loss is surely lower, by the interval of the difference between
the same shoppers' losses; the best of many trials always looks better by some chance. Nothing
pretrained is kept for other trials: dropout and weight decay, which every trial
draws anew, bear on it as well as the shape of the network does. Pruning compares
the hazard loss of an epoch with other trials' at the same epoch (median rule, Golovin et al.,
KDD 2017): cuts are drawn anew each epoch, so that it is close to a held-out loss.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import stats

from pipelines.config import MAX_EPOCHS, Pretrain, Train
from pipelines.errors import UserError
from pipelines.features.store import Sequences
from pipelines.model.heads import Target
from pipelines.model.schedule import Periods, Schedule
from pipelines.model.timeline import ANY_EVENT, DAY, Timeline, population
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import TrainedModel, pretrain_model, train_model

if TYPE_CHECKING:
    import optuna

_FLOOR: Final = 1e-6
# Trials before pruning and before the sampler stops drawing at random.
_WARM_UP: Final = 4
# Weight decay that is tried where there is none.
_DECAY: Final = 0.1
_MULTIPLE: Final = 8  # of which a width is one
# Parts of the shoppers whose mean losses are kept with a trial.
_PARTS: Final = 100
_LOSSES: Final = "losses"
SEARCHED: Final = (
    "learning_rate",
    "weight_decay",
    "dropout",
    "width",
    "layers",
    "next_event_weight",
    "epochs",
)


@dataclass(frozen=True, kw_only=True)
class Found:
    """The end of a search.

    Attributes:
        best: the settings that did best, by name.
        loss: their mean log loss on the calibration cut.
        current: the loss of the settings that stood in params.yaml.
        gain: the least and the most that the loss falls by, an interval of the paired difference,
            wider the more trials the best was picked from.
        trials: finished, pruned ones included.
    """

    best: dict[str, Any]
    loss: float
    current: float
    gain: tuple[float, float]
    trials: int

    @property
    def is_better(self) -> bool:
        """Are the best settings surely better than those that stood there?"""
        return self.gain[0] > 0


def suggest(trial: optuna.Trial, config: Train, schedule: Schedule) -> dict[str, Any]:
    """Draw settings of the train section around those that stand there, within its bounds."""
    rate, decay = schedule.learning_rate, config.weight_decay
    low, high = (decay / 10, 5 * decay) if decay else (0.0, _DECAY)
    weights = sorted({0.0, 0.1, 0.2, 0.5, config.next_event_weight})
    layers = min(config.layers + 1, _find_most("layers"))
    epochs = min(schedule.epochs + 2, MAX_EPOCHS)
    return {
        "learning_rate": trial.suggest_float("learning_rate", rate / 4, min(1, 3 * rate), log=True),
        "weight_decay": trial.suggest_float("weight_decay", low, high, log=bool(decay)),
        "dropout": trial.suggest_float("dropout", 0.0, max(0.3, config.dropout)),
        "width": trial.suggest_categorical("width", _list_widths(config)),
        "layers": trial.suggest_int("layers", 1, layers),
        "next_event_weight": trial.suggest_categorical("next_event_weight", weights),
        "epochs": trial.suggest_int("epochs", max(1, schedule.epochs // 2), epochs),
    }


def _list_widths(config: Train) -> list[int]:
    """Return the width, half of it and twice it, as far as the heads and the bounds allow."""
    step = math.lcm(_MULTIPLE, 2 * config.heads)
    half, double = max(step, config.width // 2 // step * step), 2 * config.width
    return sorted({half, config.width, double if double <= _find_most("width") else config.width})


def _find_most(name: str) -> int:
    """Return the upper bound of a whole number in the train section."""
    return int(next(m.le for m in Train.model_fields[name].metadata if hasattr(m, "le")))


def search(
    sequences: Sequences,
    periods: Periods,
    targets: tuple[Target, ...],
    config: Train,
    pretrain: Pretrain,
    vocabulary: Vocabulary,
    study: optuna.Study,
    *,
    trials: int,
    confidence: float,
    on_trial: Callable[[int, Mapping[str, Any], float | None], None] = lambda *_: None,
) -> Found:
    """Run trials until the study holds so many, first of all the settings as they are.

    Those are tried again where an earlier call was interrupted before they were done.

    Args:
        sequences, periods, targets, vocabulary: as for training.
        config: settings as they are; what is not searched for stays.
        pretrain: how long and how fast every trial pretrains.
        study: holds the trials of earlier calls; minimises.
        trials: wanted in all.
        confidence: of the interval of the gain.
        on_trial: called with number, settings and loss (None = pruned) of each finished trial.

    Raises:
        UserError: there is no binary target.
    """
    import optuna

    if not any(target.kind == "binary" for target in targets):
        raise UserError("tune: there is no binary target to judge by")
    timeline = Timeline(sequences)
    schedule = Schedule.of(config, timeline, periods.calibration)
    now = {name: getattr(config, name) for name in SEARCHED} | {
        "learning_rate": schedule.learning_rate,
        "epochs": schedule.epochs,
    }

    def judge(trial: optuna.Trial) -> float:
        changes = suggest(trial, config, schedule)
        # Trees would hide what the network's settings are worth.
        trees = config.trees.model_copy(update={"rounds": 0})
        settings = config.model_copy(update={**changes, "refit_epochs": 0, "trees": trees})

        def note(epoch: dict[str, float]) -> None:
            trial.report(epoch["hazard_loss"], int(epoch["epoch"]))
            # What all others are compared with is finished in any case.
            if changes != now and trial.should_prune():
                raise optuna.TrialPruned

        given = (sequences, periods, targets, settings)
        weights = pretrain_model(*given, pretrain, vocabulary)
        try:
            trained = train_model(*given, vocabulary, note, pretrained=weights)
        except optuna.TrialPruned:
            on_trial(trial.number, changes, None)
            raise
        losses = calibration_losses(trained, timeline, periods)
        trial.set_user_attr(_LOSSES, average_parts(losses))
        loss = float(losses.mean())
        on_trial(trial.number, changes, loss)
        return loss

    left = trials - _count_finished(study)
    if _find_trial(study, now) is None:
        left = max(left, 1)
        if not _is_waiting(study, now):
            study.enqueue_trial(now)
    if left > 0:
        study.optimize(judge, n_trials=left)
    current, best = _find_trial(study, now), study.best_trial
    if current is None or current.value is None:
        raise RuntimeError("the trial of the settings as they are is not in the study")
    return Found(
        best=dict(best.params),
        loss=float(study.best_value),
        current=current.value,
        gain=compare_parts(
            current.user_attrs[_LOSSES],
            best.user_attrs[_LOSSES],
            # The best of many looks better by some chance: all their intervals hold at once
            # (Bonferroni; Dunn, Journal of the American Statistical Association 56, 1961).
            1 - (1 - confidence) / max(1, _count_finished(study, pruned=False) - 1),
        ),
        trials=_count_finished(study),
    )


def _count_finished(study: optuna.Study, *, pruned: bool = True) -> int:
    """Return how many trials are done, those included that were pruned, or not."""
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, *([TrialState.PRUNED] if pruned else []))
    return len(study.get_trials(deepcopy=False, states=states))


def _find_trial(
    study: optuna.Study, settings: Mapping[str, Any]
) -> optuna.trial.FrozenTrial | None:
    """Return the trial of these settings; None while none is done."""
    from optuna.trial import TrialState

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return next((trial for trial in done if trial.params == settings), None)


def _is_waiting(study: optuna.Study, settings: Mapping[str, Any]) -> bool:
    """Return whether a trial of these settings is to come next anyhow."""
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return any(trial.system_attrs.get("fixed_params") == settings for trial in waiting)


def make_study(storage: str, name: str, seed: int) -> optuna.Study:
    """Open a study, or go on with it.

    Args:
        storage: SQLAlchemy URL.
        name: of the study; equal for equal data and settings.
        seed: of the sampler; with as many trials as there are it draws other settings.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_WARM_UP, n_warmup_steps=1),
    )
    # The seed alone would draw again what an earlier call has drawn.
    seed += len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=_WARM_UP)
    return study


def calibration_losses(
    trained: TrainedModel, timeline: Timeline, periods: Periods
) -> NDArray[np.float64]:
    """Return every shopper's log loss at the calibration cut, raw predictions.

    Returns:
        Per shopper the mean of the binary targets whose windows had closed.
    """
    predictor = trained.first
    heads = predictor.spec.heads
    cuts = population(timeline, periods.calibration, periods.active_days)
    raw = predictor.raw(timeline, cuts)
    labels = timeline.labels(cuts, events=heads.events, horizons=(), close=periods.test)
    losses = []
    for target in predictor.targets:
        if target.kind != "binary":
            continue
        if (periods.test - periods.calibration) < target.horizon_days * DAY:
            continue
        name = heads.events.index(target.event or ANY_EVENT)
        stays = raw.survival[:, name, heads.grid.index(target.horizon_days)]
        happened = labels.delay[:, name] < target.horizon_days
        chance = np.clip(np.where(happened, 1.0 - stays, stays), _FLOOR, 1.0)
        losses.append(-np.log(chance))
    return np.asarray(np.mean(losses, axis=0), dtype=np.float64)


def average_parts(losses: NDArray[np.float64]) -> list[float]:
    """Return mean losses of parts of the shoppers, alike in size: what a study can keep of each.

    Args:
        losses: per shopper, always in the same order.
    """
    part = np.arange(len(losses)) % _PARTS
    return [float(total) for total in np.bincount(part, losses) / np.bincount(part)]


def compare_parts(
    before: Sequence[float], after: Sequence[float], confidence: float
) -> tuple[float, float]:
    """Return an interval of how much the mean loss falls, by Student's t over the parts.

    Args:
        before, after: of ``average_parts`` for the same shoppers.
        confidence: of the interval.

    Returns:
        Its bounds; with less than two parts there is no telling, and they are infinite.
    """
    falls = np.asarray(before) - np.asarray(after)
    if len(falls) < 2:
        return -math.inf, math.inf
    error = float(np.std(falls, ddof=1)) / math.sqrt(len(falls))
    margin = float(stats.t.ppf((1 + confidence) / 2, len(falls) - 1)) * error
    return float(falls.mean()) - margin, float(falls.mean()) + margin


def write_settings(text: str, section: str, settings: Mapping[str, Any]) -> str:
    """Change values of one section of a YAML text; comments and the rest stay.

    What is left to its default, a value, a line or the whole section, is put in.

    Raises:
        UserError: the section is written in a way that cannot be changed line by line.
    """
    shown = {name: _format_value(value) for name, value in settings.items()}
    before = yaml.safe_load(text) or {}
    given = {name: yaml.safe_load(value) for name, value in shown.items()}
    after = before | {section: (before.get(section) or {}) | given}
    # The lines tell less than YAML knows: values may stand on several, and keys in quotes.
    with suppress(yaml.YAMLError, LookupError):
        changed = _replace_lines(text, section, shown, before)
        if yaml.safe_load(changed) == after:
            return changed
    raise UserError(
        f"params.yaml: write each setting of {section} on a line of its own, so that they can be "
        f"changed: {', '.join(settings)}"
    )


def _replace_lines(
    text: str, section: str, shown: Mapping[str, str], before: Mapping[str, Any]
) -> str:
    """Change or add lines of a section.

    Raises:
        LookupError: a setting is there, as YAML says, but on no line that looks like it.
    """
    head = re.search(rf"^{re.escape(section)}:(?:[ ]+(?:null|~))?(.*)$", text, re.MULTILINE)
    if head is None:
        if section in before:
            raise LookupError(section)
        lines = [f"{section}:", *(f"  {name}: {value}" for name, value in shown.items())]
        return "\n".join([*text.splitlines(), *lines, ""])
    end = re.compile(r"^[^\s#]", re.MULTILINE).search(text, head.end())
    stop = end.start() if end else len(text)
    body = text[head.end() : stop] or "\n"
    first = re.search(r"^([ ]+)[^\s#]", body, re.MULTILINE)
    indent = first[1] if first else "  "
    added = ""
    for name, value in shown.items():
        # A line that has no value may have a comment behind it.
        pattern = rf"^({indent}{re.escape(name)}:)(?:([ ]+)[^\s#]\S*)?(?=\s|$)"
        line = re.search(pattern, body, re.MULTILINE)
        if line is not None:
            changed = f"{line[1]}{line[2] or ' '}{value}"
            body = body[: line.start()] + changed + body[line.end() :]
        elif name in (before.get(section) or ()):
            raise LookupError(name)
        else:
            added += f"\n{indent}{name}: {value}"
    return f"{text[: head.start()]}{section}:{head[1]}{added}{body}{text[stop:]}"


def _format_value(value: Any) -> str:
    """Return a number as YAML reads it: 1e-05 without a point would be a text."""
    rounded = float(f"{value:.6g}") if isinstance(value, float) else value
    return yaml.safe_dump(rounded).splitlines()[0]
