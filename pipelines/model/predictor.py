"""The fitted model: predicts from event sequences, and is stored without pickle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from pipelines.errors import UserError
from pipelines.events import EventType
from pipelines.features.store import Sequences
from pipelines.io import read_json, write_json
from pipelines.model.ahead import in_order
from pipelines.model.batches import Collated, cut_pieces, iterate
from pipelines.model.calibration import Calibration, log_odds, sigmoid
from pipelines.model.committee import Committee, join
from pipelines.model.heads import Heads, Target, buyer_mean, survival
from pipelines.model.items import RECENT
from pipelines.model.network import (
    CALENDAR,
    Batch,
    Network,
    NetworkConfig,
    calendar_of,
    to_device,
)
from pipelines.model.timeline import ANY_EVENT, Cuts, Timeline, feature_names
from pipelines.model.tokens import Tokenizer, Vocabulary
from pipelines.model.trees import PREFIX, Mix, Trees

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
FORMAT: Final = 6

_TOKENS_PER_BATCH: Final = 32_768
_FLOOR: Final = 1e-12


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All of a fitted model but its weights.

    Attributes:
        network: sizes.
        vocabulary: codes and scales, from the past only.
        heads: what the outputs stand for.
        targets: columns predicted, in order.
        context: most events that a prediction reads.
        members: networks that answer together.
        mix: how much they are believed beside the trees.
        calibration: corrections.
        thresholds: for every binary target, from which probability on a positive is called.
        learnt_until: microseconds since the epoch; nothing later was seen. None = nobody knows.
    """

    network: NetworkConfig
    vocabulary: Vocabulary
    heads: Heads
    targets: tuple[Target, ...]
    context: int
    calibration: Calibration
    thresholds: dict[str, float]
    members: int = 1
    mix: Mix = field(default_factory=Mix)
    learnt_until: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {
            "format": FORMAT,
            "network": self.network.to_json(),
            "vocabulary": asdict(self.vocabulary),
            "heads": self.heads.to_json(),
            "targets": [asdict(target) for target in self.targets],
            "context": self.context,
            "members": self.members,
            "mix": self.mix.to_json(),
            "calibration": self.calibration.to_json(),
            "thresholds": self.thresholds,
            "learnt_until": self.learnt_until,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ModelSpec:
        """Build from ``to_json``'s value."""
        return cls(
            network=NetworkConfig.from_json(value["network"]),
            vocabulary=Vocabulary.from_json(value["vocabulary"]),
            heads=Heads.from_json(value["heads"]),
            targets=tuple(Target(**target) for target in value["targets"]),
            context=value["context"],
            members=value["members"],
            mix=Mix(**value["mix"]),
            calibration=Calibration(**value["calibration"]),
            thresholds=value["thresholds"],
            learnt_until=value.get("learnt_until"),
        )


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Uncalibrated predictions of M cuts.

    Attributes:
        survival: float64 (M, events, bins), P(no event until the interval's end).
        amount: float64 (M, amounts), a buyer's expected amount, by the network.
        spend: float64 (M, amounts), anybody's expected amount, by the trees; 0 without trees.
    """

    survival: NDArray[np.float64]
    amount: NDArray[np.float64]
    spend: NDArray[np.float64]

    def take(self, rows: NDArray[np.int64]) -> Raw:
        """Return those of some cuts."""
        return Raw(survival=self.survival[rows], amount=self.amount[rows], spend=self.spend[rows])


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What comes after M cuts.

    Attributes:
        raw: uncalibrated predictions.
        items: int64 (M, K), places in ``spec.vocabulary.item``, the most probable first; fewer
            columns than asked for where fewer items are known.
        chances: float32 (M, K), their probabilities.
        embedding: float32 (M, width x members), what the backbone makes of every history: shoppers
            who are alike to the model lie near each other, for look-alikes and clusters.
    """

    raw: Raw
    items: NDArray[np.int64]
    chances: NDArray[np.float32]
    embedding: NDArray[np.float32]


class Predictor:
    """Predicts every target of a fitted model."""

    def __init__(
        self, spec: ModelSpec, network: Network | Committee, trees: Trees | None = None
    ) -> None:
        self.spec = spec
        self.network = network.eval()
        self.trees = Trees.none(count_outputs(spec.heads)) if trees is None else trees
        self.tokenizer = Tokenizer(
            spec.vocabulary,
            item_buckets=spec.network.item_buckets,
            query_buckets=spec.network.query_buckets,
        )

    @property
    def networks(self) -> list[Network]:
        """The networks that answer together."""
        if isinstance(self.network, Committee):
            return [member for member in self.network.members if isinstance(member, Network)]
        return [self.network]

    @property
    def targets(self) -> tuple[Target, ...]:
        """What is predicted, in the order of ``predict``'s result."""
        return self.spec.targets

    @classmethod
    def load(
        cls, directory: Path, device: Literal["auto", "cpu", "cuda"] | torch.device = "cpu"
    ) -> Predictor:
        """Read what ``save`` wrote.

        Raises:
            UserError: a file is missing, damaged or of another format.
        """
        config = read_json(directory / CONFIG)
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            raise UserError(f"{directory / CONFIG}: not a model of format {FORMAT}; train again")
        try:
            spec = ModelSpec.from_json(config)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{directory / CONFIG}: not a model's settings ({error!r})") from None
        network: Network | Committee = Network(spec.network)
        if spec.members > 1:
            network = Committee([Network(spec.network) for _ in range(spec.members)])
        try:
            tensors = load_file(directory / WEIGHTS)
            grown = {name: tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
            network.load_state_dict(tensors)
        except (OSError, SafetensorError, RuntimeError) as error:
            line = str(error).splitlines()[0]
            raise UserError(f"{directory / WEIGHTS}: not the model's weights ({line})") from None
        trees = Trees.from_tensors(
            grown, outputs=count_outputs(spec.heads), features=_count_inputs(spec.network)
        )
        return cls(spec, network.to(choose_device(device)), trees)

    def save(self, directory: Path) -> None:
        """Write weights (safetensors) and configuration (JSON) into an existing directory."""
        weights = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in self.network.state_dict().items()
        } | self.trees.to_tensors()
        # Not save_file, whose files nobody but their owner may read.
        (directory / WEIGHTS).write_bytes(save(weights))
        write_json(directory / CONFIG, self.spec.to_json())

    def calibrated(self, calibration: Calibration, thresholds: dict[str, float]) -> Predictor:
        """Return the same model with other corrections."""
        spec = replace(self.spec, calibration=calibration, thresholds=thresholds)
        return Predictor(spec, self.network, self.trees)

    def beside(self, trees: Trees, mix: Mix) -> Predictor:
        """Return the same network with trees beside it."""
        return Predictor(replace(self.spec, mix=mix), self.network, trees)

    def predict(
        self, sequences: Sequences, now_us: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """Predict every user of some sequences, each at a time of their own.

        Args:
            sequences: B users; events at or after the user's time are not looked at.
            now_us: int64 (B,), microseconds since the epoch.

        Returns:
            For every target float32 (B,): a probability, or an expected amount.
        """
        users = np.arange(sequences.users, dtype=np.int64)
        return self.predict_cuts(Timeline(sequences), users, np.asarray(now_us, dtype=np.int64))

    def predict_cuts(
        self, timeline: Timeline, user: NDArray[np.int64], ts: NDArray[np.int64]
    ) -> dict[str, NDArray[np.float32]]:
        """Predict M (user, time) pairs in any order; a user may occur many times."""
        return self.finish(self.raw(timeline, timeline.cuts(user, ts)))

    def raw(self, timeline: Timeline, cuts: Cuts) -> Raw:
        """Return uncalibrated predictions of M cuts, in their order."""
        return self.look_ahead(timeline, cuts, 0).raw

    def look_ahead(self, timeline: Timeline, cuts: Cuts, count: int) -> Ahead:
        """Predict M cuts and the items that come next, in one pass over the histories.

        Args:
            timeline: all events.
            cuts: M cuts.
            count: K, of items a cut; 0 = none.
        """
        ahead, scores = self.parts(timeline, cuts, count)
        return replace(ahead, raw=self.join(ahead.raw, scores))

    def join(self, raw: Raw, scores: NDArray[np.float64]) -> Raw:
        """Let network and trees answer as one.

        Args:
            raw: by the network, of M cuts.
            scores: by the trees, (M, outputs): log odds of events by interval, logs of amounts.
        """
        if not len(self.trees):
            return raw
        events, bins = len(self.spec.heads.events), len(self.spec.heads.grid)
        own, share, speaks = self._believed
        stays = raw.survival
        if len(own):
            stays = stays.copy()
            said = log_odds(1.0 - raw.survival[:, own])
            grown = scores[:, : events * bins].reshape(-1, events, bins)[:, own]
            change = (1.0 - share) * (grown - said)
            odds = said + np.take_along_axis(change, speaks[None], axis=2)
            # The trees of two intervals may disagree.
            stays[:, own] = 1.0 - np.maximum.accumulate(sigmoid(odds), axis=2)
        told = self.trees.known[events * bins :]
        spend = np.where(told, np.exp(scores[:, events * bins :]), 0.0)
        return replace(raw, survival=stays, spend=spend)

    @cached_property
    def _believed(self) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """Events of which trees are believed, the network's share of them, whose word counts.

        Returns:
            int64 (E,); (E, bins), 1 where there are no trees; and int64 (E, bins), the interval
            whose trees change the log odds: its own, or for what no target asks about, and so has
            no trees, the next that is asked about.
        """
        heads = self.spec.heads
        events, bins = len(heads.events), len(heads.grid)
        known = self.trees.known[: events * bins].reshape(events, bins)
        weight = np.array([self.spec.mix.events.get(name, 1.0) for name in heads.events])
        own = np.flatnonzero((weight != 1.0) & known.any(axis=1))
        places = np.arange(bins)
        asked = np.isin(heads.grid, [target.horizon_days for target in self.targets])
        after = places[asked][np.searchsorted(places[asked], places)]
        share = np.where(known[own], weight[own, None], 1.0)
        return own, share, np.where(known[own], places, after)

    def parts(
        self, timeline: Timeline, cuts: Cuts, count: int = 0, workers: int = 1
    ) -> tuple[Ahead, NDArray[np.float64]]:
        """Return what the networks say of M cuts, and what the trees say, (M, outputs).

        Args:
            timeline: all events.
            cuts: M cuts.
            count: K, of items a cut that come next; 0 = none.
            workers: batches that are looked at side by side; the result does not depend on it.
        """
        config, heads = self.spec.network, self.spec.heads
        count = min(count, config.items)
        ahead = Ahead(
            raw=Raw(
                survival=np.ones((len(cuts), len(heads.events), len(heads.grid))),
                amount=np.zeros((len(cuts), len(heads.amounts))),
                spend=np.zeros((len(cuts), len(heads.amounts))),
            ),
            items=np.zeros((len(cuts), count), dtype=np.int64),
            chances=np.zeros((len(cuts), count), dtype=np.float32),
            embedding=np.zeros((len(cuts), config.width * len(self.networks)), dtype=np.float32),
        )
        if count:
            recent = self.tokenizer.items(timeline.recent_items(cuts, RECENT))
        scores = np.zeros((len(cuts), self.trees.outputs))
        features = config.features > 0 or len(self.trees) > 0
        networks, device = self.networks, self._device

        @torch.inference_mode()
        def look(collated: Collated) -> None:
            if len(self.trees):
                scores[collated.rows] = self.trees.score(self.look_at(collated.batch))
            batch = to_device(collated.batch, device)
            nows = [network.encode_now(batch) for network in networks]
            ahead.embedding[collated.rows] = torch.cat(nows, dim=1).cpu().numpy()
            said = [
                network.read_now(batch, now) for network, now in zip(networks, nows, strict=True)
            ]
            outputs = said[0] if len(said) == 1 else join(said)
            ahead.raw.survival[collated.rows] = survival(outputs)
            ahead.raw.amount[collated.rows] = buyer_mean(outputs)
            if not count:
                return
            told = torch.from_numpy(recent[collated.rows]).to(device)
            chances = [
                network.items.probabilities(now, told)
                for network, now in zip(networks, nows, strict=True)
                if network.items is not None
            ]
            mean = chances[0] if len(chances) == 1 else torch.stack(chances).mean(dim=0)
            best = mean.topk(count, dim=1)
            ahead.items[collated.rows] = best.indices.cpu().numpy()
            ahead.chances[collated.rows] = best.values.cpu().numpy()

        packed = self._iterate(timeline, cuts, features=features)
        threads = workers if workers > 1 else 0
        for _ in in_order((partial(look, collated) for collated in packed), threads):
            pass
        return ahead, scores

    def look_at(self, batch: Batch) -> NDArray[np.float32]:
        """Return what the trees look at, (M, F): features, and the calendar where it tells."""
        parts = [batch.now_features, calendar_of(batch)][: 1 + self.spec.network.calendar]
        return torch.cat(parts, dim=1).cpu().numpy()

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _iterate(self, timeline: Timeline, cuts: Cuts, *, features: bool) -> Iterator[Collated]:
        pieces = cut_pieces(timeline, cuts, context=self.spec.context, stride=1, shift=None)
        return iterate(
            timeline,
            self.tokenizer,
            pieces,
            row=min(self.spec.context + 2, int(pieces.lengths.max(initial=2))),
            tokens_per_batch=_TOKENS_PER_BATCH,
            features=features,
            rng=None,
        )

    def days_until(self, raw: Raw, event: str) -> NDArray[np.float32]:
        """Return in how many days the event is to be expected: the median, (M,).

        Within an interval of the grid the hazard is taken as constant.

        Args:
            raw: of M cuts.
            event: one of the heads' event names.

        Returns:
            Days; NaN where the event is less likely than not until the grid ends.

        Raises:
            UserError: the model has no such event.
        """
        heads = self.spec.heads
        if event not in heads.events:
            raise UserError(f"{event}: the model does not predict it")
        column = heads.events.index(event)
        happened = self.spec.calibration.probability([event], 1.0 - raw.survival[:, [column]])[:, 0]
        stay = np.log(np.clip(1.0 - np.asarray(happened, dtype=np.float64), _FLOOR, 1.0))
        stay = np.concatenate([np.zeros((len(stay), 1)), np.minimum.accumulate(stay, axis=1)], 1)
        grid = np.array([0, *heads.grid], dtype=np.float64)
        passed = stay[:, 1:] <= np.log(0.5)
        found = passed.any(axis=1)
        place = passed.argmax(axis=1)
        rows = np.arange(len(stay))
        before, after = stay[rows, place], stay[rows, place + 1]
        share = (before - np.log(0.5)) / np.maximum(before - after, _FLOOR)
        days = grid[place] + share * (grid[place + 1] - grid[place])
        return np.where(found, days, np.nan).astype(np.float32)

    def finish(self, raw: Raw) -> dict[str, NDArray[np.float32]]:
        """Calibrate raw predictions and read every target off them."""
        heads, calibration = self.spec.heads, self.spec.calibration
        corrected = calibration.probability(heads.events, 1.0 - raw.survival)
        happened = {name: corrected[:, i] for i, name in enumerate(heads.events)}
        result: dict[str, NDArray[np.float32]] = {}
        for target in self.spec.targets:
            column = heads.grid.index(target.horizon_days)
            if target.kind == "amount":
                buyers = happened[EventType.PURCHASE.value][:, column]
                place = heads.amounts.index(target.horizon_days)
                weight = self.spec.mix.amounts.get(str(target.horizon_days), 1.0)
                expected = weight * buyers * raw.amount[:, place]
                expected += (1.0 - weight) * raw.spend[:, place]
                value = calibration.amount(target.horizon_days, expected)
            elif target.event is None:
                value = 1.0 - happened[ANY_EVENT][:, column]
            else:
                value = happened[target.event][:, column]
            result[target.name] = value.astype(np.float32)
        return result


def count_outputs(heads: Heads) -> int:
    """Return how many outputs trees have: events by interval, then amounts."""
    return len(heads.events) * len(heads.grid) + len(heads.amounts)


def _count_inputs(config: NetworkConfig) -> int:
    """How many numbers the trees look at."""
    return len(feature_names()) + CALENDAR * config.calendar


def choose_device(name: Literal["auto", "cpu", "cuda"] | torch.device) -> torch.device:
    """Return the device that a setting names; ``auto`` takes a GPU where there is one.

    Raises:
        UserError: ``cuda`` without a usable GPU.
    """
    if isinstance(name, torch.device):
        return name
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device: cuda, but PyTorch finds no usable GPU; use auto or cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def select(targets: Sequence[Target], kind: str) -> list[Target]:
    """Return the targets of one kind."""
    return [target for target in targets if target.kind == kind]
