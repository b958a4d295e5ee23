"""Lattice: by chunks against one token after the other, and both against its equation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import relative_error
from mosaics.memories import Layout
from mosaics.ops.lattice import FORMS, LOSSES, lattice

CPU = torch.device("cpu")


def inputs(time, decays=True, batch=2, heads=2, slots=5, width=4, seed=0):
    """Tensors of the op by name."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    tensors = {
        "initial": normal(heads, slots, width),
        "queries": normal(batch, heads, time, slots),
        "keys": normal(batch, heads, time, slots),
        "values": normal(batch, heads, time, width),
        "step": normal(batch, heads, time).sigmoid(),
    }
    return tensors | ({"decay": torch.nn.functional.logsigmoid(normal(batch, heads, time) + 1)} if decays else {})


def results(tensors, segments, keep, **options):
    """Reads where `keep`, the slots, and the gradients of a random projection of them."""
    leaves = {name: x.clone().requires_grad_() for name, x in tensors.items()}
    read, state = lattice(**leaves, segments=segments, **options)
    read = read.transpose(1, 2)[keep]
    draw = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64) for x in (read, state.current)]
    total = (read * weights[0]).sum() + (state.current * weights[1]).sum()
    return [read, state.current, *torch.autograd.grad(total, list(leaves.values()))]


@settings(deadline=None, max_examples=40)
@given(
    loss=st.sampled_from(sorted(LOSSES)),
    renormalised=st.booleans(),
    decays=st.booleans(),
    time=st.integers(1, 17),
    places=st.sampled_from([1, 2, 4, 7]),
    slots=st.integers(1, 6),
    width=st.integers(2, 5),
    documents=st.booleans(),
    padding=st.booleans(),
    seed=st.integers(0, 99),
)
def test_by_chunks_equals_one_token_after_the_other(
    loss, renormalised, decays, time, places, slots, width, documents, padding, seed
):
    draw = torch.Generator().manual_seed(seed)
    mask = torch.arange(time) < torch.tensor([[time], [max(1, time // 2)]]) if padding else None
    ids = (torch.rand(2, time, generator=draw) < 0.2).cumsum(1) if documents else None
    layout, _, _ = Layout.of(2, time, mask, ids)
    keep = torch.ones(2, time, dtype=torch.bool) if mask is None else mask
    tensors = inputs(time, decays, slots=slots, width=width, seed=seed)
    options = dict(loss=loss, renormalised=renormalised)
    segments = layout.segments(places, CPU)
    expected = results(tensors, segments, keep, form="naive", **options)
    for found, wanted in zip(results(tensors, segments, keep, form="chunked", **options), expected, strict=True):
        assert relative_error(found, wanted) < 1e-9


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_chunks_of_one_token_are_the_recurrence(loss, form):
    """s_i = a s_i + g c_i / |s_i| (I - phi_i phi_i^T) h slot by slot, without the 1e-6 of the norms."""
    tensors, expected = inputs(9, batch=1, heads=1), []
    read, state = lattice(
        **tensors, segments=Layout(1, 9).segments(1, CPU), loss=loss, renormalised=False, form=form
    )  # fmt: skip
    given = {name: x.squeeze(0).squeeze(0) for name, x in tensors.items()}
    slots = list(given["initial"])
    for t in range(9):
        unit = [s / s.norm() for s in slots]
        key, value = given["keys"][t], given["values"][t]
        code, h = key.clone(), value.clone()
        if loss == "decoding":
            h = value - sum(k * phi for k, phi in zip(key, unit, strict=True))
        elif loss == "encoding":
            code = key - torch.stack([phi @ value for phi in unit])
        slots = [
            given["decay"][t].exp() * s + given["step"][t] * c / s.norm() * (h - phi * (phi @ h))
            for s, c, phi in zip(slots, code, unit, strict=True)
        ]
        expected.append(sum(q * s / s.norm() for q, s in zip(given["queries"][t], slots, strict=True)))
    # The slots' norms are above 0.5, so that 1e-6 is seen in the sixth digit.
    assert relative_error(read[0, 0], torch.stack(expected)) < 1e-5
    assert relative_error(state.current[0, 0], torch.stack(slots)) < 1e-5


def test_renormalised_slots_are_descended_on_the_sphere():
    """Each chunk of one token begins with unit slots, and what is read is of unit slots."""
    tensors, slots = inputs(6, decays=False), None
    for t in range(6):
        now = {name: x if name == "initial" else x[:, :, t : t + 1] for name, x in tensors.items()}
        layout = Layout(2, 1, stored=t)
        read, slots = lattice(**now, segments=layout.segments(1, CPU), state=slots)
        assert (slots.anchor.norm(dim=-1) - 1).abs().max() < 2e-6
        unit = slots.current / slots.current.norm(dim=-1, keepdim=True)
        assert relative_error(read, now["queries"] @ unit) < 2e-6
        step = slots.current - slots.anchor  # a tangent, but for the 1e-6
        assert step.norm() > 0.1 and (step * slots.anchor).sum(-1).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_differences(loss, renormalised, form):
    tensors = inputs(5, batch=1, heads=1, slots=3, width=2)
    segments = Layout(1, 5).segments(3, CPU)

    def call(*values):
        given = dict(zip(tensors, values, strict=True))
        read, state = lattice(**given, segments=segments, loss=loss, renormalised=renormalised, form=form)
        return read, state.current

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in tensors.values()])


@pytest.mark.parametrize("loss", LOSSES)
def test_narrow_inputs_keep_their_digits(loss):
    tensors, segments = inputs(100, slots=32, width=32), Layout(2, 100).segments(16, CPU)
    # As the memory has it: steps on large values make roundings grow where values are what is mapped.
    for name in ("queries", "keys", "values")[: 3 if loss == "encoding" else 2]:
        tensors[name] = torch.nn.functional.normalize(tensors[name], dim=-1)
    keep = torch.ones(2, 100, dtype=torch.bool)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3)):
        narrow = {name: x.to(dtype) for name, x in tensors.items()}
        twin, exact = torch.promote_types(dtype, torch.float32), {name: x.double() for name, x in narrow.items()}
        expected = results(exact, segments, keep, loss=loss, form="naive")
        found = results(narrow, segments, keep, loss=loss)
        assert found[0].dtype == dtype and found[1].dtype == twin
        for one, wanted in zip(found[: 7 if dtype == torch.float32 else 2], expected, strict=False):
            assert relative_error(one, wanted) < bound


@pytest.mark.parametrize("form", FORMS)
def test_a_slot_that_has_faded_is_written_anew(form):
    tensors = inputs(40)
    tensors["decay"] = torch.full_like(tensors["decay"], -1000.0)
    tensors["step"][:, :, :20] = 0.0
    for places in (1, 8):
        segments, keep = Layout(2, 40).segments(places, CPU), torch.ones(2, 40, dtype=torch.bool)
        found = results(tensors, segments, keep, form=form)
        assert all(torch.isfinite(x).all() for x in found)
        read = found[0].view(2, 40, -1)
        assert not read[:, :20].any() and (read[:, 20:] != 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_padding_alone_leaves_the_slots_as_they_are(form):
    layout, _, _ = Layout.of(2, 1, torch.tensor([[True], [False]]))
    tensors = inputs(1)
    _, state = lattice(**tensors, segments=layout.segments(4, CPU), form=form)
    assert torch.equal(state.current[1], tensors["initial"])
    assert not torch.equal(state.current[0], state.anchor[0])


def test_refuses_what_it_cannot_compute():
    tensors, segments = inputs(6), Layout(2, 6).segments(4, CPU)
    with pytest.raises(ValueError, match="loss is 'decode'"):
        lattice(**tensors, segments=segments, loss="decode")
    for name in tensors:
        with pytest.raises(ValueError, match="lattice got"):
            lattice(**tensors | {name: tensors[name][:1, :1]}, segments=segments)
    _, state = lattice(**tensors, segments=segments)
    with pytest.raises(ValueError, match="slots of the state"):
        lattice(**tensors, segments=segments, state=state._replace(current=state.current[:1]))
