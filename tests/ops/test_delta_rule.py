"""Fast weights: the chunked form against the recurrence, both against other people's code."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from helpers import relative_error
from mosaics.ops.delta_rule import FORMS, WRITES, delta_rule

DECAYS = (None, "head", "channel")


def inputs(time, decay="head", strength=True, state=True, batch=2, heads=3, width=5, value_width=4, seed=0, steep=1.0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    keys = torch.nn.functional.normalize(normal(batch, heads, time, width), dim=-1)
    shape = (batch, heads, time, width)[: 4 if decay == "channel" else 3]
    return dict(
        queries=normal(batch, heads, time, width),
        keys=keys,
        values=normal(batch, heads, time, value_width),
        log_decay=None if decay is None else -steep * normal(*shape).exp(),
        strength=2 * normal(batch, heads, time).sigmoid() if strength else None,
        state=normal(batch, heads, width, value_width) if state else None,
    )


def results(tensors, **options):
    """Reads, final state, and the gradients of a random projection of both."""
    tensors = {name: None if x is None else x.clone().requires_grad_() for name, x in tensors.items()}
    found = delta_rule(**tensors, **options)
    draw = torch.Generator().manual_seed(9)
    total = sum((x * torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)).sum() for x in found)
    return [*found, *torch.autograd.grad(total, [x for x in tensors.values() if x is not None])]


@settings(deadline=None, max_examples=40)
@given(
    time=st.integers(1, 150),
    decay=st.sampled_from(DECAYS),
    write=st.sampled_from(WRITES),
    strength=st.booleans(),
    state=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 99),
    steep=st.sampled_from((0.02, 0.2, 1.0, 8.0)),
)
def test_chunked_equals_the_recurrence(time, decay, write, strength, state, documents, seed, steep):
    tensors, start = inputs(time, decay, strength, state, seed=seed, steep=steep), None
    if documents:
        border = torch.rand(2, time, generator=torch.Generator().manual_seed(seed)) < 0.05
        start = torch.where(border, torch.arange(time).expand(2, time), -3).cummax(1).values
    expected = results(tensors, start=start, write=write, form="naive")
    for found, wanted in zip(results(tensors, start=start, write=write, form="chunked"), expected, strict=True):
        assert relative_error(found, wanted) < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_a_document_is_as_if_it_were_alone(form, decay):
    tensors = inputs(90, decay)
    start = torch.where(torch.arange(90) < 37, -5, 37).expand(2, 90)
    reads, state = delta_rule(**tensors, start=start, form=form)
    alone = {name: None if x is None or name == "state" else x[:, :, 37:] for name, x in tensors.items()}
    expected, last = delta_rule(**alone, form=form)
    assert relative_error(reads[:, :, 37:], expected) < 1e-12 and relative_error(state, last) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("write", WRITES)
def test_a_sequence_may_be_cut_anywhere(form, write):
    tensors = inputs(100, "head")
    expected, last = delta_rule(**tensors, write=write, form=form)
    state, found = tensors.pop("state"), []
    for begin, end in ((0, 1), (1, 40), (40, 41), (41, 100)):
        part = {name: x[:, :, begin:end] for name, x in tensors.items()}
        read, state = delta_rule(**part, state=state, write=write, form=form)
        found.append(read)
    assert relative_error(torch.cat(found, dim=2), expected) < 1e-12 and relative_error(state, last) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_are_those_of_differences(form, decay):
    tensors = {
        name: x.requires_grad_() for name, x in inputs(7, decay, batch=1, heads=1, width=3).items() if x is not None
    }
    assert torch.autograd.gradcheck(
        lambda *x: delta_rule(**dict(zip(tensors, x, strict=True)), form=form), (*tensors.values(),)
    )


@pytest.mark.parametrize("steep", [0.03, pytest.param(0.2, marks=pytest.mark.slow), 1.0])
@pytest.mark.parametrize("decay", DECAYS)
def test_float32_keeps_its_digits(decay, steep):
    tensors = inputs(1000, decay, batch=1, steep=steep)
    expected = results(tensors, form="naive")
    narrow = {name: None if x is None else x.float() for name, x in tensors.items()}
    for found, wanted in zip(results(narrow, form="chunked"), expected, strict=True):
        assert relative_error(found.double(), wanted) < 2e-5


@pytest.mark.parametrize("form", FORMS)
def test_decays_of_any_size_give_numbers(form):
    tensors = inputs(80, "head")
    tensors["log_decay"][:, :, ::7] = -torch.inf
    expected = results(tensors, form="naive")
    tensors["log_decay"][:, :, ::7] = -1e30
    for found, wanted in zip(results(tensors, form=form), expected, strict=True):
        assert torch.isfinite(found).all() and relative_error(found, wanted) < 1e-9


FIXTURES = {
    "linear_attention_fla": ("hebbian", True),
    "linear_attention_normalized_fla": ("hebbian", True),
    "retention_fla": ("hebbian", True),
    "gla_fla": ("hebbian", True),
    "simple_gla_mamba2_fla": ("hebbian", False),
    "delta_rule_fla": ("delta", True),
    "gated_delta_rule_fla": ("delta", True),
    "kda_fla": ("delta", True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FIXTURES)
def test_equals_the_public_reference(name, form, shared):
    write, scaled = FIXTURES[name]
    file = load_file(shared / "fixtures" / f"{name}.safetensors")
    own = {
        key.removeprefix("input/"): x.clone().requires_grad_() for key, x in file.items() if key.startswith("input/")
    }
    heads = {key: x.transpose(1, 2) for key, x in own.items() if key != "initial_state"}
    queries = heads["q"] * heads["q"].shape[-1] ** -0.5 if scaled else heads["q"]
    decay = heads.get("g", heads.get("gk"))
    if name == "retention_fla":
        decay = (1 - 2.0 ** (-5 - torch.arange(2.0, dtype=torch.float64))).log()[:, None].expand(queries.shape[:3])
    more = dict(strength=heads.get("beta"), write=write, form=form)
    values, normalised = heads["v"], "output/final_z" in file
    if normalised:  # what the weights sum to is what is read of a 1
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
    read, state = delta_rule(queries, heads["k"], values, decay, state=own.get("initial_state"), **more)
    found = {"o": read.transpose(1, 2), "final_state": state}
    if normalised:
        of_values = read[..., :-1] / (read[..., -1:] + 1e-10)
        found = {"o": of_values.transpose(1, 2), "final_state": state[..., :-1], "final_z": state[..., -1][:, None]}
    outputs = {key.removeprefix("output/"): x for key, x in file.items() if key.startswith("output/")}
    for key, expected in outputs.items():
        assert relative_error(found[key], expected) < 1e-9
    loss = sum((file[f"weight/{key}"] * found[key]).sum() for key in outputs)
    for key, grad in zip(own, torch.autograd.grad(loss, list(own.values()), allow_unused=True), strict=True):
        if f"grad/{key}" in file:
            assert relative_error(grad, file[f"grad/{key}"]) < 1e-9, key


def test_refuses_what_it_cannot_compute():
    tensors = inputs(6)
    with pytest.raises(ValueError, match="no write 'hebb'"):
        delta_rule(**tensors, write="hebb")
    with pytest.raises(ValueError, match="no form 'chunkd'; did you mean 'chunked'"):
        delta_rule(**tensors, form="chunkd")
    for name, wrong in (("queries", slice(0, 1)), ("strength", slice(0, 1)), ("state", slice(0, 1))):
        with pytest.raises(ValueError, match="delta_rule got"):
            delta_rule(**tensors | {name: tensors[name][wrong]})
    with pytest.raises(ValueError, match="time of 1 or more"):
        delta_rule(**{name: x if name == "state" else x[:, :, :0] for name, x in tensors.items()})
