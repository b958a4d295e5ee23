"""Memory Mosaics v1 by its equations, one position after the other, and random weights under the authors' names."""

from __future__ import annotations

import math

import torch

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
                if kind == "decay":  # of which only the size counts
                    found[f"{block}{memory}.{name}"] *= normal(*scalar_shape).sign()
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
