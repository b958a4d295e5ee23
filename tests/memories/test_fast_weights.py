"""Memories that are weights, against other people's layers."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import relative_error
from mosaics.memories import Common, Context, Layout
from mosaics.memories.contract import build


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
