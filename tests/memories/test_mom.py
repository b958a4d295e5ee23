"""Mixture-of-Memories, against its equations, the authors' layer and both of their losses."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers import relative_error, tokens
from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.memories import Common, Context, Layout
from mosaics.memories.contract import build


def made(width=8, layer_index=0, **options):
    torch.manual_seed(1)
    memory = build("mom", {"num_attention_heads": 2, **options}, Common(width), layer_index).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_(std=0.7)
    return memory


def looped(memory, x, document):
    """The equations, one token and one memory at a time; `document` is what each position of each row is of."""
    o, heads, scale = memory.options, memory.heads, memory.width**-0.5
    size, answers = memory.convolution.weight.shape[1], torch.zeros_like(x)

    def read(inputs, weights, strength, decay):
        """One token that is written and read, after the inputs of its memory so far."""
        mixed = sum(memory.convolution.weight[:, size - 1 - j] * y for j, y in enumerate(inputs[::-1][:size]))
        keys = heads * memory.width
        query, key, value = (y.view(heads, -1) for y in F.silu(mixed).split([keys, keys, mixed.shape[0] - 2 * keys]))
        query, key = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (query, key))
        log_decay = -memory.decay_rate.exp() * F.softplus(decay + memory.decay_bias)
        weights = log_decay.exp()[:, None, None] * weights
        error = value - torch.einsum("hkv,hk->hv", weights, key)
        weights = weights + strength.sigmoid()[:, None, None] * key[..., None] * error[:, None]
        return torch.einsum("hkv,hk->hv", weights, scale * query), weights

    rows = []
    for row, ids in zip(x, document, strict=True):
        line = []
        for t, own in enumerate(row):
            if t == 0 or ids[t] != ids[t - 1]:
                inputs = [[] for _ in range(o.memories + 1)]
                states = [x.new_zeros(heads, memory.width, memory.value_width)] * (o.memories + 1)
            weight, which = memory.router(own).softmax(-1).topk(o.routed)
            total = 0
            for g, m in [*zip(weight / weight.sum(), which.tolist(), strict=True), *[(1.0, o.memories)] * o.shared]:
                pairs = memory.pair_projs[0 if o.single_maps else m](own)
                keys_and_values, strength, decay = pairs.split([len(pairs) - 2 * heads, heads, heads])
                inputs[m] = [*inputs[m], torch.cat([memory.q_proj(own), keys_and_values])]
                answer, states[m] = read(inputs[m], states[m], strength, decay)
                total = total + g * answer
            total = total / (total.square().mean(-1, keepdim=True) + memory.common.norm_eps).sqrt()
            line.append(memory.o_proj((total * memory.read_scale).flatten() * F.silu(memory.gate_proj(own))))
        rows.append(torch.stack(line))
    return torch.stack(rows).view(answers.shape)


OPTIONS = [
    {},
    {"memories": 3, "routed": 1, "single_maps": True, "convolution": 2},
    {"memories": 3, "routed": 2, "shared": False, "key_width": 3, "value_width": 5},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("training", [False, True])
def test_mom_is_its_equation_in_values_and_gradients(options, training):
    """In training as at evaluation, with documents that share a row."""
    memory = made(**options).train(training)
    x = torch.randn(2, 15, 8, dtype=torch.float64, requires_grad=True)
    document = torch.tensor([[0] * 6 + [1] * 9, [0] * 15])
    layout, _, _ = Layout.of(2, 15, document_ids=document)
    y, _ = memory(x, layout, None, Context())
    expected = looped(memory, x, document.tolist())
    assert relative_error(y, expected) < 1e-9
    inputs, weight = [x, *memory.parameters()], torch.randn_like(y)
    both = (torch.autograd.grad((weight * z).sum(), inputs, retain_graph=True) for z in (y, expected))
    for found, known in zip(*both, strict=True):  # of a router that chooses one memory it is 0
        assert (found - known).norm() < 1e-9 * known.norm() + 1e-13


def test_mom_memory_without_tokens_is_as_it_was():
    """A router that sends all to the first two memories leaves the states of the others."""
    memory = made(routed=2)
    with torch.no_grad():
        memory.router.weight.zero_()
        memory.router.weight[:2, 0] = 9.0
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    x[..., 0] = 1.0
    _, state = memory(x, Layout(1, 6), memory.initial_state(), Context())
    assert state.tokens.tolist() == [[6, 6, 0, 0]]
    assert state.routed.weights[0, :2].abs().amin(dim=(1, 2, 3)).min() > 0
    assert not state.routed.weights[0, 2:].any() and not state.routed.tail[0, 2:].any()
    before = state.routed.weights.clone()
    with torch.no_grad():
        memory.router.weight.neg_()
    _, state = memory(x, Layout(1, 6, stored=6), state, Context())
    assert torch.equal(state.routed.weights[0, :2], before[0, :2]) and state.routed.weights[0, 2:].any()


@pytest.mark.parametrize("name", ["mom_layer", "mom_layer_single_kv"])
def test_mom_is_that_of_its_authors(name, shared):
    path = shared / "fixtures" / f"{name}.safetensors"
    file = load_file(path)
    with safe_open(path, "pt") as opened:
        sizes = json.loads(opened.metadata()["config"])
    options = {
        "num_attention_heads": sizes["num_heads"],
        "key_width": sizes["head_dim"],
        "memories": sizes["num_memories"],
        "routed": sizes["topk"],
        "shared": sizes["shared_mem"],
        "single_maps": sizes["single_kv_proj"],
    }
    memory = build("mom", options, Common(sizes["hidden_size"]), 0).double()
    names = {
        "router.weight": ["gate.weight"],
        "q_proj.weight": ["q_proj.weight"],
        "gate_proj.weight": ["g_proj.weight"],
        "o_proj.weight": ["o_proj.weight"],
        "convolution.weight": [f"{letter}_conv1d.weight" for letter in "qkv"],
        "decay_rate": ["A_log"],
        "decay_bias": ["dt_bias"],
        "read_scale": ["o_norm.weight"],
        f"pair_projs.{len(memory.pair_projs) - 1}.weight": [f"shared_{letter}.weight" for letter in "kvba"],
    }
    for m in range(len(memory.pair_projs) - 1):
        names[f"pair_projs.{m}.weight"] = [f"{letter}_proj.{m}.weight" for letter in "kvba"]

    def theirs(prefix, own):
        found = torch.cat([file[f"{prefix}/{one}"] for one in names[own]])
        return found[:, 0] if own == "convolution.weight" else found

    memory.load_state_dict({own: theirs("param", own) for own in names})
    x = file["input/hidden_states"].requires_grad_()
    y, _ = memory(x, Layout(*x.shape[:2]), None, Context())
    logits = memory.router(x).flatten(0, 1)
    assert relative_error(y, file["output/hidden_states"]) < 1e-9
    assert relative_error(logits, file["output/router_logits"]) < 1e-9
    ((file["weight/hidden_states"] * y).sum() + (file["weight/router_logits"] * logits).sum()).backward()
    assert relative_error(x.grad, file["grad/hidden_states"]) < 1e-9
    for own, parameter in memory.named_parameters():
        assert relative_error(parameter.grad, theirs("grad/param", own)) < 1e-9, own


def losses(balance, logits, layout=None, scale=1.0):
    """What layers whose router logits are given add, and their context."""
    context = Context()
    for index, one in enumerate(logits):
        options = {"num_attention_heads": 1, "memories": one.shape[-1], "balance": balance, "balance_scale": scale}
        memory = build("mom", options, Common(one.shape[-1]), index).double().train()
        with torch.no_grad():
            memory.reset_parameters(index)
            memory.router.weight.copy_(torch.eye(one.shape[-1]))
        memory(one, layout or Layout(*one.shape[:2]), None, context)
    return sum(context.auxiliary_losses)


@pytest.mark.parametrize("name, balance", [("mom_aux_loss", "joint"), ("mom_aux_loss_layerwise", "layers")])
def test_mom_balances_as_its_authors(name, balance, shared):
    file = load_file(shared / "fixtures" / f"{name}.safetensors")
    logits = [file[f"input/router_logits_{i}"].requires_grad_() for i in range(2)]
    found = losses(balance, [one.view(-1, *one.shape[-2:]) for one in logits])
    assert relative_error(found, file["output/aux_loss"][0]) < 1e-9
    (found * file["weight/aux_loss"][0]).backward()
    for i, one in enumerate(logits):
        assert relative_error(one.grad, file[f"grad/router_logits_{i}"]) < 1e-9


@pytest.mark.parametrize("balance", ["joint", "layers"])
@pytest.mark.parametrize("stored", [0, 2])
def test_mom_balance_is_that_of_documents_alone(balance, stored):
    """Packing and padding change nothing, also where an earlier call opened the documents; three layers."""
    whole = [torch.randn(2, 9, 4, dtype=torch.float64) for _ in range(3)]
    document = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    _, _, rows = Layout.of(2, 2, document_ids=document[:, :2])
    layout, _, _ = Layout.of(2, 9, mask, document, rows if stored else None, stored)
    found = losses(balance, whole, layout, scale=0.3)
    parts = [(0, 0, 4), (0, 4, 9), (1, 0, 6)]
    if balance == "layers":
        alone = [losses(balance, [x[r : r + 1, a:b] for x in whole], scale=0.3) for r, a, b in parts]
        expected = sum(alone) / 3
    else:
        expected = losses(balance, [torch.cat([x[r, a:b] for r, a, b in parts])[None] for x in whole], scale=0.3)
    assert relative_error(found, expected) < 1e-12


def test_mom_balance_counts_in_training_alone_and_reaches_the_router():
    def model(scale):
        config = MosaicConfig.from_preset(
            "mom-tiny", vocab_size=61, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=12, balance_scale=scale,
        )  # fmt: skip
        torch.manual_seed(2)
        return MosaicForCausalLM(config).double()

    ids, plain, balanced = tokens(2, 20), model(0.0), model(0.5)
    one, other = plain(ids, labels=ids).loss, balanced(ids, labels=ids).loss
    assert 0.5 * 2 * 0.9 < other - one < 0.5 * 2 * 2  # 2 of 4 used alike give 2
    (other - one).backward()
    routers = [p.grad for name, p in balanced.named_parameters() if "router" in name]
    assert len(routers) == 2 and all(g.any() for g in routers)
    assert torch.equal(plain.eval()(ids, labels=ids).loss, balanced.eval()(ids, labels=ids).loss)
