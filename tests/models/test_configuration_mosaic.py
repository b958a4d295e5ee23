import json

import pytest
from transformers import AutoConfig, LlamaConfig

from helpers import tiny_config
from mosaics import MosaicConfig
from mosaics.memories.contract import REGISTRY, named, option_names
from mosaics.models import PRESETS


def tiny(**overrides):
    return MosaicConfig.from_preset("memory-mosaics-v2-tiny", **overrides)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_from_preset_survives_saving(tmp_path, name):
    config = MosaicConfig.from_preset(name)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    assert AutoConfig.from_pretrained(tmp_path).blocks == config.blocks


def test_from_preset_overrides_reach_the_memories():
    config = tiny(
        window=9, delay=2, train_delay=(2, 7), num_attention_heads=8, intermediate_size=10, num_hidden_layers=3
    )
    assert (config.window, config.delay, config.train_delay) == (9, 2, [2, 7])
    assert (config.num_attention_heads, config.intermediate_size, config.num_hidden_layers) == (8, 10, 3)
    steps = config.block_steps()
    assert len(steps) == 3 and [m["type"] for m in steps[0][0]] == ["short_term", "long_term"]
    assert tiny().window == PRESETS["memory-mosaics-v2-tiny"]["blocks"][0]["steps"][0][0]["options"]["window"]


def test_setting_an_option_on_the_config_sets_it_in_the_memories():
    config = tiny()
    config.window = 11
    assert config.blocks[0]["steps"][0][0]["options"]["window"] == 11 and config.to_dict()["blocks"] == config.blocks
    with pytest.raises(AttributeError):
        _ = config.windows


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(windw=3), "did you mean 'window'"),
        (dict(hiden_size=3), "did you mean 'hidden_size'"),
        (dict(vocab_size=0), "vocab_size is 0"),
        (dict(hidden_size="a"), "hidden_size is 'a'"),
        (dict(num_hidden_layers=0), "repeats 0 times"),
        (dict(learned_positions=0), "learned_positions is 0"),
        (dict(norm="batch"), "'rms' or 'layer'"),
        (dict(dropout=1.0), "probability below 1"),
        (dict(norm_eps=float("nan")), "norm_eps is nan"),
        (dict(logit_scale=0.0), "above 0"),
        (dict(bias=1), "true or false"),
        (dict(blocks=[]), "at least one"),
        (dict(blocks=3), "list of groups"),
        (dict(blocks=[{"repeat": 1, "steps": [3]}]), "lists of memories"),
        (dict(blocks=[{"repeat": 1, "steps": [[{"type": 3}]]}]), "type is a name"),
        (dict(window="a"), "of type int"),
        (dict(blocks=[{"repeat": 1, "step": []}]), "'repeat' and 'steps'"),
        (dict(blocks=[{"repeat": 1, "steps": [[]]}]), "no memory"),
        (dict(blocks=[{"repeat": 1, "steps": [[{"type": "longterm"}]]}]), "did you mean 'long_term'"),
        (
            dict(blocks=[{"repeat": 1, "steps": [[{"type": "long_term", "options": {"dely": 3}}]]}]),
            "did you mean 'delay'",
        ),
        (dict(blocks=[{"repeat": 1, "steps": [[{"typ": "long_term"}]]}]), "'type', 'options' and perhaps 'name'"),
    ],
)
def test_from_preset_refuses_what_is_impossible(overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny(**overrides)


SPLIT = "transformer-long-short-tiny"


def test_memories_bear_their_type_or_a_name_of_their_own():
    assert [name for name, _ in named(tiny().block_steps()[0])] == ["short_term", "long_term", "feed_forward"]
    assert [name for name, _ in named(MosaicConfig.from_preset(SPLIT).block_steps()[0])] == [
        "short_term",
        "long_term",
        "feed_forward",
    ]
    twice = [[{"type": "attention"}, {"type": "attention"}], [{"type": "attention"}, {"type": "feed_forward"}]]
    assert [name for name, _ in named(twice)] == ["attention", "attention-2", "attention-3", "feed_forward"]


def test_an_option_is_addressed_by_the_name_of_its_memory():
    config = MosaicConfig.from_preset(SPLIT, **{"short_term.window": 20, "long_term.delay": 7, "num_hidden_layers": 2})
    short, long = (memory["options"] for memory in config.block_steps()[0][0])
    assert (short["window"], long["delay"]) == (20, 7) and "window" not in long and "delay" not in short
    assert (getattr(config, "short_term.window"), getattr(config, "long_term.delay")) == (20, 7)
    setattr(config, "long_term.train_delay", (7, 9))
    assert long["train_delay"] == [7, 9] and "train_delay" not in short
    with pytest.raises(ValueError, match=r"no setting 'long_term.dely'; did you mean 'long_term.delay'"):
        setattr(config, "long_term.dely", 3)
    with pytest.raises(ValueError, match=r"no setting 'longterm.delay'; did you mean 'long_term.delay'"):
        MosaicConfig.from_preset(SPLIT, **{"longterm.delay": 3})
    tiny(**{"short_term.window": 9, "hidden_size": 64})


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_an_option_of_several_memories_is_refused_unless_they_share_it(preset):
    config = MosaicConfig.from_preset(preset)
    owners, shared = {}, {}
    for name, memory in named(config.block_steps()[0]):
        for option in option_names(memory["type"]):
            owners.setdefault(option, []).append(name)
            shared.setdefault(option, []).append(option in REGISTRY[memory["type"]].shared_options)
    for option, names in owners.items():
        value = next(
            memory["options"].get(option)
            for _, memory in named(config.block_steps()[0])
            if option in option_names(memory["type"])
        )
        if len(names) == 1 or all(shared[option]):
            setattr(config, option, value)
        else:
            with pytest.raises(ValueError, match=f"'{option}' is an option of several memories.*{min(names)}.{option}"):
                setattr(config, option, value)
    assert len(owners.get("num_attention_heads", [])) < 2 or all(shared["num_attention_heads"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "a"], "two memories of a block have the name 'a'"),
        (["attention-2", None], "two memories of a block have the name 'attention-2'"),
        (["a.b", None], "use letters, digits"),
        (["", None], "use letters, digits"),
        ([3, None], "use letters, digits"),
    ],
)
def test_a_name_that_is_none_or_taken_is_refused(names, message):
    memories = [{"type": "attention", "options": {"num_attention_heads": 2}} for _ in names]
    for memory, name in zip(memories, names, strict=True):
        if name is not None:
            memory["name"] = name
    blocks = [{"repeat": 1, "steps": [memories]}]
    with pytest.raises(ValueError, match=f"(?i){message}"):
        MosaicConfig(blocks=blocks)


def test_remove_memories_takes_a_name_or_a_type():
    config = MosaicConfig.from_preset(SPLIT)
    config.remove_memories("long_term")
    assert [name for name, _ in named(config.block_steps()[0])] == ["short_term", "feed_forward"]
    config = MosaicConfig.from_preset(SPLIT)
    config.remove_memories("attention")
    assert [name for name, _ in named(config.block_steps()[0])] == ["feed_forward"]
    steps = [[{"type": "attention"}, {"type": "attention"}], [{"type": "feed_forward"}]]
    for memory in (memory for step in steps for memory in step):
        memory["options"] = {"num_attention_heads": 2} if memory["type"] == "attention" else {"intermediate_size": 3}
    config = MosaicConfig(blocks=[{"repeat": 1, "steps": steps}], hidden_size=16)
    config.remove_memories("attention-2")
    assert [name for name, _ in named(config.block_steps()[0])] == ["attention", "feed_forward"]


def test_from_preset_refuses_an_unknown_preset():
    with pytest.raises(ValueError, match="did you mean 'memory-mosaics-v2-tiny'"):
        MosaicConfig.from_preset("memory-mosaic-v2-tiny")


@pytest.mark.parametrize("key", ["widow", "hidden_sizes", "layers"])
def test_config_file_with_an_unknown_key_is_refused(tmp_path, key):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: 3}))
    with pytest.raises(ValueError, match=key):
        AutoConfig.from_pretrained(tmp_path)


def test_config_refuses_a_number_of_blocks_that_is_not_theirs():
    with pytest.raises(ValueError, match="num_hidden_layers is 7"):
        MosaicConfig(num_hidden_layers=7)


def test_config_of_another_kind_of_model_is_refused(tmp_path):
    LlamaConfig(hidden_size=32, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config of a llama"):
        MosaicConfig.from_pretrained(tmp_path)


def test_config_refuses_an_unknown_setting_after_it_was_made_too():
    config = tiny_config()
    for name, near in (("widow", "'window'"), ("hidden_sise", "'hidden_size'"), ("xyz", "choose one of")):
        with pytest.raises(ValueError, match=f"no setting '{name}'.*{near}"):
            setattr(config, name, 3)
        assert not hasattr(config, name)
    config.window, config.dropout, config.architectures, config._own = 9, 0.25, ["x"], 1
    assert (config.window, config.dropout, config.blocks[0]["steps"][0][0]["options"]["window"]) == (9, 0.25, 9)
