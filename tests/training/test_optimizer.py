"""Schedule, parameter groups and the draws of a step."""

import pytest
import torch

from mosaics.training.draws import seed_step
from mosaics.training.optimizer import learning_rate, make_optimizer
from mosaics.training.recipe import TrainingSection
from mosaics.training.setup import build_config, build_model


def test_learning_rate_warms_up_then_falls_to_a_hundredth():
    training = TrainingSection(steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(step, training) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([0.2 * step for step in range(1, 11)])
    assert rates[9] == max(rates) == 2.0
    assert all(a > b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert rates[54] == pytest.approx(2.0 * (0.01 + 0.99 / 2))  # half way down the cosine
    assert rates[99] == pytest.approx(0.02)


def test_learning_rate_without_warmup_and_with_warmup_beyond_the_end():
    assert learning_rate(1, TrainingSection(steps=1, warmup_steps=0, learning_rate=1.0)) == pytest.approx(0.01)
    assert learning_rate(3, TrainingSection(steps=3, warmup_steps=30, learning_rate=1.0)) == pytest.approx(0.1)


def test_make_optimizer_decays_matrices_only(tiny):
    model = build_model(build_config(tiny()))
    optimizer = make_optimizer(model, tiny().training)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    undecayed = model.undecayed_parameters()
    assert len(decay) == len(list(model.parameters())) and 0 < len(undecayed) < len(decay)
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name in undecayed else 0.1), name
        assert parameter.dim() >= 2 or name in undecayed


def test_seed_step_gives_every_row_of_every_step_other_dropout():
    def numbers(*where):
        seed_step(*where)
        return tuple(torch.rand(4).tolist())

    places = [(seed, step, row) for seed in (0, 1) for step in (1, 2) for row in (0, 4, 8)]
    assert len({numbers(*place) for place in places}) == len(places)
    assert numbers(0, 1, 4) == numbers(0, 1, 4) and numbers(0, 1) == numbers(0, 1, 0)
