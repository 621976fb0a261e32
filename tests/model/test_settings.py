"""Precision, compilation, accumulation, thresholds: what they change, and what they do not."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import EnsembleTrees, Train
from pipelines.features.store import Sequences
from pipelines.model import fitting, runtime
from pipelines.model.batches import Placement, cut_pieces, sample_cuts
from pipelines.model.calibration import choose_threshold
from pipelines.model.checkpoint import Checkpoint, pack_torch_chance, unpack_torch_chance
from pipelines.model.fitting import Fit
from pipelines.model.heads import Heads
from pipelines.model.network import Outputs
from pipelines.model.predictor import Predictor
from pipelines.model.runtime import seed_everything
from pipelines.model.schedule import Schedule
from pipelines.model.steps import Epoch, Phase, in_groups
from pipelines.model.timeline import DAY, Cuts, Timeline, population
from pipelines.model.tokens import Vocabulary
from pipelines.model.training import TrainedModel, train_model
from tests.model.conftest import PERIODS, TARGETS, TINY

PLAIN = TINY.model_copy(update={"epochs": 1, "trees": EnsembleTrees(rounds=0)})


def make_fit(shop: Sequences, vocabulary: Vocabulary, config: Train) -> Fit:
    seed_everything(config)
    heads = Heads.for_targets(TARGETS)
    return Fit(Timeline(shop), PERIODS, heads, TARGETS, config, vocabulary)


def train(shop: Sequences, vocabulary: Vocabulary, **settings: Any) -> TrainedModel:
    config = PLAIN.model_copy(update=settings)
    return train_model(shop, PERIODS, TARGETS, config, vocabulary)


def test_on_a_cpu_the_defaults_are_float32_and_not_compiled(
    shop: Sequences, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    fit = make_fit(shop, vocabulary, PLAIN)
    assert fit.precision is torch.float32
    assert fit.backbone is None
    plain = {"precision": "float32", "compile": False, "accumulate": 1}
    for folder, settings in (("auto", {}), ("plain", plain)):
        (tmp_path / folder).mkdir()
        train(shop, vocabulary, **settings).save(tmp_path / folder)
    for file in (tmp_path / "auto").iterdir():
        assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes()


@pytest.mark.parametrize("backbone", ["gpt", "bert", "lstm", "cnn", "mlp"])
def test_bfloat16_trains(
    shop: Sequences, vocabulary: Vocabulary, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are made of bfloat16; hidden states, losses, weights and gradients are float32."""
    seen: list[torch.dtype] = []
    loss = fitting.hazard_loss

    def watch(outputs: Outputs, targets: Any) -> torch.Tensor:
        result = loss(outputs, targets)
        seen.extend([outputs.hazard.dtype, result.dtype])
        return result

    monkeypatch.setattr(fitting, "hazard_loss", watch)
    exact = train(shop, vocabulary, backbone=backbone)
    half = train(shop, vocabulary, backbone=backbone, precision="bfloat16")
    assert set(seen) == {torch.float32}
    weights = half.shipped.network.state_dict()
    differ = False
    for name, tensor in exact.shipped.network.state_dict().items():
        assert weights[name].dtype == tensor.dtype
        assert torch.isfinite(weights[name]).all()
        differ |= not torch.equal(weights[name], tensor)
    assert differ


def test_bfloat16_reaches_the_backbone(shop: Sequences, vocabulary: Vocabulary) -> None:
    fit = make_fit(shop, vocabulary, PLAIN.model_copy(update={"precision": "bfloat16"}))
    seen: list[torch.dtype] = []
    for block in fit.network.backbone.blocks:  # type: ignore[union-attr]
        block.attention_out.register_forward_hook(lambda m, x, y: seen.append(y.dtype))
    epoch = fit.loader.epoch(PERIODS.calibration, Phase.FIT, fit.rng)
    hidden = fit._encode(next(fit.loader.steps(epoch)).batch, None)
    assert seen == [torch.bfloat16] * PLAIN.layers
    assert hidden.dtype == torch.float32


def test_a_compiled_backbone_leaves_names_and_results(
    shop: Sequences,
    vocabulary: Vocabulary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    calls = []
    compiled_backbone = runtime.compile_backbone

    def count(network: Any, config: Train) -> Any:
        run = compiled_backbone(network, config)
        if run is None:
            return None

        def counted(*given: Any) -> Any:
            calls.append(0)
            return run(*given)

        return counted

    monkeypatch.setattr(fitting, "compile_backbone", count)
    plain = train(shop, vocabulary)
    assert not calls
    compiled = train(shop, vocabulary, compile=True)
    assert calls
    expected, found = (m.shipped.network.state_dict() for m in (plain, compiled))
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    compiled.save(tmp_path)
    steps = len(calls)
    timeline = Timeline(shop)
    cuts = population(timeline, PERIODS.test, PERIODS.active_days)
    loaded = Predictor.load(tmp_path).predict_cuts(timeline, cuts.user, cuts.ts)
    for name, values in plain.shipped.predict_cuts(timeline, cuts.user, cuts.ts).items():
        np.testing.assert_allclose(loaded[name], values, rtol=1e-3, atol=1e-4)
    assert len(calls) == steps


def test_two_halves_make_the_step_of_the_whole(shop: Sequences, vocabulary: Vocabulary) -> None:
    config = PLAIN.model_copy(update={"next_event_weight": 0.0, "amount_weight": 0.0})
    # What is dropped differs from batch to batch.
    config = config.model_copy(update={"item_weight": 0.0, "dropout": 0.0})
    timeline = Timeline(shop)
    rng = np.random.default_rng(0)
    cuts = sample_cuts(
        timeline,
        count=60,
        first=PERIODS.first,
        last=PERIODS.calibration - 7 * DAY,
        active_days=None,
        half_life_days=None,
        rng=rng,
    )
    pieces = cut_pieces(timeline, cuts, context=16, stride=8, shift=np.zeros(60, dtype=np.int64))
    count, row = len(pieces.start), int(pieces.lengths.max())

    def gradients(bounds: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        fit = make_fit(shop, vocabulary, config)
        fit.start(PERIODS.calibration, {})
        torch.nn.init.normal_(fit.network.hazard.weight, generator=torch.Generator().manual_seed(1))
        for low, high in bounds:
            placement = Placement(
                chosen=np.arange(low, high),
                place=np.arange(high - low) * row,
                shape=(high - low, row),
            )
            epoch = Epoch(
                close=PERIODS.calibration,
                phase=Phase.FIT,
                pieces=pieces,
                placements=[placement],
                chances=[fit.loader.draw(Phase.FIT, rng, pieces, placement)],
                state={},
            )
            (step,) = fit.loader.steps(epoch)
            fit._add_gradients(step, Phase.FIT, step.cuts / len(cuts))
        return {n: p.grad for n, p in fit.network.named_parameters() if p.grad is not None}

    whole, halves = gradients([(0, count)]), gradients([(0, count // 2), (count // 2, count)])
    assert list(whole) == list(halves)
    for name, gradient in whole.items():
        torch.testing.assert_close(halves[name], gradient, rtol=1e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in whole.values()) > 1e-3


@pytest.mark.parametrize("together", [1, 2, 3])
def test_steps_count_groups_and_what_is_left_over(
    shop: Sequences, vocabulary: Vocabulary, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PLAIN.model_copy(update={"accumulate": together, "tokens_per_batch": 256})
    fit = make_fit(shop, vocabulary, config)
    fit.start(PERIODS.calibration, {})
    sizes: list[int] = []
    rates: list[float] = []
    make, step = fitting.make_optimizer, fit._train_step

    def watch(*given: Any) -> torch.optim.Optimizer:
        optimizer = make(*given)
        optimizer.register_step_post_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    def note(*given: Any) -> Any:
        steps, *_, cuts = given
        sizes.append(len(steps))
        assert sum(step.cuts for step in steps) == cuts
        return step(*given)

    monkeypatch.setattr(fitting, "make_optimizer", watch)
    monkeypatch.setattr(fit, "_train_step", note)
    fit.run(Phase.FIT, 2, PERIODS.calibration, 0.01, lambda _: None)
    assert sum(sizes) > 10
    assert len(rates) == fit.step == len(sizes)
    # Warm-up and decay go by steps; how many an epoch has is known about.
    done = np.arange(len(rates)) / len(rates)
    expected = 0.01 * np.minimum(1.0, (done + 1e-3) / 0.05) * (1.0 - done)
    np.testing.assert_allclose(rates, expected, rtol=0, atol=0.0015)
    # Every group is full but for the one at an epoch's end.
    assert max(sizes) == together
    assert sum(size < together for size in sizes) <= 2
    assert all(p.grad is None for p in fit.network.parameters())


def test_batches_left_over_are_a_group() -> None:
    assert list(in_groups(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]


def test_accumulated_training_goes_on_from_a_checkpoint(
    shop: Sequences, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    config = PLAIN.model_copy(update={"accumulate": 2, "epochs": 2, "dropout": 0.2})
    config = config.model_copy(update={"tokens_per_batch": 256})
    whole = train_model(shop, PERIODS, TARGETS, config, vocabulary)

    def stop(epoch: dict[str, float]) -> None:
        if epoch["epoch"] == 1:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "train.safetensors", "key")
    given = (shop, PERIODS, TARGETS, config, vocabulary)
    with pytest.raises(KeyboardInterrupt):
        train_model(*given, stop, checkpoint=checkpoint)
    resumed = train_model(*given, checkpoint=checkpoint)
    expected = whole.shipped.network.state_dict()
    for name, tensor in resumed.shipped.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert resumed.flops == whole.flops > 0


def test_a_gpu_generator_is_saved_and_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's calls of a GPU are stood in for by a generator of the CPU."""
    device, stand_in = torch.device("cuda"), torch.Generator().manual_seed(3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda _: stand_in.get_state())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda s, _: stand_in.set_state(s))
    checkpoint = Checkpoint(tmp_path / "x.safetensors", "key")
    checkpoint.write(pack_torch_chance(device), {})
    first = torch.rand(4, generator=stand_in), torch.rand(4)
    found = checkpoint.read()
    assert found is not None
    unpack_torch_chance(device, found[0])
    again = torch.rand(4, generator=stand_in), torch.rand(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # A checkpoint from before has the CPU's state alone.
    del found[0]["chance.cuda"]
    unpack_torch_chance(device, found[0])
    assert "chance.cuda" not in pack_torch_chance(torch.device("cpu"))


@pytest.mark.parametrize("objective", ["f1", "youden", "break_even"])
def test_stored_thresholds_follow_the_objective(
    shop: Sequences, vocabulary: Vocabulary, objective: Any
) -> None:
    model = train_model(shop, PERIODS, TARGETS, PLAIN, vocabulary, threshold=objective)
    timeline = Timeline(shop)
    times = range(PERIODS.calibration, PERIODS.test - 3 * DAY + 1, 3 * DAY)
    cuts = Cuts.join([population(timeline, ts, PERIODS.active_days) for ts in times])
    heads = model.first.spec.heads
    labels = timeline.labels(cuts, events=heads.events, horizons=(), close=PERIODS.test)
    target = TARGETS[0]
    said = model.first.predict_cuts(timeline, cuts.user, cuts.ts)[target.name].astype(np.float64)
    happened = labels.delay[:, heads.events.index("purchase")] < target.horizon_days
    expected = choose_threshold(said, happened, objective)
    for predictor in (model.first, model.shipped, model.network):
        assert predictor.spec.thresholds[target.name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("events", "given", "epochs", "rate", "places", "trees"),
    [
        (0, {}, 6, 0.002, 512, 0.01),
        (32_767, {}, 6, 0.002, 512, 0.01),
        (32_768, {}, 6, 0.002, 1024, 0.01),
        (65_536, {}, 6, 0.002, 2048, 0.01),
        (400_000, {}, 6, 0.002, 2048, 0.01),
        (600_000, {}, 4, 0.014 / 3, 2048, 0.1),
        (2_000_000, {}, 3, 0.006, 2048, 0.1),
        (2_000_000, {"epochs": 1}, 1, 0.006, 2048, 0.1),
        (2_000_000, {"epochs": 100}, 100, 0.002, 2048, 0.1),
        (400_000, {"epochs": 3, "learning_rate": 0.1}, 3, 0.1, 2048, 0.01),
        (0, {"tokens_per_batch": 4096, "trees": {"learning_rate": 0.2}}, 6, 0.002, 4096, 0.2),
    ],
)
def test_large_logs_are_read_fewer_times_in_larger_steps(
    events: int, given: dict[str, Any], epochs: int, rate: float, places: int, trees: float
) -> None:
    timeline = SimpleNamespace(ts=np.array([0] * events + [7] * 10_000_000, dtype=np.int8))
    found = Schedule.of(Train(**given), timeline, 7)  # type: ignore[arg-type]
    assert (found.epochs, found.learning_rate) == (epochs, pytest.approx(rate))
    assert (found.tokens_per_batch, found.tree_rate) == (places, trees)


def test_a_gpu_has_its_steps_made_by_several() -> None:
    assert runtime.count_loaders(torch.device("cpu")) == 1
    assert 1 <= runtime.count_loaders(torch.device("cuda")) <= 4


@pytest.mark.parametrize(("backbone", "refuses"), [("gpt", True), ("bert", True), ("mlp", False)])
def test_chance_is_refused_on_a_gpu_where_there_are_other_kernels(
    shop: Sequences,
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    backbone: str,
    refuses: bool,
) -> None:
    """A parameter stands in that says it is on a GPU."""
    network = make_fit(shop, vocabulary, PLAIN.model_copy(update={"backbone": backbone})).network
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled
    with runtime.refuse_chance(network):
        assert warns_only()
    placed = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(network, "parameters", lambda: iter([placed]))
    with pytest.raises(ValueError, match="stop"), runtime.refuse_chance(network):
        assert warns_only() != refuses
        raise ValueError("stop")
    assert torch.are_deterministic_algorithms_enabled()
    assert warns_only()
