"""Memories of slots, against other people's code."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from helpers import relative_error, tokens
from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.memories import Common, Context, Layout, Stack
from mosaics.memories.contract import build
from mosaics.ops import kernel_regression


def sizes_and_tensors(path):
    with safe_open(path, "pt") as opened:
        return json.loads(opened.metadata()["config"]), load_file(path)


def gam_names(step: str, block: str = "") -> dict[str, str]:
    """Our names of a block's parameters, and those of the authors."""
    return {
        f"{step}0.norm.{kind}": f"{block}ln1.{kind}" for kind in ("weight", "bias")
    } | {
        f"{step}{number}.memories.{ours}.{kind}": f"{block}{theirs}.{kind}"
        for kind in ("weight", "bias")
        for number, ours, theirs in (
            (0, "gam.convolution", "causal_conv"),
            (0, "gam.gate_proj", "gate"),
            (1, "feed_forward.up_proj", "ffn.0"),
            (1, "feed_forward.down_proj", "ffn.2"),
        )
    } | {f"{step}1.norm.{kind}": f"{block}ln2.{kind}" for kind in ("weight", "bias")} | {
        f"{step}0.memories.gam.bank": f"{block}memory_bank"
    }  # fmt: skip


def gam_steps(sizes) -> list:
    network = {"intermediate_size": 4 * sizes["n_embed"], "activation": "gelu"}
    options = {"slots": sizes["num_memory_slots"], "convolution": sizes["conv_kernel_size"]}
    return [[{"type": "gam", "options": options}], [{"type": "feed_forward", "options": network}]]


def filled(module, names, file):
    """A module with the parameters of a file, in the shapes that it has."""
    own = {name: x.shape for name, x in module.named_parameters()}
    module.load_state_dict({name: file[f"param/{theirs}"].view(own[name]) for name, theirs in names.items()}, False)
    assert set(own) == set(names)
    return module


def check_gradients(module, names, file):
    for name, parameter in module.named_parameters():
        expected = file[f"grad/param/{names[name]}"]
        assert relative_error(parameter.grad, expected.view(parameter.shape)) < 1e-9, name


def test_gam_block_is_that_of_its_authors(shared):
    sizes, file = sizes_and_tensors(shared / "fixtures" / "gam_block.safetensors")
    names = gam_names("blocks.0.steps.")
    stack = Stack([gam_steps(sizes)], nn.LayerNorm, Common(sizes["n_embed"], bias=True)).double()
    filled(stack, names, file)
    x = file["input/x"].requires_grad_()
    y, _ = stack(x, Layout(*x.shape[:2]), None, Context())
    assert relative_error(y, file["output/x"]) < 1e-9
    (file["weight/x"] * y).sum().backward()
    assert relative_error(x.grad, file["grad/x"]) < 1e-9
    check_gradients(stack, names, file)


def test_gam_model_is_that_of_its_authors(shared):
    """With learned positions; and the same in pieces, with a cache."""
    sizes, file = sizes_and_tensors(shared / "fixtures" / "gam_model.safetensors")
    config = MosaicConfig.from_preset(
        "gam-tiny",
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["n_embed"],
        learned_positions=sizes["block_size"],
        max_position_embeddings=sizes["block_size"],
        blocks=[{"repeat": sizes["n_layer"], "steps": gam_steps(sizes)}],
    )
    names = {"model.embed_tokens.weight": "head.weight", "model.embed_positions.weight": "pos_embedding.weight"}
    names |= {f"model.norm.{kind}": f"ln_f.{kind}" for kind in ("weight", "bias")}
    for block in range(sizes["n_layer"]):
        names |= gam_names(f"model.stack.blocks.{block}.steps.", f"blocks.{block}.")
    model = filled(MosaicForCausalLM(config).double().eval(), names, file)
    ids = file["input/idx"]
    logits = model(ids, use_cache=False).logits
    assert relative_error(logits, file["output/logits"]) < 1e-9
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), file["input/targets"].flatten())
    assert relative_error(loss, file["output/cross_entropy"]) < 1e-9
    ((file["weight/logits"] * logits).sum() + (file["weight/cross_entropy"] * loss).sum()).backward()
    check_gradients(model, names, file)
    head = model(ids[:, :8], use_cache=True)
    tail = model(ids[:, 8:], past_key_values=head.past_key_values).logits
    assert relative_error(torch.cat([head.logits, tail], dim=1), file["output/logits"]) < 1e-9


def looped_gam(memory, x):
    """The equation, one token at a time."""
    size, rows = memory.options.convolution, []
    for row in x:
        answers = []
        for t, own in enumerate(row):
            near = memory.convolution.bias.clone()
            for back in range(min(size, t + 1)):
                near = near + memory.convolution.weight[:, size - 1 - back] * row[t - back]
            read = (memory.options.bandwidth * memory.bank @ own).softmax(0) @ memory.bank
            a, b = (memory.gate_proj.weight @ own + memory.gate_proj.bias).sigmoid().chunk(2)
            answers.append(a * near + b * read)
        rows.append(torch.stack(answers))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [{}, {"convolution": 5, "bandwidth": 0.3}, {"convolution": 1}])
@pytest.mark.parametrize("form", [None, "naive", "blockwise"])
def test_gam_is_its_equation_in_values_and_gradients(options, form, monkeypatch):
    from mosaics.memories.slots import gam

    if form is not None:
        forced = lambda *args, **more: kernel_regression.kernel_regression(*args, form=form, **more)  # noqa: E731
        monkeypatch.setattr(gam, "kernel_regression", forced)
    memory = build("gam", {"slots": 7, **options}, Common(6), 0).double()
    with torch.no_grad():
        for parameter in memory.parameters():
            parameter.normal_()
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    inputs, weight = [x, *memory.parameters()], torch.randn(2, 9, 6, dtype=torch.float64)
    y, _ = memory(x, Layout(2, 9), None, Context())
    expected = looped_gam(memory, x)
    assert relative_error(y, expected) < 1e-9
    both = (torch.autograd.grad((weight * z).sum(), inputs) for z in (y, expected))
    for found, known in zip(*both, strict=True):
        assert relative_error(found, known) < 1e-9


def test_gam_reads_its_bank():
    memory, context = build("gam", {"slots": 7}, Common(6), 3).double(), Context(reads=[])
    memory.reset_parameters(3)
    with torch.no_grad():
        memory.convolution.bias.zero_()
        memory.convolution.weight.zero_()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y, _ = memory(x, Layout(2, 9), None, context)
    (read,) = context.reads
    assert read.weights.shape == (2, 1, 9, 7) and not read.contextual and read.layer_index == 3
    gate = memory.gate_proj(x).sigmoid()[..., 6:]
    assert relative_error(gate * (read.weights[:, 0] @ memory.bank), y) < 1e-9


def positions_model(rows: int, **more) -> MosaicForCausalLM:
    config = MosaicConfig.from_preset(
        "memory-mosaics-v2-tiny",
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        window=4, delay=1, train_delay=[1, 2], learned_positions=rows, **more,
    )  # fmt: skip
    torch.manual_seed(1)
    return MosaicForCausalLM(config).double().eval()


def test_learned_positions_are_added_to_the_embeddings_of_every_document():
    model, ids = positions_model(8), tokens(1, 12)
    plain = MosaicForCausalLM(model.config.changed("this", learned_positions=None)).double().eval()
    assert not plain.load_state_dict(model.state_dict(), strict=False).missing_keys
    documents = torch.tensor([[0] * 5 + [1] * 7])
    places = torch.tensor([*range(5), *range(7)])
    given = model.model.embed_tokens(ids) + model.model.embed_positions.weight[places]
    expected = plain(inputs_embeds=given, document_ids=documents).logits
    assert relative_error(model(ids, document_ids=documents).logits, expected) < 1e-12
    padded, mask = torch.nn.functional.pad(ids[:, :5], (3, 0)), torch.tensor([[0] * 3 + [1] * 5])
    assert relative_error(model(padded, attention_mask=mask).logits[:, 3:], expected[:, :5]) < 1e-12


def test_learned_positions_refuse_longer_documents():
    model, ids = positions_model(8), tokens(2, 9)
    message = "A document of 9 tokens is longer than the 8 learned positions"
    with pytest.raises(ValueError, match=message):
        model(ids)
    cache = model(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        model(ids[:, 8:], past_key_values=cache)
    with pytest.raises(ValueError, match=message):
        model(ids, document_ids=torch.zeros(2, 9, dtype=torch.long).index_fill_(0, torch.tensor(1), 3))
    with pytest.raises(ValueError, match=message):
        model.model.check(9)
    model.model.check(8)
    model(ids, document_ids=torch.tensor([[0] + [1] * 8] * 2))
    model(ids, attention_mask=torch.tensor([[0] + [1] * 8] * 2))


def test_learned_positions_are_counted_as_such():
    figures = positions_model(8).describe()["parameters"]
    assert figures["by_kind"]["positions"] == 8 * 16
    assert sum(figures["by_kind"].values()) == figures["total"]
