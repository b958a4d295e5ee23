"""The config of a mosaic: which memories make which blocks, and what belongs to the whole model."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mosaics.memories.contract import (
    LARGEST,
    Common,
    check_options,
    check_state_dtype,
    check_tolerance,
    memory_class,
    named,
    nearest,
    option_names,
)
from mosaics.ops import FLOATS

_MOST_BLOCKS = 10_000  # building more would seem to hang
_MOST_LABELS = 10_000
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_DROPOUTS = ("dropout", "embedding_dropout", "attention_dropout")
# Keys that transformers itself writes or accepts beside the fields of a config.
_TRANSFORMERS_KEYS = {
    "_commit_hash",
    "_from_auto",
    "_name_or_path",
    "attn_implementation",
    "experts_implementation",
    "auto_map",
    "model_type",
    "name_or_path",
    "num_labels",
    "quantization_config",
    "output_attentions",
    "torch_dtype",
}


@strict
@dataclasses.dataclass(repr=False)
class MosaicConfig(PreTrainedConfig):
    """The config of a `MosaicForCausalLM`.

    The options of the memories can be read and set on the config itself: `config.window`, or where memories of
    different names have one, by the name as well: `getattr(config, "long.window")`. Setting one sets it in every block
    (a model that is built already does not change).

    Args:
        vocab_size: number of tokens.
        hidden_size: d, the width of the residual stream.
        blocks: groups of equal blocks, each `{"repeat": n, "steps": [[memory, ...], ...]}`: a step is a sum of parallel
            memories, a memory is `{"type": ..., "options": {...}}` and may have a `"name"` that no other of its block
            has (by default its type).
        num_hidden_layers: number of blocks; derived from `blocks`, and checked against it.
        max_position_embeddings: the training context, in tokens. A mosaic has no position encoding and reads on beyond
            it, but for `learned_positions`.
        norm: `"rms"` or `"layer"`.
        norm_eps: eps of the norms.
        bias: whether linear maps and layer norms have biases.
        dropout: probability, in training, on what every step adds.
        embedding_dropout: the same on the embeddings; None: as `dropout`.
        attention_dropout: the same on the weights with which memories read their pairs.
        logit_scale: factor of the logits; None: 1 / sqrt(d).
        embedding_scale: standard deviation of embedding and classifier at the start, times sqrt(d); they are clamped to
            three deviations.
        rotary_base: base of memories that use rotary positions.
        learned_positions: rows of a table of which each token's embedding is added the one of its position in its
            document; a document can't be longer. None: there is no table.
        around: a memory around all blocks, as one of a step is given; None: there is none.
        tie_word_embeddings: whether the classifier is the embedding.
        state_dtype: in which the pairs of the context are kept between calls: `"bfloat16"`, or `"int8"` with one scale
            for each key and value of a head; None: as they are computed. They are rounded when they come, and what is
            read are the rounded ones; no gradient passes through them.
        read_tolerance: the largest error that what a memory reads at one position of at least 4,096 pairs may have, as
            a share of the length of its longest value; None: there is none. On a processor such reads take less time.
        use_cache: whether a forward pass at evaluation keeps the decoding state.
        bos_token_id: begin of text.
        eos_token_id: end of text.
        pad_token_id: padding.

    Raises:
        ValueError: a key, type or option is unknown (the nearest valid name is given), or a value is impossible.
    """

    model_type = "mosaic"

    vocab_size: int = 128256
    hidden_size: int = 2048
    blocks: list | None = None
    num_hidden_layers: int | None = None
    max_position_embeddings: int = 4096
    norm: str = "rms"
    norm_eps: float = 1e-5
    bias: bool = False
    dropout: float = 0.0
    embedding_dropout: float | None = None
    attention_dropout: float = 0.0
    logit_scale: float | None = 1.0
    embedding_scale: float = 0.5**0.5
    rotary_base: float = 500000.0
    learned_positions: int | None = None
    around: dict | None = None
    tie_word_embeddings: bool = False
    state_dtype: str | None = None
    read_tolerance: float | None = None
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_preset(cls, name: str, /, **overrides: Any) -> MosaicConfig:
        """The config of a preset, with fields of the config or options of its memories changed.

        Args:
            name: one of `mosaics.models.presets.PRESETS`.
            overrides: e.g. `vocab_size`, `hidden_size`, `num_hidden_layers` (of a preset with one group of blocks),
                `num_attention_heads`, `intermediate_size`, `window`, `delay`, `train_delay`; `name.option` is that of
                the memories of a name (`**{"short_term.window": 32}`).

        Raises:
            ValueError: the preset or a key is unknown, or a value is impossible.
        """
        presets = _beside("presets").PRESETS
        if name not in presets:
            raise ValueError(f"There is no preset {name!r}; {nearest(name, presets)}")
        if given := {k: overrides[k] for k in ("blocks", "around") if overrides.get(k) is not None}:
            cls(**given)  # refuses what are none, before options are set in them
        return cls(**_changed(name, presets[name], overrides))

    def changed(self, name: str, /, **overrides: Any) -> MosaicConfig:
        """Another config with fields or options changed, as `from_preset` takes them; `name` is for error messages.

        Raises:
            ValueError: a key is unknown, or a value is impossible.
        """
        values = {key: getattr(self, key) for key in MosaicConfig.__annotations__ if key != "num_hidden_layers"}
        return type(self)(**_changed(name, values, overrides))

    def settings(self) -> dict[str, Any]:
        """Every setting by its name, options of memories as `name.option` (those of the first block that has it)."""
        own = {key: getattr(self, key) for key in MosaicConfig.__annotations__ if key not in ("blocks", "around")}
        for name, memory in reversed(_named_memories(_groups(self.__dict__))):
            options = dataclasses.asdict(memory_class(memory["type"]).Options(**memory["options"]))
            own |= {f"{name}.{key}": list(v) if isinstance(v, tuple) else v for key, v in options.items()}
        return own

    def __post_init__(self, **kwargs: Any) -> None:
        if (kind := kwargs.get("model_type", self.model_type)) != self.model_type:
            raise ValueError(
                f"This is the config of a {kind}, not of a mosaic; convert the model, or load it with its own class."
            )
        valid = {f.name for f in dataclasses.fields(self)}
        for key in kwargs:
            if key not in valid | _TRANSFORMERS_KEYS and not key.startswith("_"):
                raise ValueError(f"A mosaic has no setting {key!r}; {nearest(key, valid - _INHERITED)}")
        if self.blocks is None:
            self.blocks = _beside("presets").PRESETS["memory-mosaics-v2-small"]["blocks"]
        self.blocks, self.around = copy.deepcopy(self.blocks), copy.deepcopy(self.around)
        self._check()
        _check_inherited(vars(self) | kwargs)
        layers = sum(group["repeat"] for group in self.blocks)
        if layers > _MOST_BLOCKS:
            raise ValueError(f"The config has {layers} blocks; give at most {_MOST_BLOCKS}.")
        if self.num_hidden_layers not in (None, layers):
            raise ValueError(
                f"num_hidden_layers is {self.num_hidden_layers}, but the blocks are {layers}; leave it out."
            )
        self.num_hidden_layers = layers
        self.__dict__.setdefault("auto_map", {})  # code that a folder brings; who asks for it asks without a default
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for name in ("vocab_size", "hidden_size", "max_position_embeddings", "learned_positions"):
            if name == "learned_positions" and self.learned_positions is None:
                continue
            if not _is_whole(getattr(self, name)) or not 1 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give a whole number from 1 to {LARGEST}.")
        check_state_dtype(self.state_dtype)
        check_tolerance(self.read_tolerance)
        if self.norm not in ("rms", "layer"):
            raise ValueError(f"norm is {self.norm!r}; choose 'rms' or 'layer'.")
        for name in ("bias", "tie_word_embeddings", "use_cache"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; give true or false.")
        for name in (*_DROPOUTS, "norm_eps", "logit_scale", "embedding_scale", "rotary_base"):
            value = getattr(self, name)
            if value is None and name in ("embedding_dropout", "logit_scale"):
                continue
            # Compared, as an integer may be too large to be asked whether it is finite.
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                raise ValueError(f"{name} is {value!r}; give a number.")
            if name in _DROPOUTS and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; give a probability below 1.")
            if name not in _DROPOUTS and value <= 0:
                raise ValueError(f"{name} is {value}; give a number above 0.")
        if not isinstance(self.blocks, list):
            raise ValueError(f"blocks is {self.blocks!r}; give a list of groups, each with 'repeat' and 'steps'.")
        if not self.blocks:
            raise ValueError("A mosaic without blocks holds no memory; give at least one.")
        for group in self.blocks:
            if not isinstance(group, dict) or set(group) != {"repeat", "steps"}:
                raise ValueError(f"A group of blocks has the keys 'repeat' and 'steps', not {_keys(group)}.")
            if not _is_whole(group["repeat"]) or group["repeat"] < 1:
                raise ValueError(
                    f"A group of blocks repeats {group['repeat']!r} times; num_hidden_layers is at least 1."
                )
            steps = group["steps"]
            if not isinstance(steps, list) or not all(isinstance(step, list) for step in steps):
                raise ValueError(f"The steps of a block are {steps!r}; give a list of lists of memories.")
            if not steps or not all(steps):
                raise ValueError("A block has no step, or a step no memory; give each at least one.")
        for memory in _memories(_groups(self.__dict__)):
            if not isinstance(memory, dict) or not set(memory) <= {"type", "name", "options"} or "type" not in memory:
                raise ValueError(f"A memory has the keys 'type', 'options' and perhaps 'name', not {_keys(memory)}.")
            if "name" in memory and not (isinstance(memory["name"], str) and _NAME.fullmatch(memory["name"])):
                raise ValueError(f"The name of a memory is {memory['name']!r}; use letters, digits, '_' and '-'.")
            if not isinstance(memory["type"], str) or not isinstance(memory.setdefault("options", {}), dict):
                raise ValueError(f"A memory's type is a name and its options a dictionary, not {memory!r}.")
            check_options(memory["type"], memory["options"])
            if memory_class(memory["type"]).surrounds != (memory is self.around):
                place = "of a step; name it in `blocks`" if memory is self.around else "`around` the blocks"
                raise ValueError(f"A {memory['type']} memory is one {place}.")
            for option, value in memory["options"].items():
                if isinstance(value, tuple):  # as JSON gives it back
                    memory["options"][option] = list(value)
        for group in self.blocks:
            names = [name for name, _ in named(group["steps"])]
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"Two memories of a block have the name {name!r}; give each a name of its own.")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As transformers does it, with a file that lets `trust_remote_code=True` load the folder where this package is
        installed; a model that brought its code has taken that along."""
        super().save_pretrained(save_directory, **kwargs)
        if self._auto_class is None:
            _beside("code").write_code(Path(save_directory))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        self._tell_peft()
        values = super().to_dict()
        if self._auto_class is None or not values.get("auto_map"):  # it names files of another folder
            values.pop("auto_map", None)
        return values

    def _tell_peft(self) -> None:
        """PEFT looks up what to adapt by the type of a model, in tables of its own, right after it has asked the
        model's config for its values: the maps that the memories name are put there."""
        tables = vars(sys.modules.get("peft.utils.constants", object))
        targets = sorted({name for kind in self.memory_types() for name in memory_class(kind).adapted})
        for name, table in tables.items():
            if name.endswith("_TARGET_MODULES_MAPPING") and "q_proj" in table.get("llama", ()) and targets:
                table[self.model_type] = targets

    def validate_layer_type(self) -> None:
        """Every block has a cache layer of this project's own type."""

    @property
    def layer_types(self) -> list[str]:
        """What transformers' caches make for each block."""
        return ["mosaic"] * self.num_hidden_layers

    def has(self, key: str) -> bool:
        """Whether there is a setting of the config, or an option of its memories, of that name (`name.option`)."""
        return key in _FIELDS or key in _option_keys(_groups(self.__dict__))

    def values_of(self, name: str) -> list[Any]:
        """The values that an option has among the memories that have it, each once, in their order."""
        return list(dict.fromkeys(m["options"][name] for m in _memories(_groups(vars(self))) if name in m["options"]))

    def block_steps(self) -> list[list[list[dict[str, Any]]]]:
        """The steps of every block, groups written out."""
        return [group["steps"] for group in self.blocks for _ in range(group["repeat"])]

    def memory_types(self) -> set[str]:
        """The types of all memories, that around the blocks included."""
        return {memory["type"] for memory in _memories(_groups(self.__dict__))}

    def common(self) -> Common:
        """What every memory may use of the whole model."""
        return Common(
            self.hidden_size,
            self.bias,
            self.norm_eps,
            self.dropout,
            self.rotary_base,
            self.attention_dropout,
            self.num_hidden_layers,
            self.state_dtype,
            self.read_tolerance,
        )

    def remove_memories(self, name: str) -> None:
        """Take every memory of a name or type out, and steps and blocks that are left empty."""
        for group in self.blocks:
            for own, memory in named(group["steps"]):  # what is left keeps its name
                if own != memory["type"] and name not in (own, memory["type"]):
                    memory["name"] = own
            gone = [memory for own, memory in named(group["steps"]) if name in (own, memory["type"])]
            steps = [[memory for memory in step if not any(memory is g for g in gone)] for step in group["steps"]]
            group["steps"] = [step for step in steps if step]
        self.blocks = [group for group in self.blocks if group["steps"]]
        if self.around is not None and name in (self.around["type"], self.around.get("name")):
            self.around = None
        self.num_hidden_layers = sum(group["repeat"] for group in self.blocks)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_"):
            owner, _, option = name.rpartition(".")
            values = [
                memory["options"][option]
                for own, memory in _named_memories(_groups(self.__dict__))
                if option in memory["options"] and owner in ("", own)
            ]
            if values and all(value == values[0] for value in values):
                return values[0]
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}, and its memories no common option of that name."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        blocks = [] if name in _FIELDS else _groups(self.__dict__)
        if _set_option(blocks, name, value):
            return
        known = name in _FIELDS | _TRANSFORMERS_KEYS or name.startswith("_") or hasattr(type(self), name)
        if blocks and not known and name not in self.__dict__:
            known_keys = (_FIELDS - _INHERITED) | _option_keys(blocks)
            raise ValueError(f"A mosaic has no setting {name!r}; {nearest(name, known_keys)}")
        super().__setattr__(name, value)


_FIELDS = {f.name for f in dataclasses.fields(MosaicConfig)}
_INHERITED = {f.name for f in dataclasses.fields(PreTrainedConfig)}


def _beside(name: str) -> ModuleType:
    """A module that is beside this one in the package, but not in the code that goes with an exported model.

    Raises:
        ValueError: it is not there.
    """
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ModuleNotFoundError:
        raise ValueError(f"The {name} of mosaics are in the package alone; install it, or give all settings.") from None


def _groups(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The groups of blocks among the values of a config; after them the memory around as if it were one."""
    around = values.get("around")
    return (values.get("blocks") or []) + ([] if around is None else [{"repeat": 1, "steps": [[around]]}])


def _memories(blocks: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return [memory for group in blocks or [] for step in group["steps"] for memory in step]


def _named_memories(blocks: list[dict[str, Any]] | None) -> list[tuple[str, dict[str, Any]]]:
    return [pair for group in blocks or [] for pair in named(group["steps"])]


def _option_keys(blocks: list[dict[str, Any]] | None) -> set[str]:
    """What an option may be called: by itself, and with the name of its memory."""
    found = {(own, option) for own, memory in _named_memories(blocks) for option in option_names(memory["type"])}
    return {option for _, option in found} | {f"{own}.{option}" for own, option in found}


def _changed(name: str, values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The values of a config with fields or options of its memories changed."""
    values, fields = copy.deepcopy(values), {f.name for f in dataclasses.fields(MosaicConfig)}
    for key, value in overrides.items():
        if key == "num_hidden_layers" and "blocks" not in overrides:
            if len(values["blocks"]) > 1:
                raise ValueError(f"{name} has several groups of blocks; give `blocks` instead of num_hidden_layers.")
            values["blocks"][0]["repeat"] = value
        elif not _set_option(_groups(values), key, value):
            if key not in fields:
                known = fields | _option_keys(_groups(values))
                raise ValueError(f"{name} has no setting {key!r}; {nearest(key, known)}")
            values[key] = value
    return values


def _set_option(blocks: list[dict[str, Any]] | None, key: str, value: Any) -> bool:
    """Set an option in every memory whose type has it; `name.option` in those of a name. Whether there was one.

    Raises:
        ValueError: memories of different names have it, and it is none that they share.
    """
    owner, _, option = key.rpartition(".")
    found = [
        (own, memory)
        for own, memory in _named_memories(blocks)
        if option in option_names(memory["type"]) and owner in ("", own)
    ]
    names = sorted({own for own, _ in found})
    if len(names) > 1 and not all(option in memory_class(memory["type"]).shared_options for _, memory in found):
        choices = " or ".join(f"{own}.{option}" for own in names)
        raise ValueError(f"{option!r} is an option of several memories; say whose: {choices}.")
    for _, memory in found:
        memory.setdefault("options", {})[option] = list(value) if isinstance(value, tuple) else value
    return bool(found)


def _check_inherited(values: dict[str, Any]) -> None:
    """Raises `ValueError` for what transformers, whose keys these are, would stumble over, or build for ever."""
    for name in ("dtype", "torch_dtype"):
        if (value := values.get(name)) is not None and value not in (*_DTYPES, *_DTYPES.values()):
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(_DTYPES)}, or leave it out.")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = values.get(name)
        ids = value if name.startswith("eos") and isinstance(value, list) and value else [value]
        if value is not None and not all(_is_whole(x) and -1 <= x <= LARGEST for x in ids):
            raise ValueError(f"{name} is {value!r}; give the number of a token, or leave it out.")
    for name in ("attn_implementation", "experts_implementation"):
        for value in (values.get(name), values.get(f"_{name}")):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}; give its name, or leave it out.")
    quantization = values.get("quantization_config")
    if quantization is not None and not (isinstance(quantization, dict) or hasattr(quantization, "to_dict")):
        raise ValueError(f"quantization_config is {quantization!r}; give its settings, or leave it out.")
    labels, names = values.get("num_labels", 2), values.get("id2label")
    if not _is_whole(labels) or not 0 <= labels <= _MOST_LABELS:
        raise ValueError(f"num_labels is {labels!r}; a mosaic has no labels, so leave it out.")
    if names is not None and not (isinstance(names, dict) and all(str(key).isdecimal() for key in names)):
        raise ValueError(f"id2label is {names!r}; a mosaic has no labels, so leave it out.")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _keys(value: Any) -> str:
    return repr(sorted(value)) if isinstance(value, dict) else repr(value)
