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
from memory_mosaics_v1 import NAMINGS, random_weights, twin
from mosaics.models.convert_v1 import from_memory_mosaics_v1, read_memory_mosaics_v1


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
