"""The names of models in a comparison, and which of them somebody would use instead of ours."""

from __future__ import annotations

from typing import Final

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
