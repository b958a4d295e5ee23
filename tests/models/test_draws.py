"""One draw for all passes between two steps of the optimizer."""

import copy

import pytest
import torch
from torch import nn

import mosaics
from helpers import tiny_model, tokens
from mosaics.models.draws import draw_step

DELAYS = (3, 4, 5, 6)  # of the tiny models in training


def delay(model) -> int:
    """What the model takes in training, seen in its loss."""
    model.train()
    ids = tokens(2, 30)
    with torch.no_grad():
        losses = [model(ids, labels=ids, draw=(i + 0.5) / 4).loss for i in range(4)]
        return DELAYS[losses.index(model(ids, labels=ids).loss)]


def step(model, kind=torch.optim.SGD, parameters=None) -> None:
    parameters = list(model.parameters()) if parameters is None else parameters
    for p in parameters:
        p.grad = torch.zeros_like(p)
    kind(parameters, lr=0.0).step()


def sequence(model, count=12, **more) -> list[int]:
    found = []
    for _ in range(count):
        found.append(delay(model))
        step(model, **more)
    return found


def test_draw_step_depends_on_seed_and_step_alone_and_reaches_both_ends():
    draws = [draw_step(3, step) for step in range(2000)]
    assert draws[7] == draw_step(3, 7) and draws[7] not in (draw_step(4, 7), draws[8])
    low, high = 64, 256
    delays = {low + int(draw * (high - low + 1)) for draw in draws}
    assert min(delays) == low and max(delays) == high


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_model_keeps_its_draw_until_an_optimizer_has_stepped(kind):
    torch.manual_seed(5)
    model = tiny_model()
    torch.manual_seed(5)
    first = delay(model)
    torch.rand(100)  # whatever else draws
    assert delay(model) == first
    assert set(sequence(model, 30, kind=kind)) == set(DELAYS)


def test_draws_follow_from_seed_and_step_count():
    found = {}
    for seed in (1, 2, 3):
        model, twin = tiny_model(), tiny_model()
        torch.manual_seed(seed)
        found[seed] = sequence(model)
        assert sequence(twin) == found[seed]  # as in another process
        assert found[seed] == [DELAYS[int(draw_step(seed, number) * 4)] for number in range(12)]
    assert len(set(map(tuple, found.values()))) == 3


def test_draws_do_not_move_with_an_optimizer_of_another_model():
    model, other = tiny_model(), tiny_model()
    torch.manual_seed(1)
    before = delay(model), delay(other)
    for _ in range(5):
        step(other)
        assert delay(model) == before[0]


def test_draws_of_a_part_and_of_a_frozen_model_move_with_what_is_trained():
    torch.manual_seed(1)
    expected = sequence(tiny_model())
    part = tiny_model()
    assert sequence(part, parameters=[part.lm_head.weight]) == expected
    frozen = tiny_model().requires_grad_(False)
    assert sequence(frozen, parameters=list(nn.Linear(2, 2).parameters())) == expected


def test_draws_of_a_copy_go_on():
    torch.manual_seed(1)
    model = tiny_model()
    sequence(model, 3)
    assert len(set(sequence(copy.deepcopy(model)))) > 1


def test_draw_is_taken_in_the_place_of_what_a_model_keeps():
    model = tiny_model()
    torch.manual_seed(1)
    own = delay(model)
    for index, expected in enumerate(DELAYS):
        with mosaics.draw((index + 0.5) / 4):
            assert delay(model) == expected
    assert delay(model) == own
    for value in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="from 0 up to, not including, 1"), mosaics.draw(value):
            pass


def test_draws_leave_torchs_generator_alone():
    model = tiny_model().train()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    model(tokens(1, 20))
    assert torch.equal(torch.rand(3), expected)
