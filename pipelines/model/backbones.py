"""What lies between tokens and heads: how the events of a user are mixed.

Every backbone maps packed rows of tokens, (B, L, width), to the same shape. Rows hold segments
(users) side by side: a profile token, events, and NOW tokens that lie right before the first
event they may not see. No backbone lets a token of one segment reach another, nor a NOW token
reach anything but itself.

    gpt   causal transformer: pre-norm, normalised queries and keys (Henry et al. 2020), ReLU MLP,
          zero-initialised output projections, rotary embeddings (Su et al. 2021). LayerNorm
          without bias and ReLU predict as well here as RMSNorm and squared ReLU, and have fused
          CPU kernels that make a step a fifth faster. Half of the heads rotate by position, the
          other half by the time of the event in days at periods from an hour to years: attention
          then depends on real time differences at every scale (differences of logarithms would
          depend on when time begins), and one fused attention call serves all heads.
    bert  the same without the causal mask (Devlin et al. 2019); one NOW token a segment, as
          events would show one NOW what comes after another.
    lstm  Hochreiter & Schmidhuber 1997.
    cnn   dilated causal convolutions (Bai, Kolter & Koltun 2018).
    mlp   feed-forward on each event and on the mean of all before: order does not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

_KERNEL: Final = 3
_EPSILON: Final = 1e-5  # layer_norm's own


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tokens of B rows of L places lie; see ``pipelines.model.network.Batch``.

    Attributes:
        segment: int32 (B, L), 0 = nothing.
        is_now: bool (B, L).
        position: float32 (B, L), events before within the segment.
        time: float32 (B, L), days.
    """

    segment: Tensor
    is_now: Tensor
    position: Tensor
    time: Tensor


def make_backbone(name: str, *, width: int, layers: int, heads: int, dropout: float) -> nn.Module:
    """Build a backbone by its name.

    Args:
        name: gpt, bert, lstm, cnn or mlp.
        width: of a token.
        layers: how many, of whatever the backbone is made of.
        heads: of attention, where there is any.
        dropout: share of a layer's output that is dropped in training.
    """
    if name in ("gpt", "bert"):
        return Transformer(
            causal=name == "gpt", width=width, layers=layers, heads=heads, dropout=dropout
        )
    mixers: dict[str, type[_Mixer]] = {
        "lstm": Recurrent,
        "cnn": Convolutional,
        "mlp": FeedForward,
    }
    return Compacted(mixers[name](width=width, layers=layers, dropout=dropout))


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
        """Return unit complex numbers by which pairs are turned, (B, L, 1, heads, pairs).

        Compiled, as real numbers (2, B, L, 1, heads, 2 pairs), cosines and signed sines: the
        compiler makes no code for complex ones.
        """
        by_time = time[..., None] * self.time_rate
        by_place = position[..., None] * self.place_rate
        # Not torch.polar, which takes ten times as long on a CPU.
        angles = torch.stack([by_time, by_place], dim=2)
        if torch.compiler.is_compiling():
            cos, sin = angles.cos().repeat_interleave(2, dim=-1), angles.sin()
            turns = torch.stack([cos, torch.stack([-sin, sin], dim=-1).flatten(-2)])
        else:
            turns = torch.complex(angles.cos(), angles.sin())
        times, places = turns.chunk(2, dim=-2)
        size = turns.shape[:-2]
        heads = [
            times.expand(*size, self.time_heads, -1),
            places.expand(*size, self.place_heads, -1),
        ]
        return torch.cat(heads, dim=-2).unsqueeze(-3)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn each pair of neighbours of (B, L, 2, heads, head width) by its angle."""
    if turn.is_complex():
        pairs = torch.view_as_complex(x.view(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turn).flatten(-2)
    cos, sin = turn
    swapped = x.view(*x.shape[:-1], -1, 2).flip(-1).flatten(-2)
    turned: Tensor = x * cos + swapped * sin
    return turned


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.dropout = dropout
        self.draw = draw_kept  # another where the backbone is compiled: see compile_backbone
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        # Normalised queries and keys have a bounded product; the gain lets a head be sharp.
        self.gain = nn.Parameter(torch.full((heads, 1), 1.5))
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.attention_out.weight)
        nn.init.zeros_(self.mlp_out.weight)
        # ``_projection`` without gradients, and the state of the weights that it is of.
        self._centred: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor, mask: Tensor | None, turn: Tensor) -> Tensor:
        """Map (B, L, width) to the same.

        Args:
            x: (B, L, width).
            mask: bool (B, 1, L, L), True = may attend; None = each place to those up to itself.
            turn: (B, L, 1, heads, pairs).
        """
        rows, places, width = x.shape
        qkv = functional.linear(self.attention_norm(x), self._projection)
        both, value = qkv[..., : 2 * width], qkv[..., 2 * width :]
        query, key = self._turn(both, turn).unbind(dim=2)
        value = value.view(rows, places, self.heads, self.head_width).transpose(1, 2)
        query = query * self.gain[:, :, None]
        mixed = functional.scaled_dot_product_attention(
            query.to(value.dtype),
            key.to(value.dtype),
            value,
            attn_mask=mask,
            is_causal=mask is None,
        )
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(rows, places, width))
        return self._think(self._add(x, mixed))

    def at(self, x: Tensor, mask: Tensor, turn: Tensor, slots: Tensor) -> Tensor:
        """Return what ``forward`` does at some places alone, (B, K, width).

        Args:
            x: (B, L, width).
            mask: bool (B, K, L), True = may attend.
            turn: (B, L, 1, heads, pairs).
            slots: int64 (B, K), places of each row.
        """
        rows, places, width = x.shape
        row = torch.arange(rows, device=x.device)[:, None]
        normed = self.attention_norm(x)
        projection = self._projection
        query = functional.linear(normed[row, slots], projection[:width])
        key, value = functional.linear(normed, projection[width:]).chunk(2, dim=-1)
        query = self._turn(query, turn[row, slots])[:, :, 0]
        key = self._turn(key, turn)[:, :, 0]
        value = value.view(rows, places, self.heads, self.head_width).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            query * self.gain[:, :, None], key, value, attn_mask=mask[:, None]
        )
        mixed = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return self._think(x[row, slots] + mixed)

    @property
    def _projection(self) -> Tensor:
        """What makes queries, keys and values; without gradients the first two have mean 0."""
        weight = self.qkv.weight
        if torch.is_grad_enabled():
            return weight
        state = (weight.data_ptr(), weight._version)
        if self._centred is None or self._centred[0] != state:
            width = weight.shape[1]
            asking = weight[: 2 * width].view(-1, self.head_width, width)
            asking = asking - asking.mean(dim=1, keepdim=True)
            self._centred = state, torch.cat([asking.flatten(0, 1), weight[2 * width :]])
        return self._centred[1]

    def _turn(self, x: Tensor, turn: Tensor) -> Tensor:
        """Normalise and rotate queries, keys or both: (B, L, C) -> (B, heads, kinds, L, width)."""
        x = x.reshape(*x.shape[:2], -1, self.heads, self.head_width)
        if torch.is_grad_enabled():
            x = functional.layer_norm(x, x.shape[-1:])
        else:
            # The same, as ``_projection`` took their mean away: layer_norm takes twice as long for
            # rows so short, but is the faster of the two where a gradient is wanted as well.
            x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + _EPSILON)
        # In bfloat16 there are no complex numbers.
        return rotate(x.float(), turn).transpose(1, 3)

    def _think(self, x: Tensor) -> Tensor:
        # In place: nothing else reads what it replaces.
        hidden = functional.relu(self.mlp_in(self.mlp_norm(x)), inplace=True)
        return self._add(x, self.mlp_out(hidden))

    def _add(self, x: Tensor, more: Tensor) -> Tensor:
        """Add a layer's output, of which a share is dropped in training."""
        if not (self.training and self.dropout):
            return x + more
        if x.device.type != "cpu":
            return x + functional.dropout(more, self.dropout)
        return torch.addcmul(x, more, self.draw(more, self.dropout))


def draw_kept(like: Tensor, share: float) -> Tensor:
    """Return 0 for a share of the numbers, chosen by chance, and 1 / (1 - share) for the others.

    By 16 bits a number: PyTorch's own dropout draws 64 on a CPU, and takes two and a half times as
    long with what is added.
    """
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: like.numel()].view(like.shape)
    dropped = round(share * 2**16)
    kept = (bits >= dropped - 2**15).to(like.dtype)
    return kept.mul_(2**16 / (2**16 - dropped))


class Transformer(nn.Module):
    """Blocks of attention over packed rows."""

    def __init__(
        self, *, causal: bool, width: int, layers: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.causal = causal
        self.rotary = Rotary(heads, width // heads)
        self.blocks = nn.ModuleList(
            Block(width=width, heads=heads, dropout=dropout) for _ in range(layers)
        )

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map (B, L, width) to the same."""
        mask = attention_mask(layout.segment, layout.is_now, causal=self.causal)
        turn = self.rotary(layout.time, layout.position)
        for block in self.blocks:
            x = block(x, mask, turn)
        return x

    def at(self, x: Tensor, layout: Layout, places: Tensor) -> Tensor:
        """Return what ``forward`` does at some places alone, without dropout, (M, width).

        The last block then has to answer at those places only, which saves about a third.

        Args:
            x: (B, L, width).
            layout: of its places.
            places: int64 (M,), flat, ascending by row.
        """
        rows, length, _ = x.shape
        every = torch.arange(rows, device=x.device)
        row, slot = places // length, places % length
        if torch.equal(row, every):
            # One a row, as where single histories are asked about: nothing to be laid out.
            slots, number = slot[:, None], slot.new_zeros(rows)
        else:
            counts = torch.bincount(row, minlength=rows)
            number = torch.arange(len(places), device=x.device) - (counts.cumsum(0) - counts)[row]
            # Rows with fewer places ask at their first one for nothing.
            slots = places.new_zeros(rows, int(counts.max()))
            slots[row, number] = slot
        before = torch.arange(length, device=x.device) <= slots[:, :, None]
        own = layout.segment == layout.segment[:, :1]
        if self.causal and slots.shape[1] == 1 and torch.equal(own, before[:, 0]):
            # A row is one history up to its NOW: who sees what need not be written down.
            mask, seen = None, before
        else:
            mask = attention_mask(layout.segment, layout.is_now, causal=self.causal)
            seen = mask[:, 0][every[:, None], slots]
        turn = self.rotary(layout.time, layout.position)
        for block in self.blocks[:-1]:
            x = block(x, mask, turn)
        last = self.blocks[-1]
        assert isinstance(last, Block)  # noqa: S101 - what a list of modules does not tell
        return last.at(x, seen, turn, slots)[row, number]


class Compacted(nn.Module):
    """Runs a mixer over each segment's profile and events, without its NOW tokens.

    A NOW token then gets the state of the last token before it, and one layer to join both.
    """

    def __init__(self, mixer: _Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.now = nn.Linear(2 * mixer.width, mixer.width)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map (B, L, width) to the same."""
        rows, places, width = x.shape
        flat = x.reshape(rows * places, width)
        is_now = layout.is_now.flatten()
        segment = layout.segment.flatten()
        row = torch.arange(rows, device=x.device).repeat_interleave(places)
        begins = torch.ones_like(is_now)
        begins[1:] = (segment[1:] != segment[:-1]) | (row[1:] != row[:-1])
        kept = (segment > 0) & ~is_now
        # Number of the segment, and number within it, of the last kept token up to each place.
        sequence = torch.cumsum(begins & (segment > 0), dim=0) - 1
        running = torch.cumsum(kept, dim=0)
        before = torch.where(begins, running - kept.long(), 0).cummax(dim=0).values
        number = running - before - 1
        padded = flat.new_zeros(int(sequence[-1]) + 1, int(number.max()) + 1, width)
        padded[sequence[kept], number[kept]] = flat[kept]
        mixed = self.mixer(padded)
        result = flat.new_zeros(flat.shape)
        result[kept] = mixed[sequence[kept], number[kept]]
        past = mixed[sequence[is_now], number[is_now]]
        result[is_now] = past + functional.relu(self.now(torch.cat([past, flat[is_now]], dim=1)))
        return result.view(rows, places, width)


class _Mixer(nn.Module):
    """Maps (S, T, width) to the same; place t may depend on places up to t alone."""

    def __init__(self, *, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.dropout = dropout


class Recurrent(_Mixer):
    """LSTM."""

    def __init__(self, *, width: int, layers: int, dropout: float) -> None:
        super().__init__(width=width, layers=layers, dropout=dropout)
        self.norm = nn.LayerNorm(width, bias=False)
        inner = dropout if layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, dropout=inner)

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, T, width) to the same."""
        # Autocast would take an LSTM to float16.
        with torch.autocast(x.device.type, enabled=False):
            mixed: Tensor = self.lstm(self.norm(x))[0]
        return x + functional.dropout(mixed, self.dropout, self.training)


class Convolutional(_Mixer):
    """Residual causal convolutions whose reach grows threefold by layer.

    There are as many as reach over 243 events, or ``layers`` where that is more.
    """

    def __init__(self, *, width: int, layers: int, dropout: float) -> None:
        super().__init__(width=width, layers=max(layers, 5), dropout=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width, bias=False) for _ in range(self.layers))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, _KERNEL, dilation=_KERNEL ** min(i, 5))
            for i in range(self.layers)
        )
        self.outs = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(self.layers))
        for out in self.outs:
            nn.init.zeros_(out.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, T, width) to the same."""
        for i, (norm, convolve, out) in enumerate(
            zip(self.norms, self.convolutions, self.outs, strict=True)
        ):
            reach = (_KERNEL - 1) * _KERNEL ** min(i, 5)
            seen = functional.pad(norm(x).transpose(1, 2), (reach, 0))
            mixed = out(functional.relu(convolve(seen).transpose(1, 2)))
            x = x + functional.dropout(mixed, self.dropout, self.training)
        return x


class FeedForward(_Mixer):
    """Layers on each token, then on the mean of all tokens so far."""

    def __init__(self, *, width: int, layers: int, dropout: float) -> None:
        super().__init__(width=width, layers=layers, dropout=dropout)
        self.inner = nn.ModuleList(_Dense(width, dropout) for _ in range(layers))
        self.outer = nn.ModuleList(_Dense(width, dropout) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (S, T, width) to the same."""
        for layer in self.inner:
            x = layer(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)
        x = x.cumsum(dim=1) / count[:, None]
        for layer in self.outer:
            x = layer(x)
        return x


class _Dense(nn.Module):
    """A residual pre-norm layer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = nn.LayerNorm(width, bias=False)
        self.wide = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to the same."""
        inner = self.out(functional.relu(self.wide(self.norm(x))))
        return x + functional.dropout(inner, self.dropout, self.training)


def attention_mask(segment: Tensor, is_now: Tensor, *, causal: bool = True) -> Tensor:
    """Return who may attend to whom, (B, 1, L, L).

    A token sees the tokens of its own user, the earlier ones alone where ``causal``, and itself;
    nobody but itself sees a NOW token, so several of them in one causal pass are as many passes
    with one.
    """
    places = segment.shape[1]
    itself = torch.eye(places, dtype=torch.bool, device=segment.device)
    allowed = (segment[:, :, None] == segment[:, None, :]) & ~is_now[:, None, :]
    if causal:
        allowed = allowed & torch.ones_like(itself).tril()
    return (allowed | itself)[:, None]
