"""Memory Mosaics v1 against its equations, written out position by position, and against the authors' own outputs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from helpers import relative_error, tokens
from mosaics.models.convert_v1 import from_memory_mosaics_v1, read_memory_mosaics_v1

SCALARS = {"decay": 0.3, "scale": 0.1, "mix": 0.5, "length": -0.05}
NANO = {
    "emb": "mosaic.wte",
    "norm": "mosaic.ln_f",
    "block": "mosaic.h.{}.",
    "norms": ("ln_1", "ln_2"),
    "memories": ("attn", "mlp"),
    "key": "k_featurizer.W_k",
    "value": "v_featurizer.W_v",
    "decay": "k_featurizer.leaky_avg.leaky_key_beta",
    "scale": "k_featurizer.key_scale",
    "mix": "v_featurizer.coef",
    "length": ("v_featurizer.val_scale", "out_scale"),
}
LIBRARY = {
    "emb": "emb",
    "norm": "ln_out",
    "block": "blocks.{}.",
    "norms": ("ln1", "ln2"),
    "memories": ("attn", "pmem"),
    "key": "k_featurizer.conv",
    "value": "v_featurizer.linear",
    "decay": "leaky_key_beta",
    "scale": "kernel_beta",
    "mix": "v_featurizer.coef",
    "length": ("value_beta", "value_beta"),
}
CUDA = {**LIBRARY, "key": "leaky_average.linear", "decay": "leaky_average.leaky_beta_w_under"}
NAMINGS = {"nano": NANO, "library": LIBRARY, "cuda": CUDA}


def random_weights(naming, seed=0, layers=2, heads=2, width=3, pairs=5, banks=2, bias=True, vocabulary=61):
    """Random weights under the authors' names and in their shapes."""
    generator = torch.Generator().manual_seed(seed)
    names, d = NAMINGS[naming], heads * width
    scalar_shape = (1, heads, 1, 1) if naming == "nano" else (heads,)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {f"{names['emb']}.weight": normal(vocabulary, d)}

    def linear(name, *tail):
        found[f"{name}.weight"] = normal(d, d, *tail)
        if bias:
            found[f"{name}.bias"] = normal(d)

    def norm(name):
        found[f"{name}.weight"] = 1 + 0.3 * normal(d)
        if bias:
            found[f"{name}.bias"] = 0.3 * normal(d)

    norm(names["norm"])
    for layer in range(layers):
        block = names["block"].format(layer)
        for which, memory in enumerate(names["memories"]):
            norm(block + names["norms"][which])
            linear(f"{block}{memory}.{names['key']}", *((1,) if naming == "library" else ()))
            linear(f"{block}{memory}.c_proj")
            if which == 0:
                linear(f"{block}{memory}.{names['value']}")
            scalars = {k: names[k] for k in ("decay", "scale", *(("mix",) if which == 0 else ()))}
            for kind, name in {**scalars, "length": names["length"][which]}.items():
                found[f"{block}{memory}.{name}"] = SCALARS[kind] * (1 + 0.3 * normal(*scalar_shape))
            if which == 1 and naming == "nano":
                found |= {f"{block}mlp.P_{x}": normal(banks, 1, heads, pairs, width) for x in "kv"}
            elif which == 1:
                found |= {
                    f"{block}pmem.pmem.M_{x}{i}": normal(1, heads, pairs, width) for x in "kv" for i in range(banks)
                }
    return found


def twin(weights, ids, naming, clamp=None):
    """Logits `(time, vocabulary)` of one row by the paper's equations, one position and head after the other."""
    names = NAMINGS[naming]
    eps, clamp = (1e-10, clamp or math.log(65535)) if naming == "nano" else (0.0, clamp or 5.0)
    time = len(ids)

    def linear(name, x):
        bias = weights.get(f"{name}.bias", 0.0)
        return x @ weights[f"{name}.weight"].flatten(1).T + bias

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights.get(f"{name}.bias", 0.0)

    def unit(x):
        return x / (x.norm() + eps)

    def softmax(scores):
        return (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()

    x = weights[f"{names['emb']}.weight"][ids]
    layers = 0
    while names["block"].format(layers) + names["norms"][0] + ".weight" in weights:
        block = names["block"].format(layers)
        for which, memory in enumerate(names["memories"]):
            prefix = f"{block}{memory}."
            decay, scale = (10 * weights[prefix + names[k]].flatten() for k in ("decay", "scale"))
            length = (10 * weights[prefix + names["length"][which]].flatten()).exp()
            heads = len(decay)
            inner = norm(block + names["norms"][which], x)
            raw = linear(prefix + names["key"], inner).unflatten(-1, (heads, -1))
            constant = 1 if naming == "nano" else 1 - (-decay.abs()).exp()
            directions = {}
            for h in range(heads):
                for t in range(time):
                    average = sum((-decay[h].abs() * (t - s)).exp() * raw[s, h] for s in range(t + 1))
                    directions[t, h] = unit(average * (constant if naming == "nano" else constant[h]))
            out = [[torch.zeros_like(raw[0, 0]) for _ in range(heads)] for _ in range(time)]
            if which == 0:
                values = linear(prefix + names["value"], inner).unflatten(-1, (heads, -1))
                mix = weights[prefix + names["mix"]].flatten()
                sharpness = scale.clamp(max=clamp).exp()
                for h in range(heads):
                    for t in range(1, time):
                        keys = torch.stack([sharpness[h] * directions[i, h] for i in range(t)])
                        weight = softmax(keys @ (sharpness[h] * directions[t, h]))
                        stored = [mix[h] * values[i, h] + (1 - mix[h]) * values[i + 1, h] for i in range(t)]
                        out[t][h] = weight @ torch.stack([length[h] * unit(v) for v in stored])
            else:
                if naming == "nano":
                    banks = [
                        (weights[prefix + "P_k"][i, 0], weights[prefix + "P_v"][i, 0])
                        for i in range(len(weights[prefix + "P_k"]))
                    ]
                    sharpness = (2 * scale).clamp(max=clamp).exp()
                else:
                    count = sum(name.startswith(f"{prefix}pmem.M_k") for name in weights)
                    banks = [tuple(weights[f"{prefix}pmem.M_{x}{i}"][0] for x in "kv") for i in range(count)]
                    sharpness = scale.clamp(max=clamp).exp() ** 2
                for h in range(heads):
                    for t in range(time):
                        key = sharpness[h] * directions[t, h]
                        out[t][h] = length[h] * sum(softmax(k[h] @ key) @ v[h] for k, v in banks) / len(banks)
            x = x + linear(prefix + "c_proj", torch.stack([torch.cat(o) for o in out]))
        layers += 1
    logits = norm(names["norm"], x) @ weights[f"{names['emb']}.weight"].T
    return logits if naming == "nano" else logits / math.sqrt(x.shape[-1])


def as_gradients(gradients, settings=None):
    """The authors' gradients under our names: converted as if they were weights."""
    return dict(from_memory_mosaics_v1(gradients, settings, key_clamp=5.0).named_parameters())


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_memory_mosaics_v1_equals_its_equations_in_value_and_gradient(data):
    naming = data.draw(st.sampled_from(sorted(NAMINGS)))
    whole = st.integers(1, 3)
    sizes = dict(
        layers=data.draw(st.integers(1, 2)),
        heads=data.draw(whole),
        width=1 + data.draw(whole),
        pairs=data.draw(whole),
        banks=data.draw(whole),
        bias=data.draw(st.booleans()),
    )
    seed, time = data.draw(st.integers(0, 10**6)), data.draw(st.integers(1, 8))
    clamp = data.draw(st.sampled_from([None, 1.2]))  # 1.2 clamps some heads
    weights = {name: w.requires_grad_() for name, w in random_weights(naming, seed, **sizes).items()}
    ids = tokens(1, time, seed)
    model = from_memory_mosaics_v1(
        {n: w.detach() for n, w in weights.items()}, key_clamp=clamp or (5.0 if naming != "nano" else math.log(65535))
    )
    found, expected = model(ids).logits[0], twin(weights, ids[0], naming, clamp)
    assert relative_error(found, expected) < 1e-9
    projection = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    (found * projection).sum().backward()
    (expected * projection).sum().backward()
    gradients = as_gradients({name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()})
    total = sum(g.square().sum() for g in gradients.values()).sqrt()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name]).norm() < 1e-9 * total, name


@pytest.mark.parametrize("naming", ["nano", "library"])
def test_from_memory_mosaics_v1_equals_the_authors_outputs(shared, naming):
    path = shared / "fixtures" / f"memory_mosaics_v1_{naming}.safetensors"
    if not path.is_file():
        pytest.skip("no reference outputs here")
    with safe_open(path, "pt") as file:
        given_settings = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    part = lambda kind: {n.removeprefix(kind): t for n, t in tensors.items() if n.startswith(kind)}  # noqa: E731
    model, ids = from_memory_mosaics_v1(part("param/"), given_settings), tensors["input_ids"]
    assert model.config.max_position_embeddings == given_settings["block_size"]
    logits = model(ids).logits
    assert (logits - tensors["logits"]).abs().max() < 1e-10
    if naming == "nano":
        loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())  # of the same position, as their call has it
        assert (loss - tensors["loss"]).abs() < 1e-10
        loss.backward()
        expected = as_gradients(part("grad/"), given_settings)
        for name, parameter in model.named_parameters():
            assert (parameter.grad - expected[name]).abs().max() < 1e-10, name


def test_from_memory_mosaics_v1_reads_what_a_checkpoint_holds_besides():
    weights = random_weights("nano")
    expected = from_memory_mosaics_v1(weights)(tokens(1, 9)).logits
    weights["lm_head.weight"] = weights["mosaic.wte.weight"].clone()
    for layer in range(2):
        weights[f"mosaic.h.{layer}.attn.bias"] = torch.ones(1, 1, 9, 9)
        weights[f"mosaic.h.{layer}.attn.k_featurizer.leaky_avg.coef"] = torch.ones(9, 9)
    model = from_memory_mosaics_v1({f"_orig_mod.{name}": weight for name, weight in weights.items()})
    assert torch.equal(model(tokens(1, 9)).logits, expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    weights["lm_head.weight"] *= 2
    untied = from_memory_mosaics_v1(weights)
    assert relative_error(untied(tokens(1, 9)).logits, 2 * expected) < 1e-12


def test_read_memory_mosaics_v1_takes_the_settings_from_the_file(tmp_path):
    weights, path = random_weights("library"), tmp_path / "model.safetensors"
    config = {"block_size": 33, "ic_dropout": 0.1, "hd_dropout": 0.2}
    save_file(weights, path, metadata={"config": json.dumps(config)})
    found = read_memory_mosaics_v1(path).config
    assert (found.max_position_embeddings, found.attention_dropout, found.dropout) == (33, 0.1, 0.2)
    assert found.eos_token_id is None and found.logit_scale is None
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        read_memory_mosaics_v1(path)
    with pytest.raises(ValueError, match="pickles are not loaded"):
        read_memory_mosaics_v1(tmp_path / "ckpt.pt")


def changed(naming, change):
    weights = random_weights(naming)
    change(weights)
    return weights


@pytest.mark.parametrize(
    "naming, change, message",
    [
        ("nano", lambda w: w.pop("mosaic.h.1.mlp.P_v"), "have no model.stack.blocks.1"),
        ("nano", lambda w: w.pop("mosaic.wte.weight"), "have no model.embed_tokens"),
        ("library", lambda w: w.pop("blocks.0.pmem.pmem.M_k0"), "shape"),
        ("library", lambda w: w.update({"emb.bias": torch.ones(3)}), "beside"),
        ("library", lambda w: w.update({"blocks.0.mlp.weight": torch.ones(3)}), "variant"),
        ("library", lambda w: w.update({"transformer.weight": torch.ones(3)}), "no tensor of a Memory Mosaic v1"),
        ("library", lambda w: w.update({"blocks.0.attn.k_featurizer.conv.weight": torch.ones(6, 6, 2)}), "not fit"),
        ("cuda", lambda w: w.update({"blocks.0.attn.leaky_average.leaky_beta_u_under": torch.ones(2)}), "differs from"),
        ("nano", lambda w: w["mosaic.h.0.mlp.k_featurizer.key_scale"].fill_(0.3), "key_clamp"),
        ("nano", lambda w: w["mosaic.h.0.attn.k_featurizer.key_scale"].fill_(0.6), "key_clamp"),
    ],
)
def test_from_memory_mosaics_v1_refuses_what_it_cannot_convert(naming, change, message):
    with pytest.raises(ValueError, match=message):
        from_memory_mosaics_v1(changed(naming, change))
    with pytest.raises(ValueError, match="norms after"):
        from_memory_mosaics_v1(random_weights(naming), {"pre_ln": False})
