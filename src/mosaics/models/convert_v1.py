"""The weights of the authors' Memory Mosaics v1 as a mosaic: the same numbers under other names."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mosaics.memories.contract import nearest
from mosaics.models.configuration_mosaic import MosaicConfig
from mosaics.models.modeling_mosaic import MosaicForCausalLM

_CONTEXTUAL, _PERSISTENT = "steps.0.memories.leaky_contextual", "steps.1.memories.kernel_persistent"


def _memory(theirs: str, ours: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}.{other}" for name, other in names.items()}


_NANO_KEYS = {
    "k_featurizer.W_k": "key_extractor.proj",
    "k_featurizer.key_scale": "key_extractor.scale",
    "k_featurizer.leaky_avg.leaky_key_beta": "key_extractor.decay",
    "c_proj": "out_proj",
}
_LIBRARY_KEYS = {
    "k_featurizer.conv": "key_extractor.proj",
    "kernel_beta": "key_extractor.scale",
    "leaky_key_beta": "key_extractor.decay",
    "value_beta": "value_scale",
    "c_proj": "out_proj",
    # Where their CUDA kernel averages.
    "leaky_average.linear": "key_extractor.proj",
    "leaky_average.leaky_beta_w_under": "key_extractor.decay",
}
_LIBRARY_VALUES = {"v_featurizer.linear": "value_proj", "v_featurizer.coef": "value_mix"}
_NANO_VALUES = {
    "v_featurizer.W_v": "value_proj",
    "v_featurizer.coef": "value_mix",
    "v_featurizer.val_scale": "value_scale",
}
# The authors' names within a block, and outside of the blocks.
_NANO = {
    "ln_1": "steps.0.norm",
    "ln_2": "steps.1.norm",
    **_memory("attn", _CONTEXTUAL, _NANO_KEYS | _NANO_VALUES),
    **_memory("mlp", _PERSISTENT, _NANO_KEYS | {"P_k": "pair_keys", "P_v": "pair_values", "out_scale": "value_scale"}),
}
_LIBRARY = {
    "ln1": "steps.0.norm",
    "ln2": "steps.1.norm",
    **_memory("attn", _CONTEXTUAL, _LIBRARY_KEYS | _LIBRARY_VALUES),
    **_memory("pmem", _PERSISTENT, _LIBRARY_KEYS | {"pmem.M_k": "pair_keys", "pmem.M_v": "pair_values"}),
}
_OUTSIDE = {
    "mosaic.wte": "model.embed_tokens",
    "mosaic.ln_f": "model.norm",
    "emb": "model.embed_tokens",
    "ln_out": "model.norm",
    "lm_head": "lm_head",
    "head": "lm_head",
}
_IN_BLOCK = re.compile(r"(?:mosaic\.h|blocks)\.(\d+)\.(.+?)(\.weight|\.bias)?")


def from_memory_mosaics_v1(
    weights: dict[str, Tensor], settings: dict[str, Any] | None = None, key_clamp: float | None = None
) -> MosaicForCausalLM:
    """A mosaic that computes what the authors' model does.

    Args:
        weights: the `model` of a checkpoint of facebookresearch/MemoryMosaics, `nanoMosaics` or `Library`.
        settings: what the tensors don't tell, under the authors' names: `block_size`, `dropout`, `ic_dropout`,
            `hd_dropout`, `pre_ln`. Dropout is 0 where nothing is said.
        key_clamp: what the logarithm of the keys' scale is clamped at. By default 5 for the library and ln 65535 for
            nano, as at commit 1fff63b.

    Raises:
        ValueError: a tensor is missing, unknown or of the wrong shape, a variant that a mosaic has not, or a nano model
            for which the clamps of the authors' versions (ln 65535, later 5) make a difference, and none is given.
    """
    settings = settings or {}
    if settings.get("pre_ln") is False:
        raise ValueError("This model has its norms after the memories (pre_ln false); a mosaic has them before.")
    weights = {name.removeprefix("_orig_mod."): weight for name, weight in weights.items()}  # of torch.compile
    nano = any(name.startswith("mosaic.") for name in weights)
    found = _renamed(weights, _NANO if nano else _LIBRARY)
    config = _config(found, settings, nano, key_clamp)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in MosaicForCausalLM(config).named_parameters()}
    if unknown := sorted(set(found) - set(shapes) - {"lm_head.weight"}):
        raise ValueError(f"The model has {unknown[0]} beside what a Memory Mosaic has; {nearest(unknown[0], shapes)}")
    for name, shape in shapes.items():
        if name not in found:
            raise ValueError(f"The weights have no {name}; give all tensors of the checkpoint's model.")
        if found[name].numel() != shape.numel():
            raise ValueError(f"{name} has shape {tuple(found[name].shape)} instead of {tuple(shape)}; it does not fit.")
    model = MosaicForCausalLM(config).to(found["model.embed_tokens.weight"].dtype).eval()
    model.load_state_dict({name: found[name].reshape(shape) for name, shape in shapes.items()}, strict=False)
    return model


def read_memory_mosaics_v1(path: Path, key_clamp: float | None = None) -> MosaicForCausalLM:
    """As `from_memory_mosaics_v1`, from a .safetensors file; its metadata may hold `config`, the settings as JSON.

    Raises:
        ValueError: it is no such file (pickles are not loaded), or as `from_memory_mosaics_v1`.
    """
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} is no .safetensors file, and pickles are not loaded here; "
            "docs/memory-mosaics-v1.md shows how to turn a checkpoint into one"
        )
    try:
        with safe_open(path, "pt") as file:
            settings = json.loads((file.metadata() or {}).get("config", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dictionary)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); write it again") from error
    if not isinstance(settings, dict):
        raise ValueError(f"The config in the metadata of {path} is no JSON object; write it again")
    return from_memory_mosaics_v1(weights, settings, key_clamp)


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    banks: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for name, weight in weights.items():
        module, _, last = name.rpartition(".")
        if module in _OUTSIDE:
            found[f"{_OUTSIDE[module]}.{last}"] = weight
            continue
        match = _IN_BLOCK.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no tensor of a Memory Mosaic v1; give the `model` of the authors' checkpoint.")
        block, inner, kind = match[1], match[2], match[3] or ""
        if inner.endswith("leaky_avg.coef") or name.endswith(".attn.bias"):
            continue  # constants
        if inner.endswith(".leaky_average.leaky_beta_u_under"):
            if not torch.equal(weight, weights.get(name.replace("_u_under", "_w_under"), weight)):
                raise ValueError(f"{name} differs from the decay of the past, which a mosaic has not.")
            continue
        numbered = re.fullmatch(r"(pmem\.pmem\.M_[kv])(\d+)", inner)
        inner = numbered[1] if numbered else inner
        if inner not in names:
            raise ValueError(f"{name} belongs to a variant that a mosaic has not; {nearest(inner, names)}")
        ours = f"model.stack.blocks.{block}.{names[inner]}{kind}"
        if numbered:
            banks[ours][int(numbered[2])] = weight
        else:
            found[ours] = weight
    return found | {name: torch.cat([parts[i] for i in sorted(parts)]) for name, parts in banks.items()}


def _config(found: dict[str, Tensor], settings: dict[str, Any], nano: bool, key_clamp: float | None) -> MosaicConfig:
    first = "model.stack.blocks.0"
    if "lm_head.weight" in found:
        found.setdefault("model.embed_tokens.weight", found["lm_head.weight"])
    tells = [
        "model.embed_tokens.weight",
        f"{first}.{_CONTEXTUAL}.key_extractor.decay",
        f"{first}.{_PERSISTENT}.pair_keys",
    ]
    for name in tells:
        if name not in found:
            raise ValueError(f"The weights have no {name}; give all tensors of the checkpoint's model.")
    embedding, decay, pairs = (found[name] for name in tells)
    classifier = found.get("lm_head.weight", embedding)
    layers = 1 + max(int(name.split(".")[3]) for name in found if name.startswith("model.stack.blocks."))
    if nano and key_clamp is None:
        for name, scale in found.items():
            power = 2 if _PERSISTENT in name else 1
            if name.endswith("key_extractor.scale") and (power * 10 * scale > 5).any():
                raise ValueError(
                    "A key of this model has a scale above e^5, which the authors' nano versions clamp differently; "
                    f"give key_clamp {math.log(2**16 - 1)} (commit 1fff63b) or 5 (later)."
                )
    clamp = key_clamp if key_clamp is not None else math.log(2**16 - 1) if nano else 5.0
    config = MosaicConfig.from_preset(
        "memory-mosaics-v1-nano" if nano else "memory-mosaics-v1-babistories",
        vocab_size=embedding.shape[0],
        hidden_size=embedding.shape[1],
        num_hidden_layers=layers,
        num_attention_heads=decay.numel(),
        num_pairs=pairs.shape[-2],
        num_banks=pairs.shape[0],
        bias=f"{first}.{_CONTEXTUAL}.out_proj.bias" in found,
        tie_word_embeddings=torch.equal(embedding, classifier),
        max_position_embeddings=settings.get("block_size", 512),
        dropout=settings.get("hd_dropout", settings.get("dropout", 0.0)),
        attention_dropout=settings.get("ic_dropout", settings.get("dropout", 0.0)),
        **{} if embedding.shape[0] > 50256 else {"bos_token_id": None, "eos_token_id": None},
    )
    [[contextual], [persistent]] = config.blocks[0]["steps"]
    contextual["options"]["max_log_bandwidth"] = 2 * clamp
    persistent["options"]["max_log_bandwidth"] = clamp if nano else 2 * clamp
    return config
