"""Boosted trees beside the network, and how much either of the two is believed.

Trees on counts and recencies, and networks on sequences, err differently, so that their mean errs
less (Dietterich, "Ensemble methods in machine learning", 2000). The trees are kept as flat arrays
and walked here: a model needs neither LightGBM nor a parser of its files where it serves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.errors import UserError

PREFIX: Final = "trees."  # of the arrays' names among the weights
_DTYPES: Final = {
    "output": np.int32,
    "root": np.int32,
    "feature": np.int32,
    "threshold": np.float32,
    "child": np.int32,
    "value": np.float64,
}
_CELLS: Final = 1 << 16  # rows x trees walked at a time, few enough for the cache

Doubles = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Trees:
    """T binary trees of K nodes in all; tree t adds to output ``output[t]``.

    A row at a node goes on to ``child`` if its feature is at or below the threshold, else to
    ``child + 1``. Leaves lead to themselves and have an infinite threshold, so that all walks
    are of one length. Children come after their parents.

    Attributes:
        outputs: O.
        output: int32 (T,), ascending.
        root: int32 (T,), the first node.
        feature: int32 (K,), what a node looks at.
        threshold: float32 (K,).
        child: int32 (K,).
        value: float64 (K,), what a leaf adds; of inner nodes the mean over the rows that the
            tree was grown on.
    """

    outputs: int
    output: NDArray[np.int32]
    root: NDArray[np.int32]
    feature: NDArray[np.int32]
    threshold: NDArray[np.float32]
    child: NDArray[np.int32]
    value: Doubles

    @classmethod
    def none(cls, outputs: int) -> Trees:
        """Return no trees at all."""
        return cls(outputs=outputs, **{name: np.zeros(0, dtype=d) for name, d in _DTYPES.items()})

    def __len__(self) -> int:
        return len(self.output)

    @cached_property
    def known(self) -> NDArray[np.bool_]:
        """Which outputs have trees, (O,)."""
        return np.asarray(np.bincount(self.output, minlength=self.outputs) > 0)

    @cached_property
    def depth(self) -> int:
        """The most steps from a root to a leaf."""
        depth, level = 0, np.unique(self.root)
        while len(level := level[self.child[level] != level]):
            below = self.child[level]
            depth, level = depth + 1, np.unique(np.concatenate([below, below + 1]))
        return depth

    def score(self, features: NDArray[np.float32]) -> Doubles:
        """Return the sum of the trees of every output, (M, O); 0 where there are none.

        Args:
            features: float32 (M, F), finite.
        """
        result = np.zeros((len(features), self.outputs))
        if not len(self):
            return result
        ends = np.searchsorted(self.output, np.arange(self.outputs + 1))
        step = max(1, _CELLS // len(self))
        for begin in range(0, len(features), step):
            rows = slice(begin, begin + step)
            *_, leaf = self._walk(features[rows])
            total = np.zeros((len(leaf), len(self) + 1))
            # Sums in the order of the trees: a row's score does not depend on its neighbours.
            np.cumsum(self.value[leaf], axis=1, out=total[:, 1:])
            result[rows] = total[:, ends[1:]] - total[:, ends[:-1]]
        return result

    def attribute(self, features: NDArray[np.float32], output: int) -> tuple[Doubles, Doubles]:
        """Say what each feature adds to one output.

        Every step down a tree changes the mean over the rows below; the change is the feature's
        that the node looks at (Saabas, "Interpreting random forests", 2014).

        Args:
            features: float32 (M, F), finite.
            output: one of the O.

        Returns:
            Effects (M, F), and the score before the first step, (M,). The sums are ``score``.
        """
        own = self._only(output)
        effect = np.zeros(features.shape)
        base = np.full(len(features), own.value[own.root].sum())
        if not len(own):
            return effect, base
        rows = np.arange(len(features))[:, None]
        before = None
        for node in own._walk(features):
            if before is not None:
                looked = own.feature[before]
                change = own.value[node] - own.value[before]
                np.add.at(effect, (np.broadcast_to(rows, looked.shape), looked), change)
            before = node
        return effect, base

    def to_tensors(self) -> dict[str, Tensor]:
        """Return named tensors; none without trees."""
        if not len(self):
            return {}
        return {f"{PREFIX}{name}": torch.from_numpy(getattr(self, name)) for name in _DTYPES}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], *, outputs: int, features: int) -> Trees:
        """Build from ``to_tensors``'s value.

        Args:
            tensors: named.
            outputs: O.
            features: F.

        Raises:
            UserError: an array is missing, of another type or shape, or points outside.
        """
        found = {name.removeprefix(PREFIX): tensor.numpy() for name, tensor in tensors.items()}
        if not found:
            return cls.none(outputs)
        if {name: array.dtype for name, array in found.items()} != _DTYPES or any(
            found[a].shape != (len(found[b]),)
            for a, b in (("output", "root"), *((n, "value") for n in ("feature", "threshold")))
        ):
            raise UserError("the model's trees are damaged; train again")
        trees = cls(outputs=outputs, **found)
        if not trees._is_sound(features):
            raise UserError("the model's trees are damaged; train again")
        return trees

    def _is_sound(self, features: int) -> bool:
        """Does every node look at and lead to something that is there, and every walk end?"""
        nodes = len(self.value)
        if (
            self.child.shape != (nodes,)
            or self.value.ndim != 1
            or not np.isfinite(self.value).all()
        ):
            return False
        own = np.arange(nodes)
        inner = self.child != own
        return bool(
            ((self.child[inner] > own[inner]) & (self.child[inner] < nodes - 1)).all()
            and (self.threshold[~inner] == np.inf).all()
            and ((self.feature >= 0) & (self.feature < features)).all()
            and ((self.root >= 0) & (self.root < nodes)).all()
            and ((self.output >= 0) & (self.output < self.outputs)).all()
            and (np.diff(self.output) >= 0).all()
        )

    def _only(self, output: int) -> Trees:
        """The trees of one output."""
        own = self.output == output
        arrays = {name: getattr(self, name) for name in _DTYPES}
        return Trees(
            outputs=self.outputs,
            **arrays | {"output": self.output[own], "root": self.root[own]},
        )

    def _walk(self, features: NDArray[np.float32]) -> Iterator[NDArray[np.int64]]:
        """Yield the nodes (M, T) of every step, roots first and leaves last."""
        flat = np.ascontiguousarray(features).reshape(-1)
        start = np.arange(len(features))[:, None] * features.shape[1]
        feature, child = self._places
        node = np.broadcast_to(self.root.astype(np.int64), (len(features), len(self)))
        yield node
        for _ in range(self.depth):
            seen = flat.take(start + feature.take(node))
            node = child.take(node) + (seen > self.threshold.take(node))
            yield node

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Features and children as NumPy wants its indices."""
        return self.feature.astype(np.int64), self.child.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How much the network is believed beside the trees: 1 = it alone, 0 = the trees alone.

    Attributes:
        events: by event name; log odds are averaged.
        amounts: by horizon of an amount, days as text; expected amounts are averaged.
    """

    events: Mapping[str, float] = field(default_factory=dict)
    amounts: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return {name: dict(values) for name, values in asdict(self).items()}
