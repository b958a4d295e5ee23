"""The inner loop: by chunks against one token after the other, both against other people's code."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import relative_error
from mosaics.memories import Layout
from mosaics.ops import heap
from mosaics.ops.inner_loop import FORMS, LOSSES, RETENTIONS, InnerState, Loss, Network, Retention, inner_loop

KINDS = {
    "plain": {},
    "momentum": {"momentum": True},
    "decay": {"decay": True, "network": {"bias": True}},
    "both": {"momentum": True, "decay": True},
    "ttt": {
        "scale": True,
        "network": {"activation": "gelu_tanh", "bias": True, "residual": True, "normed": True},
        "loss": {"half": True},
    },
    "residual": {"decay": True, "network": {"residual": True}},
    "channels": {"decay": True, "momentum": True, "channels": 2},
    "l_p": {"loss": {"name": "l_p", "power": 3.0}},
    "l_1": {"loss": {"name": "l_p", "power": 1.0}},
    "l_p, smooth": {"loss": {"name": "l_p", "power": 1.5, "sharpness": 10.0, "smoothing": 1e-2}},
    "huber": {"loss": {"name": "huber"}, "channels": 2},
    "huber, smooth": {"loss": {"name": "huber", "half": True, "sharpness": 5.0}},
    "huber_norm": {"loss": {"name": "huber_norm"}},
    "huber_coordinates": {"loss": {"name": "huber_coordinates"}, "channels": 2},
    "shifted": {"loss": {"name": "shifted"}},
    "dot": {"loss": {"name": "dot"}, "momentum": True},
    "l_q": {"retention": {"name": "l_q"}, "decay": True, "channels": 2},
    "l_q_minimiser": {"retention": {"name": "l_q_minimiser", "power": 3.0}, "momentum": True},
    "kl": {"retention": {"name": "kl"}, "decay": True, "channels": 2},
    "kl, outputs": {"retention": {"name": "kl", "over": "outputs", "scale": 1.5}, "decay": True},
    "elastic_net": {"retention": {"name": "elastic_net", "threshold": 0.1}, "network": {"bias": True}},
    "elastic_net_proximal": {"retention": {"name": "elastic_net_proximal", "threshold": 0.1}, "decay": True},
    "logit": {"retention": {"name": "logit"}, "momentum": True, "decay": True},
    "window": {"window": 3},
    "window of one": {"window": 1, "rate": True, "momentum": True},
    "omega": {"window": 4, "rate": True, "momentum": True, "decay": True, "channels": 2, "network": {"bias": True}},
    "window, kl": {"window": 2, "rate": True, "momentum": True, "retention": {"name": "kl"}},
    "geglu": {"network": {"activation": "geglu", "residual": True}, "momentum": True},
    "muon": {"orthogonal": 3, "rate": True},
    "atlas": {"window": 3, "rate": True, "momentum": True, "decay": True, "orthogonal": 5},
    "atlas, channels": {"window": 2, "decay": True, "channels": 2, "orthogonal": 2, "retention": {"name": "logit"}},
    "atlas++": {"network": {"activation": "geglu"}, "momentum": True, "orthogonal": 5, "rate": True},
    "moneta": {
        "network": {"residual": True, "normed": True},
        "loss": {"name": "l_p", "sharpness": 10.0, "smoothing": 1e-6},
        "retention": {"name": "l_q"},
        "decay": True,
        "channels": 4,
    },
}


def inputs(kind, layers, time, batch=2, heads=2, width=4, value_width=4, inner=4, places=4, seed=0):
    """Arguments of the op but for segments and state."""
    draw, own = torch.Generator().manual_seed(seed), KINDS[kind]

    def normal(*shape, by=1.0):
        return by * torch.randn(shape, generator=draw, dtype=torch.float64)

    network = Network(**own.get("network", {}), loss=Loss(**own.get("loss", {})))
    sizes = [width, *[inner] * (layers - 1), value_width]
    halves = [network.halves(number, layers) for number in range(layers)]
    channels = (own["channels"],) if "channels" in own else ()
    shape, of_channels = (batch, heads, time), (batch, heads, time, *channels)
    tensors = {
        "queries": normal(*shape, width),
        "keys": normal(*shape, width),
        "values": normal(*shape, value_width),
        "step": normal(*of_channels).sigmoid() * 0.2,
        "momentum": normal(*shape).sigmoid() if "momentum" in own else None,
        "decay": normal(*of_channels).sigmoid() if "decay" in own else None,
        "window": normal(*shape, own["window"]).sigmoid() if "window" in own else None,
        "rate": 0.3 * normal(*shape).sigmoid() if "rate" in own else None,
        "delta": 1.5 * normal(*of_channels).exp() if network.loss.takes_delta else None,
        "scale": normal(places).exp() if "scale" in own else None,
        "norm": (normal(heads, 1, value_width), normal(heads, 1, value_width)) if network.normed else None,
        "initial": [
            normal(heads, a + network.bias, b * n, by=0.6) for a, b, n in zip(sizes, sizes[1:], halves, strict=False)
        ],
    }
    retention = Retention(**own.get("retention", {}))
    return tensors, {"network": network, "retention": retention, "orthogonal": own.get("orthogonal", 0)}


def results(tensors, options, segments, form, keep):
    """Reads where `keep`, the weights, and the gradients of a random projection of them."""
    leaves = {n: x.clone().requires_grad_() for n, x in tensors.items() if isinstance(x, torch.Tensor)}
    lists = {n: [y.clone().requires_grad_() for y in x] for n, x in tensors.items() if isinstance(x, (list, tuple))}
    arguments = tensors | leaves | lists
    read, state = inner_loop(segments=segments, form=form, **arguments, **options)
    read = read.transpose(1, 2)[keep]
    draw = torch.Generator().manual_seed(1)
    results = (read, *state.current, *state.errors)
    total = sum((x * torch.randn(x.shape, generator=draw, dtype=x.dtype)).sum() for x in results)
    parameters = [*leaves.values(), *(y for x in lists.values() for y in x)]
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return [read, *state.current, *state.inputs, *state.errors, *(g for g in found if g is not None)]


@pytest.mark.parametrize("kind, times", [("atlas", 3 * 2), ("moneta", 0), ("both", 0)])
def test_heap_is_given_back_between_chunks_of_muon_alone(kind, times, monkeypatch):
    calls = []
    monkeypatch.setattr(heap, "_malloc_trim", lambda: calls.append)
    tensors, options = inputs(kind, 2, 12, places=4)
    segments = Layout(2, 12).segments(4, torch.device("cpu"))
    with torch.no_grad():
        inner_loop(segments=segments, form="chunked", **tensors, **options)
    assert not calls  # nothing is kept
    results(tensors, options, segments, "chunked", torch.ones(2, 12, dtype=torch.bool))
    assert len(calls) == 2 * times  # each map of each chunk, forwards and once more backwards


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(sorted(KINDS)),
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
    tensors, options = inputs(kind, layers, time, places=places, seed=seed)
    segments = layout.segments(places, torch.device("cpu"))
    expected = results(tensors, options, segments, "naive", keep)
    assume(all(x.isfinite().all() for x in expected))  # weights without a decay may run away, to 1e176 and on
    for found, wanted in zip(results(tensors, options, segments, "chunked", keep), expected, strict=True):
        # The size of a momentum that is made orthogonal has no say, so that derivatives by it are roundings.
        least = 1.0 if options["orthogonal"] else 0.0
        assert relative_error(found, wanted) < 1e-9 or (found - wanted).norm() < 1e-9 * least


@pytest.mark.parametrize("kind", ["both", "ttt", "channels", "omega", "moneta"])
def test_watched_are_the_norms_of_gradients_and_of_weights(kind):
    tensors, options = inputs(kind, 2, 7, places=3)
    segments = Layout(2, 7).segments(3, torch.device("cpu"))
    seen = []
    for form in FORMS:
        seen.append({})
        inner_loop(segments=segments, form=form, watched=seen[-1], **tensors, **options)
    assert seen[0].keys() == {"surprise", "norm of the weights"}
    for name, found in seen[0].items():
        assert found.shape == (2, 2, 7) and relative_error(seen[1][name], found) < 1e-9
    first = sum(w.square().sum((-2, -1)) for w in tensors["initial"]).sqrt()
    if options.get("retention") is None or options["retention"].linear:
        assert relative_error(seen[0]["norm of the weights"][:, :, :3], first[None, :, None].expand(2, 2, 3)) < 1e-9


# The other form's gradients equal these (above).
@pytest.mark.parametrize(
    "kind, form",
    [
        ("both", "naive"),
        *(pytest.param(k, "chunked", marks=[] if k in ("both", "l_q") else pytest.mark.slow) for k in KINDS),
    ],
)
def test_gradients_are_those_of_differences(kind, form):
    tensors, options = inputs(kind, 2, 4, batch=1, heads=1, width=4, value_width=4, places=3)
    segments = Layout(1, 4).segments(3, torch.device("cpu"))
    names = [n for n, x in tensors.items() if isinstance(x, torch.Tensor)]

    def call(*values):
        given = tensors | dict(zip(names, values[: len(names)], strict=True))
        given["initial"] = values[len(names) :]
        return inner_loop(segments=segments, form=form, **given, **options)[0]

    values = [tensors[n].requires_grad_() for n in names] + [w.requires_grad_() for w in tensors["initial"]]
    assert torch.autograd.gradcheck(call, values, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_its_digits(kind):
    # Sums that fade let A / |A|^2 grow beyond all bounds, and every rounding with it.
    # So do matrices that are made orthogonal, which turn with the least change of what is nearly missing.
    time = 64 if KINDS[kind].get("retention") == {"name": "l_q"} or "orthogonal" in KINDS[kind] else 200
    tensors, options = inputs(kind, 2, time, places=16)
    tensors |= {name: torch.nn.functional.normalize(tensors[name], dim=-1) for name in ("queries", "keys")}
    tensors |= {name: 0.1 * tensors[name] for name in ("step", "decay", "rate") if tensors[name] is not None}
    segments, keep = Layout(2, time).segments(16, torch.device("cpu")), torch.ones(2, time, dtype=torch.bool)
    narrow = {n: x.float() if isinstance(x, torch.Tensor) else x and [y.float() for y in x] for n, x in tensors.items()}
    expected, _ = inner_loop(segments=segments, **tensors, **options)
    found, _ = inner_loop(segments=segments, **narrow, **options)
    bound = 2e-4 if options["orthogonal"] else 2e-5
    assert relative_error(found.double().transpose(1, 2)[keep], expected.transpose(1, 2)[keep]) < bound


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["ttt_linear_official", "ttt_mlp_official"])
def test_ttt_is_that_of_its_authors(name, form, shared):
    file = load_file(shared / "fixtures" / f"{name}.safetensors")
    queries, keys, values, step = (file[f"intermediate/{n}"].transpose(1, 2) for n in ("XQ", "XK", "XV", "ttt_lr"))
    layers = 2 if "mlp" in name else 1
    initial = [torch.cat([file[f"param/W{n}"], file[f"param/b{n}"]], dim=1) for n in range(1, layers + 1)]
    norm = tuple(file[f"param/ttt_norm_{n}"][:, None] for n in ("weight", "bias"))
    scale = file["intermediate/token_eta"]
    network = Network("gelu_tanh", bias=True, residual=True, normed=True, loss=Loss(half=True))
    segments = Layout(2, 21).segments(8, torch.device("cpu"))
    more = dict(network=network, norm=norm, scale=scale, form=form)
    read, state = inner_loop(initial, queries, keys, values, step, segments, **more)
    bound = 1e-9 if layers == 1 else 1e-8  # the authors' derivative of gelu has truncated constants
    assert relative_error(read.transpose(1, 2), file["intermediate/XQW"]) < bound
    place = scale[(21 - 1) % 8]
    for number in range(layers):
        weights = state.anchor[number] + place * state.momentum[number]
        expected = torch.cat([file[f"output/W{number + 1}_states"], file[f"output/b{number + 1}_states"]], dim=2)
        assert relative_error(weights, expected) < bound


@pytest.mark.parametrize("form", FORMS)
def test_windows_of_gradients_are_those_of_the_public_code(form, shared):
    """Of a linear memory that is read before it is written; its steps multiply the momentum."""
    file = load_file(shared / "fixtures" / "atlas_omega_thirdparty.safetensors")
    x, own = file["input/x"].requires_grad_(), {n[6:]: w for n, w in file.items() if n.startswith("param/")}
    parameters = [w.requires_grad_() for w in own.values()]

    def rms_normed(x):
        return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()

    normed = rms_normed(x) * own["pre_norm.weight"]
    queries, keys, values = ((normed @ own[f"to_{n}.weight"].T).unflatten(-1, (2, 6)).transpose(1, 2) for n in "qkv")
    queries, keys = (rms_normed(y) * own[f"{n}_norm.gamma"] for n, y in (("q", queries), ("k", keys)))
    gate, rate, kept, momentum = (
        (normed @ own[f"to_{n}.0.weight"].T + own[f"to_{n}.0.bias"]).sigmoid().transpose(1, 2)
        for n in ("omega_gate", "lr", "decay", "momentum")
    )
    more = dict(decay=1 - kept, momentum=momentum, rate=rate, window=torch.ones(2, 2, 24, 4, dtype=x.dtype), form=form)
    initial, segments = [torch.zeros(2, 6, 6, dtype=x.dtype)], Layout(2, 24).segments(8, torch.device("cpu"))
    queries = torch.cat([queries[:, :, 1:], queries[:, :, :1]], dim=2)  # each place answers the next one's
    network = Network(loss=Loss(half=True))
    read, state = inner_loop(initial, queries, keys, values, gate, segments, network=network, **more)
    read = torch.cat([torch.zeros_like(read[:, :, :1]), read[:, :, :-1]], dim=2).transpose(1, 2).flatten(2)
    found = {"y": read @ own["to_out.weight"].T, "S": state.current[0].mT, "Z": -state.momentum[0].mT}
    for name, y in found.items():
        assert relative_error(y, file[f"output/{name}"]) < 1e-9, name
    loss = sum((file[f"weight/{name}"] * y).sum() for name, y in found.items())
    for name, gradient in zip(
        ["x", *(f"param/{n}" for n in own)], torch.autograd.grad(loss, [x, *parameters]), strict=True
    ):
        assert relative_error(gradient, file[f"grad/{name}"]) < 1e-9, name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["depth1_chunk1", "depth2_chunk1", "depth1_chunk8", "depth2_chunk8", "depth1_muon"])
def test_titans_is_that_of_the_public_code(name, form, shared):
    """A layer around the op, with its gradients. There a chunk has one decay and one momentum, is written as a whole
    with its last token, and not at all while it lacks one."""
    path = shared / "fixtures" / f"titans_lucidrains_{name}.safetensors"
    file = load_file(path)
    with safe_open(path, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    size, spectral = config["chunk_size"], config["spectral"]
    own = {key[6:]: x.requires_grad_() for key, x in file.items() if key.startswith("param/")}
    x = file["input/seq"].requires_grad_()
    batch, time = x.shape[:2]
    complete = time // size * size

    def rms(x):
        return x * (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()

    def mapped(of, name):
        return of @ own[f"{name}.weight"].T + own.get(f"{name}.bias", 0.0)

    stored, asked = (rms(x) * own[f"{n}_norm.weight"] for n in ("store", "retrieve"))
    chunks = stored[:, :complete].unflatten(1, (-1, size)).mean(2)
    decay, momentum = (mapped(chunks, f"to_{n}.0").sigmoid().mT for n in ("decay_factor", "momentum"))
    rows = {"queries": asked, "keys": stored, "values": stored}
    rows = {n: mapped(row, f"to_{n}").unflatten(-1, (2, -1)).transpose(1, 2) for n, row in rows.items()}
    queries, keys = (rms(rows[n]) * (own[f"{n[0]}_norm.gamma"] + 1) for n in ("queries", "keys"))
    step = config["max_lr"] * mapped(stored, "to_adaptive_step.0").sigmoid().mT
    for n, found in {"queries": queries, "keys": keys, "theta": step, "alpha": decay, "eta": momentum}.items():
        assert relative_error(found, file[f"intermediate/{n}"]) < 1e-12, n
    first, last = ((torch.arange(time) % size == place) & (torch.arange(time) < complete) for place in (0, size - 1))
    momenta, decays = torch.ones(batch, 2, time, dtype=x.dtype), torch.zeros(batch, 2, time, dtype=x.dtype)
    momenta[..., first], decays[..., last] = momentum, decay
    # There the loss is the mean over the width, where the paper has the sum.
    step = torch.where(torch.arange(time) < complete, step, 0.0) / keys.shape[-1]
    rate = last.to(x.dtype).expand(batch, 2, time)
    more = dict(momentum=momenta, decay=decays, rate=rate, orthogonal=5 * spectral, network=Network(), form=form)
    initial = [own[f"memory_model_parameters.{n}"] for n in range(config["depth"])]
    initial = [w[0] if w.dim() == 4 else w for w in initial]
    segments = Layout(batch, time).segments(config["batch_size"], torch.device("cpu"))
    read, state = inner_loop(initial, queries, keys, rows["values"], step, segments, **more)
    assert relative_error(read, file["intermediate/read"]) < 1e-9
    gate = mapped(asked, "retrieve_gate.0").sigmoid().mT[..., None]
    found = {"retrieved": (gate * read).transpose(1, 2).flatten(2) @ own["combine_heads.weight"].T}
    for n in range(config["depth"]):
        found |= {f"weights/weights.{n}": state.current[n], f"momentum/weights.{n}": state.momentum[n]}
    for n, y in found.items():
        assert relative_error(y, file[f"output/{n}"]) < 1e-9, n
    loss = sum((file[f"weight/{n}"] * y).sum() for n, y in found.items())
    gradients = torch.autograd.grad(loss, [x, *own.values()])
    for n, gradient in zip(["seq", *(f"param/{n}" for n in own)], gradients, strict=True):
        assert relative_error(gradient, file[f"grad/{n}"]) < 1e-9, n


MIRAS = Network(residual=True, normed=True, eps=1e-5, loss=Loss(half=True))


def notebook(name, shared):
    """Of the notebook's layer: queries, keys, values, maps and the norm of the memory, the input and what came out."""
    file = load_file(shared / "fixtures" / f"miras_{name}_thirdparty.safetensors")
    x = file["input/x"]
    rows = [(x @ file[f"param/kv_proj.W_{n}.weight"].T)[:, None] for n in "QKV"]
    maps = [file[f"param/{n}_init"].T[None] for n in ("W2", "W1")]
    norm = tuple(file[f"param/ln.{n}"][None, None] for n in ("weight", "bias"))
    return file, rows, maps, norm, Layout(*x.shape[:2]).segments(1, torch.device("cpu"))


@pytest.mark.parametrize("form", FORMS)
def test_moneta_is_that_of_the_public_code(form, shared):
    file = load_file(shared / "fixtures" / "miras_moneta_thirdparty.safetensors")
    given = {n: file[f"input/{n}"].requires_grad_() for n in ("q", "k", "v", "eta", "alpha", "A0", "W0")}
    queries, keys, values, step, alpha, sums, weights = (x[:, None] for x in given.values())
    segments = Layout(2, 21).segments(1, torch.device("cpu"))
    never = torch.zeros_like(segments.opens)
    # Its first weights are not made of its first sums as later ones are, without the epsilon.
    segments = replace(segments, begins=never, opens=never | (torch.arange(21) > 0))
    state = InnerState([weights], [sums], [torch.zeros_like(sums)])
    network = Network(loss=Loss("l_p", power=3, sharpness=10.0))
    more = dict(decay=1 - alpha, network=network, retention=Retention("l_q", power=4), state=state, form=form)
    read, after = inner_loop([sums[0]], queries, keys, values, step, segments, **more)
    found = {"y": read[:, 0], "A": after.current[0][:, 0], "W": more["retention"].weights(after.current[0])[:, 0]}
    for name, x in found.items():
        assert relative_error(x, file[f"output/{name}"]) < 1e-9, name
    loss = sum((file[f"weight/{name}"] * x).sum() for name, x in found.items())
    for (name, _), gradient in zip(given.items(), torch.autograd.grad(loss, list(given.values())), strict=True):
        assert relative_error(gradient, file[f"grad/{name}"]) < 1e-9, name


@pytest.mark.parametrize("form", FORMS)
def test_yaad_is_that_of_the_notebook(form, shared):
    file, rows, maps, norm, segments = notebook("yaad", shared)
    delta = file["input/x"] @ file["param/delta_proj.weight"].T + file["param/delta_proj.bias"]
    delta = torch.nn.functional.softplus(delta).transpose(1, 2)
    network = replace(MIRAS, loss=Loss("huber_coordinates"))
    rates = dict(step=torch.full_like(delta, 0.1), decay=torch.full_like(delta, 0.03), delta=delta)
    read, _ = inner_loop(maps, *rows, segments=segments, network=network, norm=norm, form=form, **rates)
    assert relative_error(read[:, 0], file["output/y"]) < 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_memora_is_that_of_the_notebook(form, shared):
    file, rows, maps, norm, segments = notebook("memora", shared)
    step = torch.full((2, 1, 17), 0.5, dtype=torch.float64)
    more = dict(network=MIRAS, retention=Retention("kl", scale=file["param/c"].item()), norm=norm, form=form)
    read, _ = inner_loop([w.log() for w in maps], *rows, step, segments, decay=torch.full_like(step, 0.05), **more)
    assert relative_error(read[:, 0], file["output/y"]) < 1e-9


def test_every_loss_and_retention_is_tried():
    assert {kind.get("loss", {}).get("name", "l2") for kind in KINDS.values()} == set(LOSSES)
    assert {kind.get("retention", {}).get("name", "l2") for kind in KINDS.values()} == set(RETENTIONS)


@pytest.mark.parametrize("p", [3.0, 2.0, 1.0])
def test_smooth_losses_approach_those_they_stand_for(p):
    answer, values = torch.randn(2, 9, 5, dtype=torch.float64)
    delta = torch.full((9, 1), 2.0, dtype=torch.float64)
    for exact in (Loss("l_p", power=p), Loss("huber")):
        smooth = replace(exact, sharpness=1e7, smoothing=1e-14)
        expected = exact.errors(answer, values, delta)
        assert relative_error(smooth.errors(answer, values, delta), expected) < 1e-6
        assert relative_error(replace(smooth, sharpness=1.0).errors(answer, values, delta), expected) > 1e-2


def test_huber_is_quadratic_within_and_linear_beyond():
    """On errors of norm 5 and coordinates 3 and 4, as the paper prints it and by hand."""
    answer = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    zero = torch.zeros_like(answer)

    def errors(name, delta, **options):
        return Loss(name, **options).errors(answer, zero, torch.tensor([[delta]], dtype=torch.float64)).tolist()[0]

    assert errors("huber", 5.0) == [6, -8] and errors("huber", 5.0, half=True) == [3, -4]
    assert errors("huber", 4.5) == [4.5, -4.5]
    assert errors("huber_norm", 5.0) == [3, -4] and errors("huber_norm", 2.5) == [1.5, -2.0]
    assert errors("huber_coordinates", 3.5) == [3, -3.5]
    assert errors("shifted", 1.0) == pytest.approx([3.6, -4.8])


def test_retentions_solve_the_problems_they_are_made_for():
    """Each minimises over W what the paper states; found here by descent, or by its condition."""
    sums = torch.randn(4, 3, dtype=torch.float64)
    # <W, -A> + 1/2 |W|_r^2 with r = q / (q - 1)
    weights = Retention("l_q_minimiser", power=3.0, eps=0.0).weights(sums).requires_grad_()
    stated = 0.5 * weights.abs().pow(1.5).sum().pow(2 / 1.5) - (weights * sums).sum()
    assert torch.autograd.grad(stated, weights)[0].abs().max() < 1e-9
    # <W, -A> + gamma |W|_1 + 1/2 |W|_2^2
    weights = Retention("elastic_net", threshold=0.3).weights(sums).requires_grad_()
    (slope,) = torch.autograd.grad(0.5 * weights.square().sum() - (weights * sums).sum(), weights)
    assert torch.where(weights == 0, slope.abs() <= 0.3, (slope + 0.3 * weights.sign()).abs() < 1e-9).all()
    assert (weights == 0).any() and (weights != 0).any()
    # <W, -A> + sum of W log W, with columns that add up to c
    weights = Retention("kl", scale=2.0).weights(sums)
    multiplier = weights.log() - sums
    assert (multiplier - multiplier[:1]).abs().max() < 1e-9
    assert relative_error(weights.sum(0), torch.full((3,), 2.0)) < 1e-9
    # A = logit W
    assert relative_error(Retention("logit").weights(sums).logit(), sums) < 1e-9
    # as printed
    norm = sums.pow(4).sum().pow(0.25)
    assert relative_error(Retention("l_q", power=4.0, eps=0.0).weights(sums), sums / norm**2) < 1e-9


# How the paper writes a token's step, of what is forgotten of the weights and of a step down the slope.
WRITTEN = {
    "kl": lambda w, kept, down: 2.0 * (kept * w.log() + down).softmax(0),
    "elastic_net_proximal": lambda w, kept, down: torch.nn.functional.softshrink(kept * w + down, 0.1),
    "logit": lambda w, kept, down: (kept * w.logit() + down).sigmoid(),
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_retentions_of_weights_are_as_the_paper_writes_them(kind):
    """One token after the other, with channels."""
    tensors, options = inputs(kind, 1, 7, batch=1, heads=1)
    tensors |= {"momentum": None} | {n: torch.rand(1, 1, 7, 2, dtype=torch.float64) for n in ("step", "decay")}
    read, _ = inner_loop(segments=Layout(1, 7).segments(1, torch.device("cpu")), **tensors, **options)
    weights = options["retention"].weights(tensors["initial"][0][0])
    for t in range(7):
        key, value, query = (tensors[n][0, 0, t] for n in ("keys", "values", "queries"))
        decay, step = (tensors[n][0, 0, t].repeat(2) for n in ("decay", "step"))
        slope = 2 * key[:, None] * (key @ weights - value)
        weights = WRITTEN[kind](weights, 1 - decay, -step * slope)
        assert relative_error(read[0, 0, t], query @ weights) < 1e-9


def test_channels_are_those_of_the_outputs_of_every_map():
    """As many channels as outputs are the row that multiplies a matrix from the right."""
    tensors, options = inputs("both", 1, 6, batch=1, heads=1)
    tensors |= {n: torch.rand(1, 1, 6, 4, dtype=torch.float64) for n in ("step", "decay")}
    read, _ = inner_loop(segments=Layout(1, 6).segments(1, torch.device("cpu")), **tensors, **options)
    weights, momentum = tensors["initial"][0][0], 0.0
    for t in range(6):
        key, value, query = (tensors[n][0, 0, t] for n in ("keys", "values", "queries"))
        slope = 2 * key[:, None] * (key @ weights - value)
        momentum = tensors["momentum"][0, 0, t] * momentum - slope @ tensors["step"][0, 0, t].diag()
        weights = weights @ (1 - tensors["decay"][0, 0, t]).diag() + momentum
        assert relative_error(read[0, 0, t], query @ weights) < 1e-9


def test_refuses_what_it_cannot_compute():
    tensors, options = inputs("both", 2, 6)
    segments = Layout(2, 6).segments(4, torch.device("cpu"))

    def call(changes=None, **changed):
        return inner_loop(segments=segments, **tensors | (changes or {}), **options | changed)

    with pytest.raises(ValueError, match="from 4 to 4 in 2 heads"):
        call({"initial": tensors["initial"][:1] + [tensors["initial"][1][..., :2]]})
    with pytest.raises(ValueError, match="neither momentum, decay nor a retention"):
        call({"scale": torch.ones(4, dtype=torch.float64)})
    with pytest.raises(ValueError, match="neither momentum, decay nor a retention"):
        scale = torch.ones(4, dtype=torch.float64)
        call({"scale": scale, "momentum": None, "decay": None}, retention=Retention("kl"))
    with pytest.raises(ValueError, match="go together"):
        call(network=Network(normed=True))
    with pytest.raises(ValueError, match="'huber' needs a delta"):
        call(network=Network(loss=Loss("huber")))
    with pytest.raises(ValueError, match="'l2' takes no delta"):
        call({"delta": tensors["step"]})
    with pytest.raises(ValueError, match="inner_loop got steps"):
        call({"step": tensors["step"][:1]})
    with pytest.raises(ValueError, match="decays of 3 channels"):
        call({"decay": tensors["decay"][..., None].repeat(1, 1, 1, 3)})
    many = tensors["decay"][..., None].repeat(1, 1, 1, 2)
    with pytest.raises(ValueError, match="deltas of 2 channels"):
        call({"delta": many}, network=Network(loss=Loss("huber_norm")))
    with pytest.raises(ValueError, match="without channels"):
        call({"decay": many}, retention=Retention("kl", over="outputs"))
    for wrong, match in (
        (lambda: Loss("l3"), "loss is 'l3'"),
        (lambda: Loss(power=0.5), "at least 1"),
        (lambda: Retention("l3"), "retention is 'l3'"),
        (lambda: Retention(threshold=-1.0), "at least 0"),
        (lambda: Network("relu"), "activation is 'relu'"),
    ):
        with pytest.raises(ValueError, match=match):
            wrong()
