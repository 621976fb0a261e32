"""The names of models in a comparison, and which of them somebody would use instead of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

CANDIDATE: Final = "ensemble"  # what ships: the network with the trees beside it
NETWORK: Final = "gpt"  # the network alone
CHAMPION: Final = "champion"  # the candidate's predecessor, judged apart
ORACLE: Final = "oracle"  # the simulator's own truth

# What is trained only to be compared, by the first letters of its name.
_COMPARED: Final = "with_"


def is_baseline(name: str) -> bool:
    """Tell whether a model is none of ours and one that can be had."""
    ours = name in (CANDIDATE, NETWORK, CHAMPION) or name.startswith(_COMPARED)
    return not ours and name != ORACLE


def find_best_baseline(models: Mapping[str, Any], metric: str, *, higher: bool) -> str | None:
    """Return the baseline that does best; None where none was scored.

    Args:
        models: of a target in reports/evaluation.json.
        metric: to judge by.
        higher: whether more of it is better.
    """
    sign = 1.0 if higher else -1.0
    scores = {
        name: sign * value
        for name, model in models.items()
        if is_baseline(name) and (value := model.get(metric, {}).get("value")) is not None
    }
    # The name breaks ties, so that equal inputs give an equal verdict.
    return max(sorted(scores), key=lambda name: scores[name], default=None)
