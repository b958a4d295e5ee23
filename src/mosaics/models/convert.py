"""Llama's weights as a mosaic and back: the same numbers under other names."""

from __future__ import annotations

import re

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mosaics.models.configuration_mosaic import MosaicConfig
from mosaics.models.modeling_mosaic import MosaicForCausalLM

_NAMES = {
    "self_attn": "steps.0.memories.attention",
    "mlp": "steps.1.memories.feed_forward",
    "input_layernorm": "steps.0.norm",
    "post_attention_layernorm": "steps.1.norm",
}
_STEPS = [["attention"], ["feed_forward"]]


def from_llama(llama: LlamaForCausalLM) -> MosaicForCausalLM:
    """A mosaic that computes what a Llama does.

    Raises:
        ValueError: the Llama has something that the mosaic has not (scaled rotary positions, another activation, biases
            in some linear maps only).
    """
    c = llama.config
    rotary = dict(c.rope_parameters or {})
    if rotary.get("rope_type", "default") != "default":
        raise ValueError(
            f"This Llama scales its rotary positions ({rotary['rope_type']}), which a mosaic cannot do yet."
        )
    if c.hidden_act != "silu":
        raise ValueError(f"This Llama's activation is {c.hidden_act}; a mosaic's is silu.")
    if c.attention_bias != c.mlp_bias:
        raise ValueError("This Llama has biases in some of its linear maps only; a mosaic has them in all or none.")
    attention = {
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": getattr(c, "head_dim", None),
    }
    steps = [
        [{"type": "attention", "options": attention}],
        [{"type": "feed_forward", "options": {"intermediate_size": c.intermediate_size}}],
    ]
    config = MosaicConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        blocks=[{"repeat": c.num_hidden_layers, "steps": steps}],
        max_position_embeddings=c.max_position_embeddings,
        norm_eps=c.rms_norm_eps,
        bias=c.attention_bias,
        attention_dropout=c.attention_dropout,
        rotary_base=float(rotary.get("rope_theta", 10000.0)),
        tie_word_embeddings=c.tie_word_embeddings,
        **{name: getattr(c, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    weights = {_renamed(name, _to_mosaic): weight for name, weight in llama.state_dict().items()}
    return _filled(MosaicForCausalLM(config), weights, llama)


def to_llama(mosaic: MosaicForCausalLM) -> LlamaForCausalLM:
    """The Llama that computes what a Transformer mosaic does.

    Raises:
        ValueError: the mosaic is no Llama: it has other memories, a window or a delay, layer norms, scaled logits,
            learned positions or another network.
    """
    c = mosaic.config
    types = [[[memory["type"] for memory in step] for step in steps] for steps in c.block_steps()]
    if any(block != _STEPS for block in types):
        raise ValueError(
            "Only blocks of one attention and one feed_forward memory are a Llama; this mosaic has others."
        )
    if len(c.blocks) > 1 or c.norm != "rms" or c.logit_scale != 1:
        raise ValueError("A Llama has equal blocks, RMS norms and unscaled logits; this mosaic differs.")
    steps = mosaic.model.stack.blocks[0].steps
    network, options = steps[1].memories["feed_forward"].options, steps[0].memories["attention"].options
    if c.learned_positions is not None or network.activation != "swiglu":
        raise ValueError("A Llama has SwiGLU networks and no learned positions; this mosaic differs.")
    if options.window is not None or options.delay or options.train_delay:
        raise ValueError("A Llama's attention has neither window nor delay; this mosaic's has.")
    if options.persistent_tokens or options.convolution:
        raise ValueError("A Llama's attention has neither persistent tokens nor a convolution; this mosaic's has.")
    if options.positions != "rotary" or options.rotary_scaling is not None:
        raise ValueError("A Llama has rotary positions, here those it was trained with; this mosaic's differ.")
    memory = mosaic.model.stack.blocks[0].steps[0].memories["attention"]
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=memory.heads,
        num_key_value_heads=memory.pair_heads,
        head_dim=memory.width,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rotary_base},
        attention_bias=c.bias,
        mlp_bias=c.bias,
        attention_dropout=c.attention_dropout,
        tie_word_embeddings=c.tie_word_embeddings,
        **{name: getattr(c, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    weights = {_renamed(name, _to_llama): weight for name, weight in mosaic.state_dict().items()}
    return _filled(LlamaForCausalLM(config), weights, mosaic)


def _renamed(name: str, rename) -> str:
    return re.sub(r"^model\.(?:layers|stack\.blocks)\.(\d+)\.(.*)\.(\w+)$", rename, name)


def _to_mosaic(match: re.Match) -> str:
    part, *inner = match[2].split(".")
    return ".".join(["model.stack.blocks", match[1], _NAMES[part], *inner, match[3]])


def _to_llama(match: re.Match) -> str:
    for ours in _NAMES.values():
        if match[2] == ours or match[2].startswith(f"{ours}."):
            theirs = next(name for name, other in _NAMES.items() if other == ours)
            return f"model.layers.{match[1]}.{theirs}{match[2].removeprefix(ours)}.{match[3]}"
    raise ValueError(f"A Llama has no place for {match[0]}.")


def _filled(model, weights: dict[str, torch.Tensor], source):
    model = model.to(source.dtype)
    model.load_state_dict(weights)
    return model.train(source.training)
