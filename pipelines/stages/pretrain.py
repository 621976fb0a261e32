"""Stage: teach the network to tell the next event and item, without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from safetensors.torch import save

from pipelines.config import Params
from pipelines.io import read_json, replace_directory, write_json
from pipelines.model.peers import Peers, join_peers
from pipelines.model.predictor import WEIGHTS, choose_device
from pipelines.model.training import pretrain_model
from pipelines.registry.champion import fetch_champion
from pipelines.stages.train import (
    FEATURES,
    PRETRAINED,
    load_inputs,
    measure_memory,
    open_checkpoint,
    tell_memory,
)

CHECKPOINT: Final = "pretrain"


def run(params: Params, root: Path = Path()) -> str:
    """Write models/pretrained: weights of the embeddings and the backbone.

    Of processes that share the steps the first one writes; of the others this returns "".

    Raises:
        UserError: data/features is missing or holds too little to learn from, or the champion that
            the evaluation will compare with cannot be had.
    """
    with join_peers(params.train) as peers:
        return _lead(params, root, peers) if peers.leads else _assist(params, root, peers)


def _assist(params: Params, root: Path, peers: Peers) -> str:
    """Share the steps, and write nothing."""
    peers.meet()  # what ails the data, the leader tells
    sequences, periods, targets, vocabulary = load_inputs(root)
    given = (sequences, periods, targets, params.train, params.pretrain, vocabulary)
    pretrain_model(*given, peers=peers)
    return ""


def _lead(params: Params, root: Path, peers: Peers) -> str:
    sequences, periods, targets, vocabulary = load_inputs(root)
    # Nothing here depends on it, but hours of training would end without it.
    fetch_champion(root)
    curves: list[dict[str, float]] = []
    checkpoint = open_checkpoint(root, CHECKPOINT, params)
    peers.meet()
    weights = pretrain_model(
        sequences,
        periods,
        targets,
        params.train,
        params.pretrain,
        vocabulary,
        curves.append,
        checkpoint,
        peers,
    )
    with replace_directory(root / PRETRAINED) as folder:
        write_json(
            folder / "config.json",
            {
                "backbone": params.train.backbone,
                "epochs": params.pretrain.epochs,
                "weights": bool(weights),
            },
        )
        if weights:
            held = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
            (folder / WEIGHTS).write_bytes(save(held))
    checkpoint.remove()
    if not curves:
        return f"switched off (pretrain.epochs: 0), in {PRETRAINED}"
    memory = measure_memory(choose_device(params.train.device))
    data = read_json(root / FEATURES / "cuts.json")
    until = next(c["ts"] for c in data["cuts"] if c["split"] == "calibration")[:10]
    return (
        f"{params.train.backbone}: {len(curves)} epochs on events before {until}, "
        f"next-event loss {curves[-1]['next_event_loss']:.4f} "
        f"({curves[-1]['events_per_s']:,.0f} events/s, peak memory {tell_memory(memory)}), "
        f"in {PRETRAINED}"
    )
