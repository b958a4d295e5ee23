"""One optimisation step."""

import copy
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mosaics import MosaicConfig
from mosaics.data import PackedDataset
from mosaics.memories import Layout
from mosaics.models import loss as losses
from mosaics.models.draws import draw_step
from mosaics.training.loop import NonFinite, optimisation_step
from mosaics.training.optimizer import make_optimizer
from mosaics.training.setup import build_config, build_model


@pytest.fixture
def data(prepared):
    return PackedDataset(prepared, "train", 48, seed=0)


def _gradients(recipe, data, model, dtype=torch.float32):
    """The loss, and the gradient as AdamW's first average after one step shows it."""
    model = copy.deepcopy(model)
    optimizer = make_optimizer(model, recipe.training)
    result = optimisation_step(model, optimizer, data, recipe, 1, dtype)
    return result, {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}


def test_optimisation_step_does_not_depend_on_the_micro_batches(tiny, data):
    changes = {"model.dropout": 0.0, "training.gradient_clip": 1e6, "training.batch_size": 5}
    torch.manual_seed(1)
    model = build_model(build_config(tiny(changes))).double().train()
    # Rows differ in how many targets they have, so a plain mean over micro-batches would be wrong.
    original = data.batch
    data.batch = lambda first, count: _uneven(original(first, count))
    whole, expected = _gradients(tiny(changes | {"training.micro_batch_size": None}), data, model)
    assert whole.targets == 3 * 47 + 9
    for size in (1, 2, 3):
        split, found = _gradients(tiny(changes | {"training.micro_batch_size": size}), data, model)
        assert split.loss == pytest.approx(whole.loss, rel=1e-10) and split.targets == whole.targets
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=name)


def _uneven(batch):
    """The first three rows whole, ten tokens of the fourth, nothing of the fifth."""
    mask = torch.ones_like(batch["input_ids"])
    mask[3, 10:] = 0
    mask[4] = 0
    documents = torch.zeros_like(mask)
    return batch | {
        "attention_mask": mask,
        "document_ids": documents,
        "labels": batch["input_ids"].masked_fill(mask == 0, -100),
    }


def test_optimisation_step_gives_every_micro_batch_the_draw_of_the_step(tiny, data):
    recipe = tiny({"training.micro_batch_size": 1})
    model = build_model(build_config(recipe)).train()
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["draw"]), with_kwargs=True)
    optimisation_step(model, make_optimizer(model, recipe.training), data, recipe, 5, torch.float32)
    assert seen == [draw_step(0, 5)] * 4


class Waits(TorchDispatchMode):
    """Counts how often the host waits for a number of a tensor."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "titans-lmm-tiny"])
def test_optimisation_step_makes_layout_and_targets_once_a_micro_batch(tiny, data, monkeypatch, preset):
    recipe = tiny({"training.micro_batch_size": 1})
    model = build_model(MosaicConfig.from_preset(preset, vocab_size=300, hidden_size=16, num_attention_heads=2)).train()
    made = dict.fromkeys(["of", "_targets"], 0)
    for owner, name in ((Layout, "of"), (losses, "_targets")):

        def counted(*given, name=name, make, **more):
            made[name] += 1
            return make(*given, **more)

        monkeypatch.setattr(owner, name, partial(counted, make=getattr(owner, name)))
    # On a processor alone it is asked whether reads are sound.
    monkeypatch.setattr("mosaics.ops.kernel_regression._is_sound", lambda read: True)
    with Waits() as waits:
        optimisation_step(model, make_optimizer(model, recipe.training), data, recipe, 1, torch.float32)
    assert made == {"of": 4, "_targets": 4}
    # Whether a row has several documents and, for chunks, how many there are; at the end the gradient's norm.
    assert waits.count == 4 * (1 if preset.startswith("memory") else 2) + 1


def test_optimisation_step_drops_out_other_units_in_every_micro_batch(tiny, data):
    recipe = tiny({"training.micro_batch_size": 1, "model.dropout": 0.5})
    model = build_model(build_config(recipe)).train()
    states = []
    model.register_forward_pre_hook(lambda module, args: states.append(torch.get_rng_state().numpy().tobytes()))
    optimisation_step(model, make_optimizer(model, recipe.training), data, recipe, 5, torch.float32)
    assert len(set(states)) == 4


def test_optimisation_step_is_the_same_when_done_again_and_differs_by_seed(tiny, data):
    torch.manual_seed(1)
    model = build_model(build_config(tiny())).train()
    first, again, other = (_gradients(tiny({"seed": seed}), data, model)[0].loss for seed in (0, 0, 1))
    assert first == again != other


def test_optimisation_step_clips_the_gradient(tiny, data):
    recipe = tiny({"training.gradient_clip": 0.01})
    result, averages = _gradients(recipe, data, build_model(build_config(recipe)).train())
    norm = torch.stack([average.norm() for average in averages.values()]).norm() / 0.1  # 1 - beta1
    assert result.gradient_norm > 0.1 and float(norm) == pytest.approx(0.01, rel=1e-3)


def test_optimisation_step_activation_checkpointing_changes_nothing(tiny, data):
    recipe = tiny()
    model = build_model(build_config(recipe)).train()
    plain, expected = _gradients(recipe, data, model)
    model.gradient_checkpointing_enable()
    checkpointed, found = _gradients(recipe, data, model)
    assert checkpointed.loss == plain.loss
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_optimisation_step_stops_at_a_loss_or_gradient_that_is_not_finite(tiny, data, where):
    recipe = tiny()
    model = build_model(build_config(recipe)).train()
    if where == "loss":
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("nan")
    else:
        model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFinite, match=r"step 3 \(sequences 8 to 11 of the stream\).*learning_rate"):
        optimisation_step(model, make_optimizer(model, recipe.training), data, recipe, 3, torch.float32)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def test_optimisation_step_refuses_a_batch_without_targets(tiny, data):
    recipe = tiny()
    model = build_model(build_config(recipe)).train()
    original = data.batch
    data.batch = lambda first, count: original(first, count) | {"labels": torch.full((count, 48), -100)}
    with pytest.raises(ValueError, match="no token of step 1"):
        optimisation_step(model, make_optimizer(model, recipe.training), data, recipe, 1, torch.float32)


def test_optimisation_step_trains_in_bfloat16(tiny, data):
    recipe = tiny()
    torch.manual_seed(0)
    model = build_model(build_config(recipe)).train()
    expected, _ = _gradients(recipe, data, model)
    found, _ = _gradients(recipe, data, model, torch.bfloat16)
    assert found.loss == pytest.approx(expected.loss, rel=2e-2)
