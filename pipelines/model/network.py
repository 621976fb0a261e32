"""The behaviour model's network: event tokens, a causal transformer, heads at NOW tokens.

Pre-norm transformer with normalised queries and keys (Henry et al. 2020), a ReLU MLP,
zero-initialised output projections and rotary embeddings (Su et al. 2021). LayerNorm without
bias and ReLU predict as well here as RMSNorm and squared ReLU, and have fused CPU kernels that
make a step a fifth faster. Half of the heads rotate by position, the other half by the time of
the event in days at frequencies from an hour to years: attention then depends on real time
differences at every scale, and one fused attention call serves all heads.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

PROFILE_NUMBERS: Final = 2
GAP_BINS: Final = 12
CALENDAR: Final = 4
EVENT_NUMBERS: Final = GAP_BINS + CALENDAR + 5
NOW_NUMBERS: Final = GAP_BINS + CALENDAR + 1
NEXT_GAP_BINS: Final = 8


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """Sizes of the network.

    Attributes:
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
    """

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

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> NetworkConfig:
        """Build from ``to_json``'s value."""
        return cls(**{field.name: value[field.name] for field in fields(cls)})

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

    def to(self, device: torch.device) -> Batch:
        """Move every tensor."""
        if device.type == "cpu":
            return self
        return Batch(
            **{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)}
        )


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


class Rotary(nn.Module):
    """Angles of the rotary embedding: first half of the heads by time, second by position."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        pairs = head_width // 2
        # Periods from about an hour to three years, and from 2 to about 1000 events.
        days = torch.logspace(math.log10(0.05), math.log10(1000.0), pairs)
        places = torch.logspace(math.log10(4.0), math.log10(1000.0), pairs)
        self.time_heads = heads // 2
        self.place_heads = heads - self.time_heads
        self.register_buffer("time_rate", 2 * math.pi / days, persistent=False)
        self.register_buffer("place_rate", 2 * math.pi / places, persistent=False)
        self.time_rate: Tensor
        self.place_rate: Tensor

    def forward(self, time: Tensor, position: Tensor) -> Tensor:
        """Return unit complex numbers by which pairs are turned, (B, L, 1, heads, pairs)."""
        by_time = (time[..., None] * self.time_rate)[:, :, None, :]
        by_place = (position[..., None] * self.place_rate)[:, :, None, :]
        shape = by_time.shape
        angles = torch.cat(
            [
                by_time.expand(shape[0], shape[1], self.time_heads, shape[3]),
                by_place.expand(shape[0], shape[1], self.place_heads, shape[3]),
            ],
            dim=2,
        )
        return torch.polar(torch.ones_like(angles), angles)[:, :, None]


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn each pair of neighbours of (B, L, 2, heads, head width) by its angle."""
    pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2)


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.head_width = config.width // config.heads
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.width, bias=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        # Normalised queries and keys have a bounded product; the gain lets a head be sharp.
        self.gain = nn.Parameter(torch.full((config.heads, 1), 1.5))
        self.attention_out = nn.Linear(config.width, config.width, bias=False)
        self.mlp_norm = nn.LayerNorm(config.width, bias=False)
        self.mlp_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.mlp_out = nn.Linear(4 * config.width, config.width, bias=False)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)

    def forward(self, x: Tensor, mask: Tensor, turn: Tensor) -> Tensor:
        """Map (B, L, width) to the same; ``mask`` is (B, 1, L, L), True = may attend."""
        rows, places, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        both, value = qkv.split([2 * width, width], dim=-1)
        both = both.reshape(rows, places, 2, self.heads, self.head_width)
        both = rotate(functional.layer_norm(both, (self.head_width,)), turn)
        query, key = both.transpose(1, 3).unbind(dim=2)
        value = value.view(rows, places, self.heads, self.head_width).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query * self.gain[:, :, None], key, value, attn_mask=mask
        )
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(rows, places, width))
        x = x + functional.dropout(mixed, self.dropout, self.training)
        hidden = functional.relu(self.mlp_in(self.mlp_norm(x)))
        return x + functional.dropout(self.mlp_out(hidden), self.dropout, self.training)


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
        self.rotary = Rotary(config.heads, width // config.heads)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, bias=False)
        joined = width
        if config.features:
            self.register_buffer("feature_mean", torch.zeros(config.features))
            self.register_buffer("feature_scale", torch.ones(config.features))
            self.feature_mean: Tensor
            self.feature_scale: Tensor
            self.feature_in = nn.Linear(config.features, config.fusion_width)
            self.feature_mid = nn.Linear(config.fusion_width, config.fusion_width)
            joined += config.fusion_width
        self.join = nn.Linear(joined, config.fusion_width)
        self.hazard = nn.Linear(config.fusion_width, config.events * config.bins)
        self.amount = nn.Linear(config.fusion_width, 2 * config.amounts)
        self.next = nn.Linear(width, config.types + NEXT_GAP_BINS + config.next_codes)
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
        for head in (self.hazard, self.amount, self.next):
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)

    def encode(self, batch: Batch) -> Tensor:
        """Return the hidden state of every place, (B, L, width)."""
        rows, places = batch.source.shape
        width = self.config.width
        profiles = (
            self.gender(batch.profile_codes[:, 0])
            + self.region(batch.profile_codes[:, 1])
            + self.profile_numbers(batch.profile_numbers)
        )
        codes = batch.event_codes
        events = (
            self.event_type(codes[:, 0])
            + self.category(codes[:, 1])
            + self.brand(codes[:, 2])
            + self.item(codes[:, 3])
            + self.event_numbers(batch.event_numbers)
        )
        if len(batch.query_rows):
            texts = self.query(batch.query_tokens, batch.query_offsets)
            events = events.index_add(0, batch.query_rows, texts)
        nows = self.now_numbers(batch.now_numbers)
        tokens = torch.cat([events.new_zeros(1, width), profiles, events, nows])
        x = tokens.index_select(0, batch.source.flatten()).view(rows, places, width)
        mask = attention_mask(batch.segment, batch.is_now)
        turn = self.rotary(batch.time, batch.position)
        for block in self.blocks:
            x = block(x, mask, turn)
        return x

    def forward(self, batch: Batch) -> tuple[Outputs, Tensor]:
        """Return the heads' outputs at NOW and the hidden state of every place."""
        hidden = self.encode(batch)
        flat = hidden.flatten(0, 1)
        now = self.norm(flat.index_select(0, batch.now_place))
        if self.config.features:
            scaled = (batch.now_features - self.feature_mean) * self.feature_scale
            inner = functional.relu(self.feature_in(scaled.clamp(-5.0, 5.0)))
            inner = functional.relu(self.feature_mid(inner))
            now = torch.cat([now, inner], dim=1)
        joined = functional.relu(self.join(now))
        hazard = self.hazard(joined).view(-1, self.config.events, self.config.bins)
        mean, scale = self.amount(joined).chunk(2, dim=1)
        return Outputs(hazard=hazard, amount_mean=mean, amount_scale=scale), hidden

    def next_logits(self, hidden: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the next event's type, gap interval and content at some places."""
        logits = self.next(self.norm(hidden.flatten(0, 1).index_select(0, places)))
        sizes = [self.config.types, NEXT_GAP_BINS, self.config.next_codes]
        kind, gap, content = logits.split(sizes, dim=1)
        return kind, gap, content


def attention_mask(segment: Tensor, is_now: Tensor) -> Tensor:
    """Return who may attend to whom, (B, 1, L, L).

    A token sees the earlier tokens of its own user and itself; nobody but itself sees a NOW
    token, so several of them in one pass are as many passes with one.
    """
    places = segment.shape[1]
    itself = torch.eye(places, dtype=torch.bool, device=segment.device)
    causal = torch.ones_like(itself).tril()
    same = segment[:, :, None] == segment[:, None, :]
    return ((same & causal & ~is_now[:, None, :]) | itself)[:, None]
