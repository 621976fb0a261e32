"""The behaviour model's network: tokens in, a backbone between, heads at NOW tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipelines.model.backbones import Layout, Transformer, make_backbone
from pipelines.model.fusion import Fusion
from pipelines.model.items import ItemHead

T = TypeVar("T")

PROFILE_NUMBERS: Final = 2
GAP_BINS: Final = 12
CALENDAR: Final = 4
PRICE_BINS: Final = 8
QUANTITY_BINS: Final = 6
EVENT_NUMBERS: Final = GAP_BINS + CALENDAR + PRICE_BINS + QUANTITY_BINS + 5
NOW_NUMBERS: Final = GAP_BINS + CALENDAR + 1
NEXT_GAP_BINS: Final = 8


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Kind and sizes of the network.

    Attributes:
        backbone: of ``pipelines.model.backbones``.
        width: of a token.
        layers: transformer blocks.
        heads: attention heads; half of them see time, half position.
        dropout: after each block's attention and MLP.
        types, categories, brands, genders, regions: codes of each vocabulary, with 0 = missing
            and 1 = unknown included.
        item_buckets, query_buckets: hash buckets, 0 = missing on top.
        next_codes: classes of the next event's content.
        features: snapshot features fused at NOW; 0 = none.
        fusion_width: of the layer that joins the history with the features.
        events: event names that have a hazard.
        bins: intervals of the hazards' time grid.
        amounts: horizons of the spend head.
        items: that can be told to come next; 0 = no such head.
        calendar: the hour and weekday of NOW reach the hazards by a linear way of their own, too
            (wide and deep: Cheng et al. 2016), and the trees beside the network. A weekday moves
            everyone's odds by a tenth, of which the rest of the network learns little.
    """

    backbone: str
    width: int
    layers: int
    heads: int
    dropout: float
    types: int
    categories: int
    brands: int
    genders: int
    regions: int
    item_buckets: int
    query_buckets: int
    next_codes: int
    features: int
    fusion_width: int
    events: int
    bins: int
    amounts: int
    items: int
    calendar: bool = False

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> NetworkConfig:
        """Build from ``to_json``'s value; what has a default may be missing."""
        known = [f.name for f in fields(cls) if f.name in value or f.default is MISSING]
        return cls(**{name: value[name] for name in known})

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows of tokens: B rows of L places, any number of users a row.

    Places hold a profile token (first of a user's segment), event tokens, NOW tokens, or
    nothing. The tokens of each kind are listed flat and ``source`` says which lies where.

    Attributes:
        source: int64 (B, L), index into [nothing, profiles, events, NOWs] put end to end.
        segment: int32 (B, L), which user; 0 = nothing.
        is_now: bool (B, L).
        position: float32 (B, L), count of events before within the segment.
        time: float32 (B, L), days, relative to a point near the segment.
        profile_numbers: float32 (P, PROFILE_NUMBERS).
        profile_codes: int64 (P, 2), gender and region.
        event_codes: int64 (E, 4), type, category, brand, item.
        event_numbers: float32 (E, EVENT_NUMBERS).
        query_rows: int64 (S,), events that carry a search text.
        query_tokens: int64 (T,), their hashed n-grams.
        query_offsets: int64 (S,), where each one's n-grams begin.
        now_place: int64 (M,), flat place (row x L + column) of every NOW token.
        now_numbers: float32 (M, NOW_NUMBERS).
        now_features: float32 (M, F), raw snapshot features.
        event_place: int64 (E,), flat place of every event token.
    """

    source: Tensor
    segment: Tensor
    is_now: Tensor
    position: Tensor
    time: Tensor
    profile_numbers: Tensor
    profile_codes: Tensor
    event_codes: Tensor
    event_numbers: Tensor
    query_rows: Tensor
    query_tokens: Tensor
    query_offsets: Tensor
    now_place: Tensor
    now_numbers: Tensor
    now_features: Tensor
    event_place: Tensor


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What the heads say at M NOW tokens.

    Attributes:
        hazard: (M, events, bins), logits of the hazard in each interval.
        amount_mean, amount_scale: (M, amounts), mean and log standard deviation of the log
            amount of a buyer.
    """

    hazard: Tensor
    amount_mean: Tensor
    amount_scale: Tensor


def to_device(value: T, device: torch.device) -> T:
    """Return a tensor, or a dataclass or tuple that holds some, with all of them on a device."""
    if device.type == "cpu":
        return value
    moved: T = _change(value, lambda tensor: tensor.to(device, non_blocking=True))
    return moved


def _change(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_change(part, change) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in fields(value)}
        return replace(value, **{name: _change(part, change) for name, part in parts.items()})
    return value


class _ZeroLinear(nn.Linear):
    """A linear layer that starts at zero; drawing numbers for one without outputs would warn."""

    def reset_parameters(self) -> None:
        """Set weights and biases to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Network(nn.Module):
    """Event tokens in, hazards and amounts at NOW out."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.event_type = nn.Embedding(config.types, width)
        self.category = nn.Embedding(config.categories, width)
        self.brand = nn.Embedding(config.brands, width)
        self.item = nn.Embedding(config.item_buckets + 1, width)
        self.query = nn.EmbeddingBag(config.query_buckets + 1, width, mode="mean")
        self.event_numbers = nn.Linear(EVENT_NUMBERS, width)
        self.gender = nn.Embedding(config.genders, width)
        self.region = nn.Embedding(config.regions, width)
        self.profile_numbers = nn.Linear(PROFILE_NUMBERS, width)
        self.now_numbers = nn.Linear(NOW_NUMBERS, width)
        # Not zero, at which the norm before each layer has no direction.
        self.mask_token = (
            nn.Parameter(0.3 * torch.randn(width)) if config.backbone == "bert" else None
        )
        self.backbone = make_backbone(
            config.backbone,
            width=width,
            layers=config.layers,
            heads=config.heads,
            dropout=config.dropout,
        )
        self.norm = nn.LayerNorm(width, bias=False)
        joined = width
        if config.features:
            self.fusion = Fusion(config.features, config.fusion_width)
            joined += config.fusion_width
        self.join = nn.Linear(joined, config.fusion_width)
        self.hazard = nn.Linear(config.fusion_width, config.events * config.bins)
        if config.calendar:
            self.calendar = _ZeroLinear(CALENDAR, config.events * config.bins, bias=False)
        self.amount = _ZeroLinear(config.fusion_width, 2 * config.amounts)
        self.items = ItemHead(config.items, width) if config.items else None
        self.next = nn.Linear(width, config.types + NEXT_GAP_BINS + config.next_codes + 1)
        for table in (
            self.event_type,
            self.category,
            self.brand,
            self.item,
            self.gender,
            self.region,
        ):
            nn.init.normal_(table.weight, std=0.3 if table is self.event_type else 0.1)
        nn.init.normal_(self.query.weight, std=0.2)
        for head in (self.hazard, self.next):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def encode(self, batch: Batch, hidden_events: Tensor | None = None) -> Tensor:
        """Return the hidden state of every place, (B, L, width).

        Args:
            batch: E events.
            hidden_events: bool (E,), events whose content a bidirectional backbone must guess.
        """
        return self.mix(batch, self.embed(batch, hidden_events))

    def embed(self, batch: Batch, hidden_events: Tensor | None = None) -> Tensor:
        """Return [nothing, profiles, events, NOWs] end to end, (1 + P + E + M, width)."""
        width = self.config.width
        profiles = (
            self.gender(batch.profile_codes[:, 0])
            + self.region(batch.profile_codes[:, 1])
            + self.profile_numbers(batch.profile_numbers)
        )
        codes = batch.event_codes
        # In place: no gradient needs the sums on the way, and a batch's do not fit into a cache.
        events = self.event_type(codes[:, 0])
        events += self.category(codes[:, 1])
        events += self.brand(codes[:, 2])
        events += self.item(codes[:, 3])
        events += self.event_numbers(batch.event_numbers)
        if len(batch.query_rows):
            texts = self.query(batch.query_tokens, batch.query_offsets)
            events = events.index_add(0, batch.query_rows, texts)
        if hidden_events is not None and self.mask_token is not None:
            events = torch.where(hidden_events[:, None], self.mask_token, events)
        nows = self.now_numbers(batch.now_numbers)
        return torch.cat([events.new_zeros(1, width), profiles, events, nows])

    def mix(
        self, batch: Batch, tokens: Tensor, backbone: Callable[..., Any] | None = None
    ) -> Tensor:
        """Lay tokens out in rows and run the backbone, (B, L, width).

        Args:
            batch: where they lie.
            tokens: of ``embed``.
            backbone: the network's own in another form, compiled; None = as it is.
        """
        run = self.backbone if backbone is None else backbone
        mixed: Tensor = run(*_lay_out(batch, tokens))
        return mixed

    def encode_now(self, batch: Batch) -> Tensor:
        """Return ``at_now`` of ``encode``, (M, width), without what nobody reads of it."""
        if not isinstance(self.backbone, Transformer) or not len(batch.now_place):
            return self.at_now(batch, self.encode(batch))
        x, layout = _lay_out(batch, self.embed(batch))
        now: Tensor = self.norm(self.backbone.at(x, layout, batch.now_place))
        return now

    def forward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Return the heads' outputs at NOW and the hidden state of every place."""
        return self.read(batch, self.encode(batch))

    def read(
        self, batch: Batch, hidden: Tensor, codes: Tensor | None = None
    ) -> tuple[Outputs, Tensor]:
        """Read the heads off the hidden states of ``encode``.

        Args:
            batch: M NOW tokens.
            hidden: (B, L, width).
            codes: (M, F, CODES) of the snapshot features; None = those of the batch's features.
        """
        return self.read_now(batch, self.at_now(batch, hidden), codes), hidden

    def read_now(self, batch: Batch, now: Tensor, codes: Tensor | None = None) -> Outputs:
        """Read the heads off the hidden states at NOW tokens, (M, width)."""
        if self.config.features:
            if codes is None:
                codes = self.fusion.encode(batch.now_features)
            now = torch.cat([now, self.fusion(codes)], dim=1)
        joined = functional.relu(self.join(now))
        hazard = self.hazard(joined)
        if self.config.calendar:
            hazard = hazard + self.calendar(calendar_of(batch))
        hazard = hazard.view(-1, self.config.events, self.config.bins)
        mean, scale = self.amount(joined).chunk(2, dim=1)
        return Outputs(hazard=hazard, amount_mean=mean, amount_scale=scale)

    def at_now(self, batch: Batch, hidden: Tensor) -> Tensor:
        """Return the hidden states at NOW tokens, (M, width)."""
        now: Tensor = self.norm(hidden.flatten(0, 1).index_select(0, batch.now_place))
        return now

    def next_logits(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits of an event's type, gap interval and content, and its scaled log price.

        Args:
            hidden: (B, L, width), of ``encode``.
            places: int64 (N,), flat places from which the event is told: the event before it, or
                the event itself where its content was left out.

        Returns:
            (N, types), (N, NEXT_GAP_BINS), (N, next_codes) and (N,).
        """
        logits = self.next(self.norm(hidden.flatten(0, 1).index_select(0, places)))
        sizes = [self.config.types, NEXT_GAP_BINS, self.config.next_codes, 1]
        kind, gap, content, price = logits.split(sizes, dim=1)
        return kind, gap, content, price[:, 0]


def calendar_of(batch: Batch) -> Tensor:
    """Return hour and weekday of every NOW, (M, CALENDAR)."""
    return batch.now_numbers[:, GAP_BINS : GAP_BINS + CALENDAR]


def _lay_out(batch: Batch, tokens: Tensor) -> tuple[Tensor, Layout]:
    """Put tokens into rows, (B, L, width)."""
    rows, places = batch.source.shape
    x = tokens.index_select(0, batch.source.flatten()).view(rows, places, -1)
    layout = Layout(
        segment=batch.segment, is_now=batch.is_now, position=batch.position, time=batch.time
    )
    return x, layout
