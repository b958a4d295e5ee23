"""The inner loop: by chunks against one token after the other, both against other people's code."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import relative_error
from mosaics.memories import Layout
from mosaics.ops.inner_loop import FORMS, Network, inner_loop

KINDS = ("plain", "momentum", "decay", "both", "ttt")


def inputs(kind, layers, time, batch=2, heads=2, width=3, value_width=3, inner=4, places=4, seed=0):
    """Arguments of the op but for segments and state."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape, by=1.0):
        return by * torch.randn(shape, generator=draw, dtype=torch.float64)

    bias = kind in ("ttt", "decay")
    sizes = [width, *[inner] * (layers - 1), value_width]
    tensors = {
        "queries": normal(batch, heads, time, width),
        "keys": normal(batch, heads, time, width),
        "values": normal(batch, heads, time, value_width),
        "step": normal(batch, heads, time).sigmoid() * 0.2,
        "momentum": normal(batch, heads, time).sigmoid() if kind in ("momentum", "both") else None,
        "decay": normal(batch, heads, time).sigmoid() if kind in ("decay", "both") else None,
        "scale": normal(places).exp() if kind == "ttt" else None,
        "norm": (normal(heads, 1, value_width), normal(heads, 1, value_width)) if kind == "ttt" else None,
        "initial": [normal(heads, a + bias, b, by=0.6) for a, b in zip(sizes, sizes[1:], strict=False)],
    }
    activation = "gelu_tanh" if kind == "ttt" else "gelu"
    return tensors, Network(activation, bias=bias, loss="normed" if kind == "ttt" else "l2")


def results(tensors, network, segments, form, keep):
    """Reads where `keep`, the weights, and the gradients of a random projection of them."""
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items() if isinstance(x, torch.Tensor)}
    lists = {n: [y.clone().requires_grad_() for y in x] for n, x in tensors.items() if isinstance(x, (list, tuple))}
    arguments = tensors | leaves | lists
    read, state = inner_loop(segments=segments, network=network, form=form, **arguments)
    read = read.transpose(1, 2)[keep]
    draw = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum() for x in (read, *state.current))
    parameters = [*leaves.values(), *(y for x in lists.values() for y in x)]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [read, *state.current, *(g for g in found if g is not None)]


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    layers=st.integers(1, 3),
    time=st.integers(1, 17),
    places=st.sampled_from([1, 2, 4, 7]),
    documents=st.booleans(),
    padding=st.booleans(),
    seed=st.integers(0, 99),
)
def test_by_chunks_equals_one_token_after_the_other(kind, layers, time, places, documents, padding, seed):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(time) < torch.tensor([[time], [max(1, time // 2)]]) if padding else None
    ids = (torch.rand(2, time, generator=draw) < 0.2).cumsum(1) if documents else None
    layout, _, _ = Layout.of(2, time, mask, ids)
    keep = torch.ones(2, time, dtype=torch.bool) if mask is None else mask
    tensors, network = inputs(kind, layers, time, places=places, seed=seed)
    segments = layout.segments(places, torch.device("cpu"))
    expected = results(tensors, network, segments, "naive", keep)
    for found, wanted in zip(results(tensors, network, segments, "chunked", keep), expected, strict=True):
        assert relative_error(found, wanted) < 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_differences(kind, form):
    tensors, network = inputs(kind, 2, 5, batch=1, heads=1, width=2, value_width=2, inner=3, places=3)
    segments = Layout(1, 5).segments(3, torch.device("cpu"))
    names = [n for n, x in tensors.items() if isinstance(x, torch.Tensor)]

    def call(*values):
        given = tensors | dict(zip(names, values[: len(names)], strict=True))
        given["initial"] = values[len(names) :]
        return inner_loop(segments=segments, network=network, form=form, **given)[0]

    values = [tensors[n].requires_grad_() for n in names] + [w.requires_grad_() for w in tensors["initial"]]
    assert torch.autograd.gradcheck(call, values)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_its_digits(kind):
    tensors, network = inputs(kind, 2, 200, places=16)
    tensors["step"] = tensors["step"] * 0.1
    segments, keep = Layout(2, 200).segments(16, torch.device("cpu")), torch.ones(2, 200, dtype=torch.bool)
    narrow = {n: x.float() if isinstance(x, torch.Tensor) else x and [y.float() for y in x] for n, x in tensors.items()}
    expected, _ = inner_loop(segments=segments, network=network, **tensors)
    found, _ = inner_loop(segments=segments, network=network, **narrow)
    assert relative_error(found.double().transpose(1, 2)[keep], expected.transpose(1, 2)[keep]) < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ttt_linear_official", "ttt_mlp_official"])
def test_ttt_is_that_of_its_authors(name, form, shared):
    file = load_file(shared / "fixtures" / f"{name}.safetensors")
    queries, keys, values, step = (file[f"intermediate/{n}"].transpose(1, 2) for n in ("XQ", "XK", "XV", "ttt_lr"))
    layers = 2 if "mlp" in name else 1
    initial = [torch.cat([file[f"param/W{n}"], file[f"param/b{n}"]], dim=1) for n in range(1, layers + 1)]
    norm = tuple(file[f"param/ttt_norm_{n}"][:, None] for n in ("weight", "bias"))
    scale = file["intermediate/token_eta"]
    network = Network("gelu_tanh", bias=True, loss="normed")
    segments = Layout(2, 21).segments(8, torch.device("cpu"))
    more = dict(network=network, norm=norm, scale=scale, form=form)
    answer, state = inner_loop(initial, queries, keys, values, step, segments, **more)
    centred = answer - answer.mean(-1, keepdim=True)
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm[0] + norm[1]
    bound = 1e-9 if layers == 1 else 1e-8  # the authors' derivative of gelu has truncated constants
    assert relative_error((queries + normed).transpose(1, 2), file["intermediate/XQW"]) < bound
    place = scale[(21 - 1) % 8]
    for number in range(layers):
        weights = state.anchor[number] + place * state.momentum[number]
        expected = torch.cat([file[f"output/W{number + 1}_states"], file[f"output/b{number + 1}_states"]], dim=2)
        assert relative_error(weights, expected) < bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("depth", [1, 2])
def test_titans_is_that_of_the_public_code(depth, form, shared):
    path = shared / "fixtures" / f"titans_lucidrains_depth{depth}_chunk1.safetensors"
    file = load_file(path)
    with safe_open(path, "pt") as opened:
        assert json.loads(opened.metadata()["config"])["batch_size"] == 1
    queries, keys, values = (file[f"intermediate/{n}"] for n in ("queries", "keys", "values"))
    initial = [file[f"param/memory_model_parameters.{n}"] for n in range(depth)]
    initial = [w.flatten(0, 1) if w.dim() == 4 else w for w in initial]
    # There the loss is the mean over the width, where the paper has the sum.
    step = file["intermediate/theta"] / keys.shape[-1]
    segments = Layout(2, 21).segments(1, torch.device("cpu"))
    more = dict(momentum=file["intermediate/eta"], decay=file["intermediate/alpha"], network=Network(), form=form)
    read, state = inner_loop(initial, queries, keys, values, step, segments, **more)
    assert relative_error(read, file["intermediate/read"]) < 1e-9
    for number in range(depth):
        assert relative_error(state.current[number], file[f"output/weights/weights.{number}"]) < 1e-9
        assert relative_error(state.momentum[number], file[f"output/momentum/weights.{number}"]) < 1e-9


def test_refuses_what_it_cannot_compute():
    tensors, network = inputs("both", 2, 6)
    segments = Layout(2, 6).segments(4, torch.device("cpu"))
    with pytest.raises(ValueError, match="from 3 to 3 in 2 heads"):
        inner_loop(segments=segments, network=network, **tensors | {"initial": tensors["initial"][:1]})
    with pytest.raises(ValueError, match="neither momentum nor decay"):
        inner_loop(segments=segments, network=network, **tensors | {"scale": torch.ones(4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="go together"):
        inner_loop(segments=segments, network=Network(loss="normed"), **tensors)
    with pytest.raises(ValueError, match="inner_loop got steps"):
        inner_loop(segments=segments, network=network, **tensors | {"step": tensors["step"][:1]})
    with pytest.raises(ValueError, match="loss is 'l3'"):
        Network(loss="l3")
