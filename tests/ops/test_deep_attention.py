"""Deep attention: the kernel's form against weights with Taylor's features, and against attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import relative_error
from mosaics.memories import Layout
from mosaics.ops.deep_attention import DeepState, deep_attention
from mosaics.ops.inner_loop import Loss, Network

KINDS = {
    "linear": {"linear": True, "loss": "dot"},
    "linear, l2": {"linear": True, "loss": "l2", "window": 3, "decay": True},
    "deep transformer": {"loss": "dot"},
    "swdt": {"loss": "dot", "window": 4, "decay": True, "rate": True},
    "dot": {"loss": "l2", "window": 3, "decay": True, "rate": True},
    "long window": {"loss": "l2", "window": 6, "activation": "gelu_tanh", "shift": True, "scale": True},
    "decay": {"loss": "dot", "decay": True, "shift": True},
}
CPU = torch.device("cpu")


def inputs(kind, time, batch=2, heads=2, width=2, value_width=3, units=4, seed=0, size=0.35):
    """Arguments of the op but for segments, start and state."""
    draw, own = torch.Generator().manual_seed(seed), KINDS[kind]

    def normal(*shape, by=1.0):
        return by * torch.randn(shape, generator=draw, dtype=torch.float64)

    shape = (batch, heads, time)
    tensors = {
        "queries": size * torch.nn.functional.normalize(normal(*shape, width), dim=-1),
        "keys": size * torch.nn.functional.normalize(normal(*shape, width), dim=-1),
        "values": normal(*shape, value_width),
        "step": normal(*shape).sigmoid() * 0.3,
        "initial": None if "linear" in own else normal(heads, units, value_width, by=0.6),
        "window": normal(*shape, own["window"]).sigmoid() if "window" in own else None,
        "rate": 0.5 * normal(*shape).sigmoid() if "rate" in own else None,
        "log_decay": torch.nn.functional.logsigmoid(normal(*shape)) if "decay" in own else None,
        "scale": normal(heads).sigmoid() if "scale" in own else None,
        "shift": normal(heads) if "shift" in own else None,
    }
    return tensors, {"network": Network(own.get("activation", "gelu"), loss=Loss(own["loss"]))}


def results(tensors, keep, **options):
    """Reads where `keep`, and the gradients of a random projection of them."""
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items() if x is not None}
    read, _ = deep_attention(**tensors | leaves, **options)
    read = read.transpose(1, 2)[keep]
    weight = torch.randn(read.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad((read * weight.to(read.dtype)).sum(), list(leaves.values()), allow_unused=True)
    return [read, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves.values(), strict=True))]


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    time=st.integers(1, 14),
    places=st.sampled_from([1, 2, 4, 7]),
    documents=st.booleans(),
    padding=st.booleans(),
    seed=st.integers(0, 99),
)
def test_by_chunks_equals_weights_with_taylors_features(kind, time, places, documents, padding, seed):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(time) < torch.tensor([[time], [max(1, time // 2)]]) if padding else None
    ids = (torch.rand(2, time, generator=draw) < 0.2).cumsum(1) if documents else None
    layout, _, _ = Layout.of(2, time, mask, ids)
    keep = torch.ones(2, time, dtype=torch.bool) if mask is None else mask
    tensors, options = inputs(kind, time, seed=seed)
    options |= {"segments": layout.segments(places, CPU), "start": layout.start}
    expected = results(tensors, keep, form="naive", **options)
    for found, wanted in zip(results(tensors, keep, form="chunked", **options), expected, strict=True):
        assert (found - wanted).norm() <= 1e-9 * max(wanted.norm().item(), 1e-3)


def test_linear_case_is_softmax_attention_without_its_sum():
    tensors, options = inputs("linear", 20, width=8, size=3.0)
    tensors["step"] = torch.ones_like(tensors["step"])
    read, _ = deep_attention(**tensors, segments=Layout(2, 20).segments(6, CPU), **options)
    weights = (tensors["queries"] @ tensors["keys"].mT / 8**0.5).exp().tril()
    assert relative_error(read, weights @ tensors["values"]) < 1e-12


@pytest.mark.parametrize("pieces", [[9, 11], [1] * 20, [3, 1, 16]])
@pytest.mark.parametrize("kind", KINDS)
def test_any_cut_equals_the_whole(kind, pieces):
    tensors, options = inputs(kind, 20, size=2.0)
    whole, _ = deep_attention(**tensors, segments=Layout(2, 20).segments(6, CPU), **options)
    begin, state, reads, pairs = 0, None, [], None
    for piece in pieces:
        now = {
            n: x[:, :, begin : begin + piece] if x is not None and n not in ("initial", "scale", "shift") else x
            for n, x in tensors.items()
        }
        segments = Layout(2, piece, stored=begin).segments(6, CPU)
        read, state = deep_attention(**now, segments=segments, state=state, **options)
        new = (state.keys, state.errors, state.shares)
        if pairs is not None:
            older = [x[:, :, : begin + piece - y.shape[2]] for x, y in zip(pairs, new, strict=True)]
            new = [torch.cat(both, dim=2) for both in zip(older, new, strict=True)]
        pairs, begin = new, begin + piece
        state = DeepState(*pairs, *state[3:])
        reads.append(read)
    assert relative_error(torch.cat(reads, dim=2), whole) < 1e-12


@pytest.mark.parametrize(
    "kind", [k if k in ("linear, l2", "dot") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_gradients_are_those_of_differences(kind):
    tensors, options = inputs(kind, 5, batch=1, heads=1, size=1.5)
    leaves = {n: x.requires_grad_() for n, x in tensors.items() if x is not None}
    segments = Layout(1, 5).segments(2, CPU)

    def call(*values):
        return deep_attention(**tensors | dict(zip(leaves, values, strict=True)), segments=segments, **options)[0]

    assert torch.autograd.gradcheck(call, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_its_digits(kind):
    tensors, options = inputs(kind, 200, size=1.5)
    tensors |= {n: 0.1 * tensors[n] for n in ("step", "log_decay") if tensors[n] is not None}
    options |= {"segments": Layout(2, 200).segments(16, CPU)}
    keep = torch.ones(2, 200, dtype=torch.bool)
    expected = results(tensors, keep, **options)
    narrow = {n: None if x is None else x.float() for n, x in tensors.items()}
    for found, wanted in zip(results(narrow, keep, **options), expected, strict=True):
        assert relative_error(found.double(), wanted) < 1e-5


def test_memory_of_training_grows_with_the_length():
    """What the backward pass needs is made again: of as many tokens as pairs nothing is kept."""
    largest = []
    for time in (128, 512):
        tensors, options = inputs("dot", time, batch=1)
        leaves = {n: x.requires_grad_() for n, x in tensors.items() if x is not None}
        sizes = {}

        def pack(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            read = deep_attention(**tensors | leaves, segments=Layout(1, time).segments(16, CPU), **options)
        largest.append(sum(sizes.values()))
        del read
    assert largest[1] < 5 * largest[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"step": torch.ones(2, 2, 4)}, "steps of shape"),
        ({"network": Network(residual=True)}, "no gate, bias, residual"),
        ({"network": Network("geglu")}, "no gate"),
        ({"form": "naiv"}, "did you mean 'naive'"),
        ({"form": "naive", "state": DeepState(*[torch.zeros(2, 2, 0, 1)] * 5)}, "begins with the document"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    tensors, options = inputs("dot", 5)
    with pytest.raises(ValueError, match=message):
        deep_attention(**{**tensors, "segments": Layout(2, 5).segments(2, CPU), **options, **changes})
