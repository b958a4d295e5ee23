"""Local linear attention and Parallax as memories: their limits, and what they say of what they read."""

import pytest
import torch

from helpers import relative_error, tiny_model, tokens
from mosaics.memories import Common, Context, Layout
from mosaics.memories.contract import build

OPTIONS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def made(name, **options):
    torch.manual_seed(2)
    memory = build(name, OPTIONS | options, Common(16), 0).double().eval()
    with torch.no_grad():
        memory.reset_parameters(0)
        for parameter in memory.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return memory


def answer(memory, x):
    return memory(x, Layout(*x.shape[:2]), None, Context())[0]


@pytest.mark.parametrize("positions", ["rotary", "none"])
def test_without_a_slope_they_are_attention(positions):
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    attention = made("attention", positions=positions)
    rotary = positions == "rotary"
    parallax, lla = made("parallax", rotary=rotary), made("lla", rotary=rotary, normed=False, iterations=20)
    for memory in (parallax, lla):
        memory.load_state_dict(attention.state_dict(), strict=False)
        assert relative_error(answer(memory, x), answer(attention, x)) > 0.01
    with torch.no_grad():
        parallax.r_proj.weight.zero_()
        lla.ridge.fill_(1e12)
    for memory in (parallax, lla):
        assert relative_error(answer(memory, x), answer(attention, x)) < 1e-9


@pytest.mark.parametrize("name", ["lla", "parallax"])
def test_weights_of_what_was_read_are_those_of_its_values(name):
    memory, x, context = made(name, rotary=False), torch.randn(2, 30, 16, dtype=torch.float64), Context(reads=[])
    y, _ = memory(x, Layout(2, 30), None, context)
    [read] = context.reads
    assert relative_error(read.weights.sum(-1), torch.ones(2, 4, 30)) < 1e-9
    assert (read.weights.triu(1) == 0).all() and (read.weights < 0).any()
    values = memory.v_proj(x).unflatten(-1, (2, 4)).transpose(1, 2).repeat_interleave(2, dim=1)
    assert relative_error(memory.o_proj((read.weights @ values).transpose(1, 2).flatten(2)), y) < 1e-9


def test_read_weights_say_what_was_left_unsolved():
    ids, residuals = tokens(2, 30), []
    for iterations in (1, 3, 16):
        reads = tiny_model(preset="lla-tiny", iterations=iterations).read_weights(ids)
        assert len(reads) == 2 and all(read.residual.shape == read.weights.shape[:3] for read in reads)
        residuals.append(max(read.residual.max().item() for read in reads))
    assert residuals[0] > 0.05 and residuals[0] > residuals[1] > residuals[2] and residuals[2] < 1e-9
    assert all(read.residual is None for read in tiny_model(preset="parallax-tiny").read_weights(ids))


def test_ridge_is_learned_in_every_head():
    memory = made("lla", initial_ridge=0.3)
    assert relative_error(torch.nn.functional.softplus(memory.ridge), torch.full((4,), 0.3)) < 1e-6
    answer(memory, torch.randn(2, 30, 16, dtype=torch.float64)).square().sum().backward()
    assert (memory.ridge.grad != 0).all()
    assert "ridge" in memory.undecayed_parameters()


def test_norms_keep_queries_and_keys_within_bounds():
    """Weights a hundred times as large are the same queries and keys."""
    memory, x = made("lla"), torch.randn(2, 30, 16, dtype=torch.float64)
    expected = answer(memory, x)
    with torch.no_grad():
        memory.q_proj.weight.mul_(100)
        memory.k_proj.weight.mul_(100)
    assert relative_error(answer(memory, x), expected) < 1e-3  # the norms' eps
