"""Memories that are weights, against other people's layers."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import relative_error
from mosaics.memories import Common, Context, Layout
from mosaics.memories.contract import build
from mosaics.memories.fast_weights.atlas import polynomial
from mosaics.memories.fast_weights.common import unit


def test_mamba2_is_that_of_transformers(shared):
    path = shared / "fixtures" / "mamba2_transformers.safetensors"
    file = load_file(path)
    with safe_open(path, "pt") as opened:
        sizes = json.loads(opened.metadata()["config"])
    options = {
        "num_attention_heads": sizes["num_heads"],
        "head_width": sizes["head_dim"],
        "state_width": sizes["state_size"],
        "num_key_heads": sizes["n_groups"],
    }
    memory = build("mamba2", options, Common(sizes["hidden_size"], norm_eps=sizes["norm_eps"]), 0).double()
    names = {
        "in_proj.weight": "in_proj.weight",
        "out_proj.weight": "out_proj.weight",
        "convolution.bias": "conv1d.bias",
        "decay_rate": "A_log",
        "step_bias": "dt_bias",
        "skip": "D",
        "read_scale": "norm.weight",
    }
    own = {name: file[f"param/{theirs}"] for name, theirs in names.items()}
    memory.load_state_dict(own | {"convolution.weight": file["param/conv1d.weight"][:, 0]})
    x = file["input/hidden_states"].requires_grad_()
    y, _ = memory(x, Layout(*x.shape[:2]), None, Context())
    assert relative_error(y, file["output/hidden_states"]) < 1e-9
    (file["weight/hidden_states"] * y).sum().backward()
    assert relative_error(x.grad, file["grad/hidden_states"]) < 1e-9
    parameters = dict(memory.named_parameters())
    for name, theirs in (names | {"convolution.weight": "conv1d.weight"}).items():
        expected = file[f"grad/param/{theirs}"]
        assert relative_error(parameters[name].grad, expected.view(parameters[name].shape)) < 1e-9, name
    assert torch.isfinite(y).all()


TTT = {
    "ttt_linear_official": {"network": "linear", "base_rate": 1.0},
    "ttt_mlp_official": {"network": "mlp", "base_rate": 0.5},
    "ttt_linear_official_conv_gate": {"network": "linear", "convolution": 4, "gate": True},
}


def ttt_parameters(theirs):
    """Theirs, or their gradients, as ours: both biases of a network are rows of its maps."""
    own = {
        "place_rates": theirs["learnable_token_idx"],
        "rate_proj.weight": theirs["learnable_ttt_lr_weight"][:, 0],
        "rate_proj.bias": theirs["learnable_ttt_lr_bias"][:, 0],
        "norm_scale": theirs["ttt_norm_weight"],
        "norm_shift": theirs["ttt_norm_bias"],
        "read_scale": theirs["post_norm.weight"],
        "read_shift": theirs["post_norm.bias"],
        "o_proj.weight": theirs["o_proj.weight"],
    }
    for ours, other in (("gate_proj", "g_proj"), ("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj")):
        if f"{other}.weight" in theirs:
            own[f"{ours}.weight"] = theirs[f"{other}.weight"]
    for letter in "qk":
        if f"conv_{letter}.weight" in theirs:
            own[f"{letter}_convolution.weight"] = theirs[f"conv_{letter}.weight"][:, 0]
            own[f"{letter}_convolution.bias"] = theirs[f"conv_{letter}.bias"]
    for number in range(1 + ("W2" in theirs)):
        own[f"maps.weights.{number}"] = torch.cat([theirs[f"W{number + 1}"], theirs[f"b{number + 1}"]], dim=1)
    return own


@pytest.mark.parametrize("name", TTT)
def test_ttt_is_that_of_its_authors(name, shared):
    path = shared / "fixtures" / f"{name}.safetensors"
    file = load_file(path)
    with safe_open(path, "pt") as opened:
        config = json.loads(opened.metadata()["config"])
    options = TTT[name] | {"num_attention_heads": 2, "chunk": 8, "base_rate": config["ttt_base_lr"]}
    memory = build("ttt", options, Common(config["hidden_size"]), 0).double()
    memory.load_state_dict(ttt_parameters({key[6:]: x for key, x in file.items() if key.startswith("param/")}))
    x = file["input/hidden_states"].requires_grad_()
    y, state = memory(x, Layout(*x.shape[:2]), memory.initial_state(), Context())
    bound = 1e-9 if "linear" in name else 1e-8  # the authors' derivative of gelu has truncated constants
    assert relative_error(y, file["output/hidden_states"]) < bound
    loss = (file["weight/hidden_states"] * y).sum()
    rate = (1 / ((21 - 1) % 8 + 1) + memory.place_rates[(21 - 1) % 8]).clamp(min=0)
    for number, own in enumerate(state.maps):
        weights, bias = (own.anchor + rate * own.momentum).split([own.anchor.shape[2] - 1, 1], dim=2)
        for letter, found in (("W", weights), ("b", bias)):
            assert relative_error(found, file[f"output/{letter}{number + 1}_states"]) < bound
            loss = loss + (file[f"weight/{letter}{number + 1}_states"] * found).sum()
    loss.backward()
    assert relative_error(x.grad, file["grad/hidden_states"]) < bound
    theirs = ttt_parameters({key[11:]: x for key, x in file.items() if key.startswith("grad/param/")})
    found = dict(memory.named_parameters())
    assert theirs.keys() == found.keys()
    for key, gradient in theirs.items():
        assert relative_error(found[key].grad, gradient) < bound, key
    assert relative_error(memory.q_proj.weight.grad, file["grad/param/q_proj.weight"]) < bound
    assert relative_error(memory.place_rates.grad, file["grad/param/learnable_token_idx"]) < bound


MIRAS = {
    "moneta": {"loss": "l_p", "retention": "l_q"},
    "yaad": {"loss": "huber"},
    "memora": {"retention": "kl", "base_step": 0.2},
}


@pytest.mark.parametrize("name", MIRAS)
def test_miras_is_the_recurrence_of_the_paper(name):
    """Equations 24 to 32 for matrices as the paper writes them, one token after the other, by automatic derivatives."""
    memory = build(
        "miras", MIRAS[name] | {"num_attention_heads": 1, "chunk": 1, "convolution": 0}, Common(6), 0
    ).double()
    memory.reset_parameters(0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "yaad":
            memory.rates["delta"][1].bias.fill_(4.0)  # errors on both sides of it
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    y, _ = memory(x, Layout(1, 9), None, Context())
    x = x[0]
    q, k = (unit(proj(x)) for proj in (memory.q_proj, memory.k_proj))
    alpha = torch.sigmoid(memory.rates["retain"](x))
    eta = memory.options.base_step / 6 * torch.nn.functional.softplus(memory.rates["step"](x))
    kept = [w[0].T.detach() for w in memory.maps.weights]  # W_2 (4 d, d) and W_1 (d, 4 d), or A
    norms = torch.nn.functional.layer_norm
    branches = set()

    def answer(weights, x):
        inner = weights[1] @ torch.nn.functional.gelu(weights[0] @ x)
        return x + norms(inner, (6,), memory.norm_scale[0], memory.norm_shift[0], 1e-5)

    def weights_of(kept):
        if name == "moneta":
            return [a / ((a**4).sum() ** 0.5 + 1e-6) for a in kept]
        if name == "memora":
            return [a.shape[1] ** 0.5 * a.softmax(1) for a in kept]
        return kept

    reads, weights = [], weights_of(kept)
    for t in range(9):
        own = [w.detach().requires_grad_() for w in weights]
        answered = answer(own, k[t])
        e = answered - memory.v_proj(x[t])
        error = 2 * e
        if name == "moneta":
            error = 3 * torch.tanh(10 * e) * (e**2 + 1e-6)
        if name == "yaad":
            delta = torch.nn.functional.softplus(memory.rates["delta"](x[t]))
            error = torch.where(e.norm() <= delta, 2 * e, delta * torch.tanh(10 * e))
            branches |= set((e.norm() <= delta).tolist())
        slopes = torch.autograd.grad(answered, own, error)
        rows = [alpha[t].repeat(4)[:, None], alpha[t][:, None]], [eta[t].repeat(4)[:, None], eta[t][:, None]]
        if name == "memora":
            kept = [w.log() for w in weights]
        kept = [a * m - h * g for a, m, h, g in zip(rows[0], kept, rows[1], slopes, strict=True)]
        weights = weights_of(kept)
        reads.append(answer(weights, q[t]))
    read = torch.stack(reads)
    read = read * (read.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * memory.read_scale
    assert relative_error(y[0], memory.o_proj(read * memory.gate_proj(x))) < 1e-9
    assert name != "yaad" or branches == {False, True}


@pytest.mark.parametrize("renormalised", [True, False])
@pytest.mark.parametrize("form", ["decoding", "encoding", "similarity"])
def test_lattice_is_the_recurrence_of_the_paper(form, renormalised):
    """Slot by slot and one token after the other, as docs/memories/lattice.md has it."""
    options = dict(num_attention_heads=1, chunk=1, convolution=0, slots=4, form=form, renormalised=renormalised)
    memory = build("lattice", options, Common(6), 0).double()
    memory.reset_parameters(0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(1, 9, 6, dtype=torch.float64)
    y, _ = memory(x, Layout(1, 9), None, Context())
    x, silu = x[0], torch.nn.functional.silu
    q, k = (unit(silu(proj(x))) for proj in (memory.q_proj, memory.k_proj))
    v = silu(memory.v_proj(x))
    v = unit(v) if form == "encoding" else v
    g, a = memory.rates_proj(x).sigmoid().unbind(-1)

    def norm(s):
        return (s @ s + 1e-6).sqrt()

    slots, reads = list(memory.slots[0]), []
    for t in range(9):
        if renormalised:
            slots = [s / norm(s) for s in slots]
        phi = [s / norm(s) for s in slots]
        h = v[t] - sum(c * p for c, p in zip(k[t], phi, strict=True)) if form == "decoding" else v[t]
        codes = [c - p @ v[t] if form == "encoding" else c for c, p in zip(k[t], phi, strict=True)]
        slots = [a[t] * s + g[t] * c / norm(s) * (h - p * (p @ h)) for s, c, p in zip(slots, codes, phi, strict=True)]
        reads.append(sum(w * s / norm(s) for w, s in zip(q[t], slots, strict=True)))
    read = torch.stack(reads)
    read = read * (read.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * memory.read_scale
    assert relative_error(y[0], memory.o_proj(read * silu(memory.gate_proj(x)))) < 1e-9


OMEGA = {
    "omeganet": {},
    "atlas": {"momentum": True, "orthogonal": 5, "largest_step": 0.1},
    "atlas-plus": {"momentum": True, "orthogonal": 5, "largest_step": 0.1, "network": "gated"},
    "dla": {"loss": "dot", "degree": 1, "window": 1},
    "swla": {"loss": "dot", "degree": 1, "window": 2, "network": "linear", "gates": "place"},
}


@pytest.mark.parametrize("name", OMEGA)
def test_omega_is_the_recurrence_of_the_paper(name):
    """For matrices as the paper writes them, one token after the other, by automatic derivatives; each gradient as it
    was taken in its own chunk."""
    torch.manual_seed(0)
    window, chunk = OMEGA[name].get("window", 3), 4
    options = {"num_attention_heads": 1, "window": window, "chunk": chunk, "convolution": 0} | OMEGA[name]
    memory = build("omega", options, Common(5), 0).double()
    memory.reset_parameters(0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(1, 11, 5, dtype=torch.float64)
    y, _ = memory(x, Layout(1, 11), None, Context())
    x = x[0]
    rates = memory.rates_proj(x).sigmoid()
    eta, alpha, gates = memory.options.largest_step * rates[:, 0], 1 - rates[:, 1], rates[:, -1:] / window
    weights = [w[0].T.detach() for w in memory.maps.weights]  # W_2, with W_3 below it, and W_1; or W
    if name == "atlas-plus":
        weights = [*weights[0].chunk(2), weights[1]]

    def features(x):
        if memory.options.degree == 1:
            return x
        upper = torch.triu_indices(5, 5)
        outer = torch.outer(x, x)[upper[0], upper[1]]
        outer = torch.where(upper[0] == upper[1], outer, 2**0.5 * outer)
        roots = memory.coefficient_roots
        return torch.cat([roots[1] * x, roots[2] * outer, roots[:1]])

    def answer(weights, x):
        if name == "swla":
            return weights[0] @ x
        inner = torch.nn.functional.gelu(weights[0] @ x)
        return x[:5] + weights[-1] @ (inner * (weights[1] @ x) if name == "atlas-plus" else inner)

    momentum, slopes, reads = [torch.zeros_like(w) for w in weights], [], []
    for t in range(11):
        if t % chunk == 0:
            anchor = [w.detach().requires_grad_() for w in weights]
        answered, value = answer(anchor, features(unit(memory.k_proj(x[t])))), memory.v_proj(x[t])
        loss = -(answered @ value) if memory.options.loss == "dot" else (answered - value).square().sum()
        slopes.append(torch.autograd.grad(loss, anchor, retain_graph=True))
        for number, (w, s) in enumerate(zip(weights, momentum, strict=True)):
            window_sum = torch.zeros_like(w)
            for i in range(max(0, t - window + 1), t + 1):
                gate = rates[t, 2 + t - i] / window if name == "swla" else gates[i]
                window_sum = window_sum + gate * slopes[i][number]
            s = (rates[t, 2] if memory.options.momentum else 0.0) * s - window_sum
            momentum[number] = s
            if memory.options.orthogonal:
                s = s / s.norm()
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s @ s.T @ s + 2.0315 * s @ s.T @ s @ s.T @ s
            weights[number] = alpha[t] * w + eta[t] * s
        reads.append(answer(weights, features(unit(memory.q_proj(x[t])))))
    read = torch.stack(reads)
    read = read * (read.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * memory.read_scale
    assert relative_error(y[0], memory.o_proj(read * memory.gate_proj(x))) < 1e-9


@pytest.mark.parametrize("degree", [2, 3])
def test_polynomials_have_the_kernel_of_the_paper(degree):
    roots = torch.rand(degree + 1, dtype=torch.float64)
    q, k = torch.randn(2, 7, 4, dtype=torch.float64)
    found = (polynomial(q, roots) * polynomial(k, roots)).sum(-1)
    assert relative_error(found, sum(a**2 * (q * k).sum(-1) ** i for i, a in enumerate(roots))) < 1e-12
    assert polynomial(q, roots).shape == (7, math.comb(4 + degree, degree))


def test_omega_of_a_matrix_and_one_token_is_gated_linear_attention():
    """DLA with a matrix: alpha_t M + eta_t v k^T."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 2, "network": "linear", "loss": "dot", "degree": 1, "window": 1, "convolution": 0}
    memory = build("omega", options, Common(8), 0).double()
    memory.reset_parameters(0)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    y, _ = memory(x, Layout(1, 20), None, Context())
    q, k, v = (p(x[0]).unflatten(-1, (2, 4)).transpose(0, 1) for p in (memory.q_proj, memory.k_proj, memory.v_proj))
    eta, decay, gate = memory.rates_proj(x[0]).sigmoid().T.unflatten(0, (3, 2))
    since = (1 - decay).log().cumsum(-1)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    weights = (since[:, :, None] - since[:, None]).exp().masked_fill(~mask, 0.0) * (0.01 * eta * gate)[:, None]
    read = (unit(q) @ unit(k).mT * weights) @ v + since.exp()[..., None] * (unit(q) @ memory.maps.weights[0])
    read = (read * (read.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * memory.read_scale).transpose(0, 1).flatten(1)
    assert relative_error(y[0], memory.o_proj(read * memory.gate_proj(x[0]))) < 1e-9


DEEP = {
    "deep-transformer": {},
    "swdt": {"window": 3},
    "dot": {"window": 3, "loss": "l2"},
    "one map": {"window": 2, "loss": "l2", "network": "linear", "decay": False},
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_attention_is_the_recurrence_of_the_paper(name):
    """One token after the other: errors behind the first map beside their keys, asked by the exponential kernel, each
    as it was at its own chunk's start; the second map as a matrix."""
    torch.manual_seed(0)
    options = {"num_attention_heads": 1, "chunk": 4, "convolution": 0, "largest_step": 2.0} | DEEP[name]
    memory = build("deep_attention", options, Common(5), 0).double()
    memory.reset_parameters(0)
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    x, deep = torch.randn(1, 11, 5, dtype=torch.float64), memory.second is not None
    y, _ = memory(x, Layout(1, 11), None, Context())
    x, window, sharpness = x[0], memory.options.window, memory.sharpness[0].exp()
    rates = memory.rates_proj(x).sigmoid()
    alpha = 1 - rates[:, 2] if memory.options.decay else torch.ones(11, dtype=torch.float64)
    keys, errors, slopes, reads = [], [], [], []
    weights, second = torch.zeros(0, dtype=torch.float64), memory.second[0] if deep else None

    def behind(asked, weights):
        """What the first map answers."""
        sums = [-w * (sharpness * (asked @ k - 1)).exp() * e for w, k, e in zip(weights, keys, errors, strict=False)]
        return sum(sums, torch.zeros(memory.units, dtype=torch.float64))

    def answer(z, second):
        return torch.nn.functional.gelu(z) @ second if deep else z

    for t in range(11):
        if t % 4 == 0:
            anchor = weights, second
        key, value = unit(memory.k_proj(x[t])), memory.v_proj(x[t])
        z = behind(key, anchor[0]).detach().requires_grad_()
        learnt = [z] + ([anchor[1].detach().requires_grad_()] if deep else [])
        answered = answer(z, learnt[-1])
        loss = (answered - value).square().sum() if memory.options.loss == "l2" else -(answered @ value)
        error, *slope = torch.autograd.grad(loss, learnt)
        keys.append(key)
        errors.append(error)
        slopes.append(slope)
        gates = [rates[i, 1] / window if i > t - window else 0.0 for i in range(t + 1)]
        eta = 2.0 * rates[t, 0]
        weights = torch.stack([alpha[t] * w + eta * g for w, g in zip([*weights, 0.0], gates, strict=True)])
        if deep:
            second = alpha[t] * second - eta * sum(g * s[0] for g, s in zip(gates, slopes, strict=True))
        reads.append(answer(behind(unit(memory.q_proj(x[t])), weights), second))
    read = torch.stack(reads)
    read = read * (read.square().mean(-1, keepdim=True) + 1e-20).rsqrt() * memory.read_scale
    assert relative_error(y[0], memory.o_proj(read * memory.gate_proj(x))) < 1e-9
