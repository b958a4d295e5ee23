"""Every matrix of every preset starts as its paper says, however the model came to be.

What is expected stands in `EXPECTED`, written from the papers and not from the code: for each memory, each of its
parameters by the name that the memory gives it.
"""

from __future__ import annotations

import math
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from helpers import tiny_config
from mosaics import MosaicConfig, MosaicForCausalLM
from mosaics.memories import REGISTRY, Memory
from mosaics.models import PRESETS


class Normal:
    """A normal distribution whose deviation follows from fan-in, width, block (from 0), blocks and options."""

    def __init__(self, deviation, clamped: bool) -> None:
        self.deviation, self.clamped = deviation, clamped

    def check(self, weight: torch.Tensor, **facts) -> None:
        sigma = self.deviation(weight=weight, **facts)
        weight = weight.detach().flatten()
        weight = weight[:: max(1, len(weight) // 10**6)].double()  # a million numbers of it say enough
        n = len(weight)
        share = 0.9975 if self.clamped else 1.0  # drawn again beyond three deviations, it would be 0.9866
        slack = 5 / math.sqrt(2 * n)
        assert abs(weight.std() / (sigma * share) - 1) < slack, (weight.std() / sigma, slack)
        assert abs(weight.mean()) < 5 * sigma / math.sqrt(n)
        assert (weight.abs() > 2.5 * sigma).double().mean() > (0.002 if n > 3000 else -1)  # not uniform: 1.2 %
        if self.clamped:
            assert weight.abs().max() <= 3 * sigma * (1 + 1e-6)


class Uniform:
    """U(0, 1)."""

    def check(self, weight: torch.Tensor, **facts) -> None:
        assert (weight >= 0).all() and (weight <= 1).all()
        assert weight.numel() == 1 or weight.std() > 0.01


class Within:
    """Drawn evenly, by a function of what is kept, from one bound to another."""

    def __init__(self, bounds, function=lambda x: x) -> None:
        self.bounds, self.function = bounds, function

    def check(self, weight: torch.Tensor, **facts) -> None:
        found = self.function(weight.detach().double()).flatten()
        low, high = self.bounds(weight)
        assert low - 1e-6 <= found.min() and found.max() <= high + 1e-6
        slack = 5 * (high - low) / math.sqrt(12 * len(found))
        assert abs(found.mean() - (low + high) / 2) < slack and (len(found) == 1 or found.std() > 0)


class Rows:
    """As another, but for the last row of each head, which is 0: its bias."""

    def __init__(self, inner) -> None:
        self.inner = inner

    def check(self, weight: torch.Tensor, **facts) -> None:
        assert not weight[:, -1].any()
        self.inner.check(weight=weight[:, :-1], **facts)


class UnitRows:
    """Random directions."""

    def check(self, weight: torch.Tensor, **facts) -> None:
        assert (weight.norm(dim=-1) - 1).abs().max() < 1e-5
        assert weight.mean().abs() < 5 / math.sqrt(weight.numel() * weight.shape[-1])
        assert abs(weight.std() * math.sqrt(weight.shape[-1]) - 1) < 0.05


class Constant:
    def __init__(self, value) -> None:
        self.value = value

    def check(self, weight: torch.Tensor, **facts) -> None:
        value = self.value(weight=weight, **facts) if callable(self.value) else self.value
        assert torch.allclose(weight.detach().double(), torch.as_tensor(value, dtype=torch.float64), atol=1e-6)


def v1_map(options, fan_in, **_):
    return options.get("initializer_range") or fan_in**-0.5


def v1_output(options, fan_in, layers, **_):
    given = options.get("initializer_range")
    return given / (2 * layers) ** 0.5 if given else (fan_in * layers) ** -0.5


TABLE_6 = Normal(lambda fan_in, layer, **_: (2 * fan_in * (layer + 1)) ** -0.5, clamped=True)
V1_MAP, V1_OUTPUT = Normal(v1_map, clamped=False), Normal(v1_output, clamped=False)
V1_DECAY = Constant(lambda weight, **_: torch.linspace(0.05, 0.5, len(weight)))
WORDS = Normal(lambda scale, width, **_: scale * width**-0.5, clamped=True)
ONES, ZEROS = Constant(1.0), Constant(0.0)

# Memory Mosaics v2, Table 6 (the scale of the values: exp(0)).
CONTEXTUAL_V2 = {
    "*_proj.weight": TABLE_6,
    "key_gate.weight": TABLE_6,
    "key_decay.weight": TABLE_6,
    "value_mix": Uniform(),
    "value_scale": ZEROS,
    "bandwidth_base": Constant(1.5),
    "bandwidth_slope": Constant(1.5),
    "bandwidth_exponent": Constant(1 / 3),
}


def _titans_rates(count, options):
    """Little is forgotten at first; the other two are 0."""
    heads = options["num_attention_heads"]
    return torch.cat([torch.zeros(heads), torch.full((heads,), -4.0), torch.zeros(count - 2 * heads)])


def _of_sums(weight, options, **_):
    """Of weights, or of their logarithms."""
    return 1.0 if options["retention"] in ("kl", "logit") else weight.shape[1] ** -0.5


CONVOLUTION = Within(lambda weight: (-(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5))
# Mamba-2: e^a from 1 to 16, and softplus(b) from 0.001 to 0.1 by its logarithm.
DECAY_RATE = Within(lambda _: (1, 16), torch.exp)
STEP = Within(lambda _: (math.log(0.001), math.log(0.1)), lambda x: torch.nn.functional.softplus(x).log())
EXPECTED = {
    "delta_rule": {  # the maps as those of v2, so that systems begin alike
        "*_proj.weight": TABLE_6,
        "decay_proj.?.weight": TABLE_6,
        "convolution.weight": CONVOLUTION,
        "decay_rate": DECAY_RATE,
        "decay_bias": STEP,
        "read_scale": ONES,
    },
    "ttt": {
        "[qkvo]_proj.weight": TABLE_6,
        "gate_proj.weight": TABLE_6,
        "rate_proj.weight": Normal(lambda **_: 0.02, clamped=False),
        "place_rates": ZEROS,
        "?_convolution.*": CONVOLUTION,
        "maps.weights.?": Rows(Normal(lambda **_: 0.02, clamped=False)),
        "*_scale": ONES,
        "*_shift": ZEROS,
    },
    "titans": {
        "*_proj.weight": TABLE_6,
        "rates_proj.bias": Constant(lambda weight, options, **_: _titans_rates(len(weight), options)),
        "convolution.weight": CONVOLUTION,
        "maps.weights.?": Normal(lambda weight, **_: weight.shape[1] ** -0.5, clamped=False),
        "read_scale": ONES,
    },
    "miras": {
        "*_proj.weight": TABLE_6,
        "rates.*.weight": TABLE_6,
        "rates.retain.1.bias": Constant(6.0),
        "rates.step.1.bias": ZEROS,
        "rates.delta.1.bias": Constant(math.log(math.e - 1)),
        "convolution.weight": CONVOLUTION,
        "maps.weights.?": Normal(_of_sums, clamped=False),
        "*_scale": ONES,
        "*_shift": ZEROS,
    },
    "titans_mag": {"*_scale": ONES},  # the memories in it have their own
    "titans_mac": {"retrieve_proj.weight": TABLE_6, "retrieve_convolution.weight": CONVOLUTION, "*_scale": ONES},
    "mom": {
        "*_proj.weight": TABLE_6,
        "router.weight": TABLE_6,
        "pair_projs.?.weight": TABLE_6,
        "convolution.weight": CONVOLUTION,
        "decay_rate": DECAY_RATE,
        "decay_bias": STEP,
        "read_scale": ONES,
    },
    "gam": {  # the bank: Xavier's uniform
        "gate_proj.weight": TABLE_6,
        "convolution.*": Within(lambda _: (-(3**-0.5), 3**-0.5)),  # of 3 tokens
        "bank": Within(lambda weight: (-((6 / sum(weight.shape)) ** 0.5), (6 / sum(weight.shape)) ** 0.5)),
    },
    "lattice": {
        "*_proj.weight": TABLE_6,
        "rates_proj.bias": Constant(lambda weight, **_: torch.tensor([0.0, 3.0]).repeat_interleave(len(weight) // 2)),
        "convolution.weight": CONVOLUTION,
        "slots": UnitRows(),
        "read_scale": ONES,
    },
    "omega": {
        "*_proj.weight": TABLE_6,
        "rates_proj.bias": Constant(lambda weight, options, **_: _titans_rates(len(weight), options)),
        "convolution.weight": CONVOLUTION,
        "coefficient_roots": Constant(lambda weight, **_: torch.tensor([1, 1, 0.5**0.5, 6**-0.5])[: len(weight)]),
        "maps.weights.?": Normal(lambda weight, **_: weight.shape[1] ** -0.5, clamped=False),
        "read_scale": ONES,
    },
    "deep_attention": {
        "*_proj.weight": TABLE_6,
        "rates_proj.bias": Constant(lambda weight, **_: torch.tensor([0, 0, -6]).repeat_interleave(len(weight) // 3)),
        "sharpness": Constant(math.log(4)),
        "convolution.weight": CONVOLUTION,
        "second": Normal(lambda weight, **_: weight.shape[1] ** -0.5, clamped=False),
        "read_scale": ONES,
    },
    "rmt": {"memory": Normal(lambda width, **_: (2 * width) ** -0.5, clamped=False)},
    "mamba2": {
        "*_proj.weight": TABLE_6,
        "convolution.weight": CONVOLUTION,
        "convolution.bias": Within(lambda _: (-0.5, 0.5)),  # of 4 tokens
        "decay_rate": DECAY_RATE,
        "step_bias": STEP,
        "skip": ONES,
        "read_scale": ONES,
    },
    "short_term": CONTEXTUAL_V2,
    "long_term": CONTEXTUAL_V2,
    "feed_forward": {"*_proj.weight": TABLE_6},
    "lla": {  # its paper's are not known; a ridge of 1
        "*_proj.weight": TABLE_6,
        "*_scale": ONES,
        "ridge": Constant(math.log(math.e - 1)),
    },
    "parallax": {"*_proj.weight": TABLE_6},
    "attention": {  # the paper gives none for its baseline
        "*_proj.weight": TABLE_6,
        "persistent": Normal(lambda **_: 1.0, clamped=False),
    },
    # Memory Mosaics v1: the authors' library, or their nano version where a deviation is given.
    "leaky_contextual": {
        "key_extractor.proj.weight": V1_MAP,
        "key_extractor.decay": V1_DECAY,
        "key_extractor.scale": Constant(0.1),
        "value_proj.weight": V1_MAP,
        "out_proj.weight": V1_OUTPUT,
        "value_mix": Uniform(),
        "value_scale": Constant(-0.05),
    },
    "kernel_persistent": {
        "key_extractor.proj.weight": V1_MAP,
        "key_extractor.decay": V1_DECAY,
        "key_extractor.scale": Constant(0.1),
        "pair_*": Normal(lambda weight, **_: weight.shape[-1] ** -0.5, clamped=False),
        "value_scale": Constant(-0.05),
        "out_proj.weight": V1_OUTPUT,
    },
}


def check_memory(memory, config) -> None:
    """Its parameters, and those of the memories in it as theirs."""
    inside = [module for module in memory.modules() if isinstance(module, Memory) and module is not memory]
    for inner in inside:
        check_memory(inner, config)
    others = {parameter for inner in inside for parameter in inner.parameters()}
    for name, weight in memory.named_parameters():
        if weight in others:
            continue
        found = [e for pattern, e in EXPECTED[memory.type].items() if fnmatch(name, pattern)]
        if memory.type == "delta_rule" and name == "decay_bias" and memory.options.decay == "low_rank":
            found = [ZEROS]  # GLA
        [expected] = found or [ZEROS] * name.endswith(".bias")
        layers, options = config.num_hidden_layers, vars(memory.options)
        facts = dict(weight=weight, layer=memory.layer_index, layers=layers, options=options)
        try:
            expected.check(**facts, fan_in=weight.shape[-1], width=config.hidden_size)
        except AssertionError as error:
            raise AssertionError(f"block {memory.layer_index}, {memory.type}.{name}: {error}") from None


def check_model(model: MosaicForCausalLM) -> None:
    """All parameters: those of the memories, words and norms."""
    config, seen = model.config, set()
    for memory in model.model.stack.memories():
        check_memory(memory, config)
        seen |= set(memory.parameters())
    positions = [] if model.model.embed_positions is None else [model.model.embed_positions.weight]
    for words in {model.lm_head.weight, model.model.embed_tokens.weight, *positions}:
        WORDS.check(words, scale=config.embedding_scale, width=config.hidden_size)
        seen.add(words)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm | nn.LayerNorm):
            ONES.check(module.weight)
            seen.add(module.weight)
            if getattr(module, "bias", None) is not None:
                ZEROS.check(module.bias)
                seen.add(module.bias)
    assert seen == set(model.parameters())


def scaled_down(preset: str, **overrides) -> MosaicConfig:
    """A preset at its own depth and arrangement, narrow."""
    sizes = dict(hidden_size=64, vocab_size=300)
    if MosaicConfig.from_preset(preset).has("num_attention_heads"):
        sizes["num_attention_heads"] = 4
    width = "num_pairs" if "v1" in preset else "intermediate_size"
    if preset.endswith("nano"):
        sizes["embedding_scale"] = 0.02 * 64**0.5
    return MosaicConfig.from_preset(preset, **sizes, **{width: 96}, **overrides)


def direct(config, folder):
    return MosaicForCausalLM(config)


def from_meta(config, folder):
    with torch.device("meta"):
        model = MosaicForCausalLM(config)
    model.to_empty(device="cpu").init_weights()
    return model


def from_config(config, folder):
    return AutoModelForCausalLM.from_config(config)


def own_from_config(config, folder):
    return MosaicForCausalLM._from_config(config)


def lacking_all(config, folder):
    """Loaded from a file that has nothing but the words."""
    model = MosaicForCausalLM(config)
    model.save_pretrained(folder)
    save_file({"lm_head.weight": model.lm_head.weight.detach()}, folder / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(folder)


WAYS = [direct, from_meta, from_config, own_from_config, lacking_all]


def test_every_registered_memory_has_an_entry():
    assert set(EXPECTED) == set(REGISTRY)


# One for each set of memories.
SMALL = [name for name in sorted(PRESETS) if name.endswith(("tiny", "nano", "regbench"))]
SMALL = sorted({frozenset(MosaicConfig.from_preset(name).memory_types()): name for name in SMALL}.values())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_initialisation_of_every_matrix_of_every_preset(preset):
    torch.manual_seed(1)
    check_model(MosaicForCausalLM(scaled_down(preset)))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("preset", SMALL)
def test_initialisation_is_the_same_however_a_model_is_made(preset, way, tmp_path):
    torch.manual_seed(2)
    check_model(way(scaled_down(preset, bias=True), tmp_path))


@pytest.mark.parametrize("preset", SMALL)
@pytest.mark.parametrize("every", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_initialisation_of_what_a_file_lacks_keeps_the_rest(preset, every, tmp_path):
    """Every second or third tensor is missing: parts of every memory, and words and norms."""
    torch.manual_seed(3)
    config = scaled_down(preset, bias=True)
    MosaicForCausalLM(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: torch.full_like(x, 7.0) for i, (name, x) in enumerate(sorted(tensors.items())) if i % every}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = MosaicForCausalLM(config)
    with torch.no_grad():
        for (name, found), start in zip(model.named_parameters(), fresh.parameters(), strict=True):
            if name in kept:
                assert torch.equal(found, kept[name]), name
                found.copy_(start)  # the rest is checked beside what is right
    check_model(model)


@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "transformer-tiny", "transformer-long-short-tiny"])
def test_initialisation_with_one_deviation_for_all_maps(preset):
    torch.manual_seed(6)
    config = scaled_down(preset, initializer_range=0.02, embedding_scale=0.02 * 64**0.5)
    model = MosaicForCausalLM(config)
    expected = Normal(lambda **_: 0.02, clamped=True)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            expected.check(weight)
            assert "norm" not in name


@pytest.mark.parametrize("preset", [name for name in sorted(PRESETS) if name.endswith(("small", "large"))])
@pytest.mark.slow
def test_initialisation_of_first_middle_and_last_block_at_full_width(preset):
    with torch.device("meta"):
        model = MosaicForCausalLM(MosaicConfig.from_preset(preset, vocab_size=300))
    torch.manual_seed(4)
    blocks = model.model.stack.blocks
    for index in (0, len(blocks) // 2, len(blocks) - 1):
        blocks[index].to_empty(device="cpu")
        MosaicForCausalLM(tiny_config())  # transformers has its way of going through modules from the first model on
        blocks[index].smart_apply(model._initialize_weights, model.is_custom_code())
        for memory in blocks[index].memories():
            check_memory(memory, model.config)
        blocks[index].to_empty(device="meta")


def test_the_check_can_fail():
    """With a matrix as `nn.Linear` makes it, an unclamped one, one of the wrong block, and a scalar that is off."""

    def tampered(change):
        torch.manual_seed(5)
        model = MosaicForCausalLM(scaled_down("memory-mosaics-v2-tiny"))
        with torch.no_grad():
            change([*model.model.stack.blocks[2].memories()])
        return model

    changes = [
        lambda m: m[2].up_proj.reset_parameters(),
        lambda m: m[2].up_proj.weight.mul_((3 / 4) ** 0.5),
        lambda m: nn.init.normal_(m[2].up_proj.weight, std=(2 * 64 * 3) ** -0.5),
        lambda m: nn.init.uniform_(m[2].up_proj.weight, -0.088, 0.088),
        lambda m: m[0].bandwidth_exponent[1].add_(0.1),
        lambda m: m[1].value_mix.fill_(0.5),
    ]
    for change in changes:
        with pytest.raises(AssertionError):
            check_model(tampered(change))
    check_model(tampered(lambda m: None))
