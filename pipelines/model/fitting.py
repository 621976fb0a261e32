"""One network that learns: its steps, and where it stands."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain, islice, repeat
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional

from pipelines.config import Train
from pipelines.errors import UserError
from pipelines.events import EVENT_TYPES
from pipelines.io import progress
from pipelines.model.ahead import in_order
from pipelines.model.calibration import Calibration
from pipelines.model.checkpoint import (
    Checkpoint,
    pack_optimizer,
    pack_torch_chance,
    unpack_optimizer,
    unpack_torch_chance,
)
from pipelines.model.heads import Heads, Target, amount_loss, hazard_loss
from pipelines.model.items import start_bias
from pipelines.model.network import Batch, Network, NetworkConfig, to_device
from pipelines.model.peers import ALONE, Peers
from pipelines.model.predictor import ModelSpec, Predictor, choose_device
from pipelines.model.runtime import (
    choose_precision,
    compile_backbone,
    count_loaders,
    refuse_chance,
)
from pipelines.model.schedule import Periods, Schedule, depends_on_weekday
from pipelines.model.speed import count_flops
from pipelines.model.steps import (
    NEXT_CODES,
    Epoch,
    Following,
    FollowingItems,
    Loader,
    Phase,
    Step,
    in_groups,
)
from pipelines.model.timeline import Cuts, Timeline, feature_names
from pipelines.model.tokens import Tokenizer, Vocabulary

_PRETRAIN_ITEMS: Final = 5.0  # times item_weight: what the next-event loss gains there as well
_STATISTICS_CUTS: Final = 20_000
_WARM_UP: Final = 0.05  # of all steps
_MAX_NORM: Final = 1.0
# Machines that share a training may differ in these.
_OF_MACHINE: Final = {"device", "threads", "processes", "compile"}


class Fit:
    """The state of one training: network, chance, counters."""

    def __init__(
        self,
        timeline: Timeline,
        periods: Periods,
        heads: Heads,
        targets: tuple[Target, ...],
        config: Train,
        vocabulary: Vocabulary,
        peers: Peers = ALONE,
    ) -> None:
        self.peers = peers
        self.timeline = timeline
        self.periods = periods
        self.heads = heads
        self.config = config
        self.schedule = Schedule.of(config, timeline, periods.calibration)
        self.rng = np.random.default_rng(config.seed)
        self.device = choose_device(config.device)
        vocabulary = replace(
            vocabulary,
            item=vocabulary.item[: config.next_items],
            item_id=vocabulary.item_id[: config.next_items],
        )
        self.tokenizer = Tokenizer(
            vocabulary, item_buckets=config.item_buckets, query_buckets=config.query_buckets
        )
        self.spec = ModelSpec(
            network=NetworkConfig(
                backbone=config.backbone,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                dropout=config.dropout,
                types=len(EVENT_TYPES) + 1,
                categories=self.tokenizer.category.size,
                brands=self.tokenizer.brand.size,
                genders=self.tokenizer.gender.size,
                regions=self.tokenizer.region.size,
                item_buckets=config.item_buckets,
                query_buckets=config.query_buckets,
                next_codes=NEXT_CODES,
                features=len(feature_names()) if config.fusion else 0,
                fusion_width=2 * config.width,
                events=len(heads.events),
                bins=len(heads.grid),
                amounts=len(heads.amounts),
                items=len(vocabulary.item),
                calendar=depends_on_weekday(targets, periods),
            ),
            vocabulary=vocabulary,
            heads=heads,
            targets=targets,
            context=config.context,
            calibration=Calibration(),
            thresholds={},
            learnt_until=int(periods.test),
        )
        self.loader = Loader(
            timeline,
            self.tokenizer,
            heads,
            config,
            tokens_per_batch=self.schedule.tokens_per_batch,
            first=periods.first,
            active_days=periods.active_days,
        )
        self.network = Network(self.spec.network).to(self.device)
        self.precision = choose_precision(config)
        self.backbone = compile_backbone(self.network, config)
        self.first: dict[str, Tensor] = {}
        self.done = dict.fromkeys(Phase, 0)
        self.history: list[dict[str, float]] = []
        self.events = 0
        self.seconds = 0.0
        self.flops = 0.0
        self.step = 0
        self.checkpoint: Checkpoint | None = None
        self._optimizer_tensors: dict[str, Tensor] = {}

    def predictor(self) -> Predictor:
        """Return the network as it is, without corrections."""
        return Predictor(self.spec, self.network)

    def keep_first(self) -> None:
        """Remember the network as the first fit left it."""
        if not self.first:
            state = self.network.state_dict()
            self.first = {name: tensor.detach().clone() for name, tensor in state.items()}

    def take_first(self) -> Predictor:
        """Return the network that ``keep_first`` remembers."""
        network = Network(self.spec.network)
        network.load_state_dict(self.first)
        return Predictor(self.spec, network.to(self.device))

    def resume(
        self, checkpoint: Checkpoint | None, on_epoch: Callable[[dict[str, float]], None]
    ) -> bool:
        """Go back to the last epoch that the checkpoint holds; False when it holds none."""
        self.checkpoint = checkpoint
        found = checkpoint.read() if checkpoint else None
        if found is None:
            return False
        tensors, state = found
        self._take(tensors, state)
        unpack_torch_chance(self.device, tensors)
        for epoch in self.history:
            on_epoch(epoch)
        return True

    def align(self) -> None:
        """Let all processes of the training stand where the leader does."""
        if self.peers.count == 1:
            return
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        held = {k: v.cpu().contiguous() for k, v in (tensors | self._optimizer_tensors).items()}
        state = self._describe(self.rng.bit_generator.state)
        weights, told = self.peers.share(save(held)), self.peers.share(json.dumps(state).encode())
        if not self.peers.leads:
            self._take(load(weights), json.loads(told))

    def _take(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(_strip(tensors, "network."))
        self.first = _strip(tensors, "first.")
        self._optimizer_tensors = {k: v for k, v in tensors.items() if k.startswith("optimizer.")}
        self.rng.bit_generator.state = state["chance"]
        self.done = {phase: state["done"][phase.value] for phase in Phase}
        self.events, self.seconds, self.step = state["events"], state["seconds"], state["step"]
        self.flops = state.get("flops", 0.0)
        self.history = state["history"]

    def _save(self, optimizer: torch.optim.Optimizer, chance: Mapping[str, Any]) -> None:
        if self.checkpoint is None:
            return
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"first.{k}": v for k, v in self.first.items()}
        tensors |= pack_optimizer(optimizer) | pack_torch_chance(self.device)
        self.checkpoint.write(tensors, self._describe(chance))

    def _describe(self, chance: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "done": {phase.value: count for phase, count in self.done.items()},
            "chance": chance,
            "events": self.events,
            "seconds": self.seconds,
            "flops": self.flops,
            "step": self.step,
            "history": self.history,
        }

    def start(self, close: int, pretrained: Mapping[str, Tensor]) -> None:
        """Set what is known before the first step: pretrained weights, scales, base rates."""
        unexpected = self.network.load_state_dict(pretrained, strict=False).unexpected_keys
        if unexpected:
            raise UserError(f"models/pretrained: {unexpected[0]} is not of this network")
        cuts = self.draw_some(close)
        if not len(cuts):
            raise UserError(
                "train: nobody has a history and a closed window before the calibration cut; "
                "more days of events or shorter targets.horizons_days are needed"
            )
        labels = self.loader.targets(cuts, close)
        counted = labels.counted.sum(dim=0)
        rate = ((labels.happened * labels.counted).sum(dim=0) + 0.5) / (counted + 1.0)
        bought = labels.bought.sum(dim=0)
        mean = (labels.log_amount * labels.bought).sum(dim=0) / bought.clamp(min=1.0)
        square = (labels.log_amount.square() * labels.bought).sum(dim=0) / bought.clamp(min=1.0)
        scale = 0.5 * torch.log((square - mean.square()).clamp(min=0.05))
        with torch.no_grad():
            self.network.hazard.bias.copy_(torch.logit(rate).flatten())
            self.network.amount.bias.copy_(torch.cat([mean, scale]))
            if self.spec.network.features:
                self.network.fusion.fit(self.timeline.features(cuts))
        self.start_items(cuts, close)

    def draw_some(self, close: int) -> Cuts:
        """Draw cuts that tell how often something happens."""
        wanted = self.config.cuts_per_user * self.timeline.sequences.users
        return self.loader.sample(close, min(_STATISTICS_CUTS, max(1, wanted)), self.rng)

    def start_items(self, cuts: Cuts, close: int) -> None:
        """Set how often each item comes next."""
        if self.network.items is None:
            return
        following = self.loader.next_items(cuts, close)
        counts = np.bincount(following[following >= 0], minlength=self.spec.network.items)
        with torch.no_grad():
            self.network.items.bias.copy_(start_bias(counts))

    def run(
        self,
        phase: Phase,
        epochs: int,
        close: int,
        learning_rate: float,
        on_epoch: Callable[[dict[str, float]], None],
    ) -> None:
        """Train on windows that close by ``close``: warm-up, then linear decay to zero.

        ``accumulate`` batches make a step; those left over at an epoch's end make one, too.
        Epochs of the phase that a checkpoint holds are not done again.
        """
        optimizer = make_optimizer(self.network, learning_rate, self.config.weight_decay)
        if 0 < self.done[phase] < epochs and self._optimizer_tensors:
            unpack_optimizer(optimizer, self._optimizer_tensors)
        if phase is not Phase.PRETRAIN:
            self.loader.measure_levels(close)
        self.network.train()
        workers = count_loaders(self.device)
        draw = partial(self.loader.epoch, close, phase, self.rng)
        # The next epoch is drawn while one goes on.
        drawn = in_order(repeat(draw, epochs - self.done[phase]), 1)
        for epoch, plan in enumerate(drawn, start=self.done[phase]):
            began = time.perf_counter()
            total = torch.zeros(3, dtype=torch.float64, device=self.device)
            steps = 0
            events = flops = 0.0
            self._part_chance(phase, epoch, plan, (epochs, learning_rate))
            groups = list(in_groups(range(len(plan)), self.config.accumulate))
            own = [self.peers.own(group) for group in groups]
            mine = plan.take(list(chain.from_iterable(own)))
            made = self.loader.steps(mine, workers)
            if self.peers.leads:
                label = f"{phase} {epoch + 1}/{epochs}"
                made = progress(made, label, total=len(mine), unit="batch")
            for group, share in zip(groups, own, strict=True):
                done = (epoch + steps / len(groups)) / epochs
                rate = learning_rate * min(1.0, (done + 1e-3) / _WARM_UP) * max(1.0 - done, 0.0)
                for some in optimizer.param_groups:
                    some["lr"] = rate * some["scale"]
                batches = list(islice(made, len(share)))
                cuts = sum(plan.count_cuts(batch) for batch in group)
                total += self._train_step(batches, optimizer, phase, cuts)
                events += sum(step.events for step in batches)
                flops += sum(self._count_flops(step) for step in batches)
                steps += 1
            sums = self.peers.add(torch.cat([total, total.new_tensor([events, flops])]))
            *losses, events, flops = sums.tolist()  # waits for a GPU
            seconds = time.perf_counter() - began
            self.step += steps
            self.done[phase] += 1
            self.events += int(events)
            self.seconds += seconds
            self.flops += flops
            hazard, amount, following = (loss / max(steps, 1) for loss in losses)
            told = {
                "epoch": sum(self.done.values()),
                "step": self.step,
                "loss": hazard
                + self.config.amount_weight * amount
                + (1.0 if phase is Phase.PRETRAIN else self.config.next_event_weight) * following,
                "hazard_loss": hazard,
                "amount_loss": amount,
                "next_event_loss": following,
                "events_per_s": events / max(seconds, 1e-9),
                "flops_per_s": flops / max(seconds, 1e-9),
            }
            self.history.append(told)
            self._save(optimizer, plan.state)
            on_epoch(told)
        self.network.eval()

    def _part_chance(self, phase: Phase, epoch: int, plan: Epoch, pace: tuple[int, float]) -> None:
        """See that all have drawn the same epoch, and let each drop out other units in it.

        Their settings, too, are to be the same: by another learning rate, the weights would part.
        """
        if self.peers.count == 1:
            return
        settings = f"{pace} {self.config.model_dump_json(exclude=_OF_MACHINE)}"
        self.peers.agree(zlib.crc32(settings.encode(), plan.digest()))
        place = [self.config.seed, list(Phase).index(phase), epoch, self.peers.rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _train_step(
        self, batches: Sequence[Step], optimizer: torch.optim.Optimizer, phase: Phase, cuts: int
    ) -> Tensor:
        """Step by some batches, and by those that other processes have.

        Args:
            batches: of this process.
            optimizer: of the network.
            phase: what the step is for.
            cuts: of all batches. Cuts, of which the horizon losses are means, count alike in
                whatever batch.

        Returns:
            float64 (3,), what the batches add to the parts of the step's loss.
        """
        losses = torch.zeros(3, dtype=torch.float64, device=self.device)
        with refuse_chance(self.network):
            for step in batches:
                losses += self._add_gradients(step, phase, step.cuts / cuts)
        self.peers.add_gradients(self.network.parameters())
        if any(p.grad is not None for p in self.network.parameters()):
            nn.utils.clip_grad_norm_(self.network.parameters(), _MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses

    def _add_gradients(self, step: Step, phase: Phase, share: float) -> Tensor:
        """Add the gradients of ``share`` times the loss; return its parts times ``share``, (3,)."""
        step = to_device(step, self.device)
        hidden = self._encode(step.batch, step.left_out)
        loss = hazard = amount = following = hidden.new_zeros(())
        if step.targets is not None:
            outputs, hidden = self.network.read(step.batch, hidden)
            hazard = hazard_loss(outputs, step.targets)
            if self.heads.amounts:
                amount = amount_loss(outputs, step.targets)
            loss = hazard + self.config.amount_weight * amount
        if step.following is not None:
            following = self._event_loss(step.following, hidden)
            weight = 1.0 if phase is Phase.PRETRAIN else self.config.next_event_weight
            loss = loss + weight * following
        if step.items is not None:
            weight = self.config.item_weight
            weight *= _PRETRAIN_ITEMS if phase is Phase.PRETRAIN else 1.0
            loss = loss + weight * self._item_loss(step.items, hidden)
        if loss.requires_grad:
            (share * loss).backward()  # type: ignore[no-untyped-call]
        return share * torch.stack([hazard, amount, following]).detach().double()

    def _encode(self, batch: Batch, left_out: Tensor | None) -> Tensor:
        """Return the hidden states in float32, in which heads and losses are computed as well."""
        half = self.precision is torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16) if half else nullcontext():
            tokens = self.network.embed(batch, left_out)
            return self.network.mix(batch, tokens, self.backbone).float()

    def _count_flops(self, step: Step) -> float:
        told = items = 0
        if step.following is not None:
            told = len(step.following.places)
        if step.items is not None:
            items = len(step.items.places)
        read = step.targets is not None
        return count_flops(self.network, step.batch, told=told, items=items, read=read)

    def _item_loss(self, items: FollowingItems, hidden: Tensor) -> Tensor:
        """Return the loss of the item after some NOW tokens."""
        assert self.network.items is not None  # noqa: S101 - for the type checker
        now = self.network.norm(hidden.flatten(0, 1).index_select(0, items.places))
        said: Tensor = self.network.items.loss(now, items.recent, items.truth, items.sample)
        return said

    def _event_loss(self, following: Following, hidden: Tensor) -> Tensor:
        """Cross-entropy of the event after some events, or of those left out themselves."""
        *logits, price = self.network.next_logits(hidden, following.places)
        losses = [
            functional.cross_entropy(said, was)
            for said, was in zip(logits, following.classes, strict=True)
        ]
        if len(following.priced):
            losses.append(functional.smooth_l1_loss(price[following.priced], following.price))
        return torch.stack(losses).sum()


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def make_optimizer(
    network: Network, learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW; only matrices that multiply decay, tables and norms do not."""
    tables = {
        id(p)
        for m in network.modules()
        if isinstance(m, nn.Embedding | nn.EmbeddingBag)
        for p in m.parameters()
    }
    decayed = [p for p in network.parameters() if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in network.parameters() if p.ndim < 2 or id(p) in tables]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "scale": 1.0},
        {"params": kept, "weight_decay": 0.0, "scale": 1.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
