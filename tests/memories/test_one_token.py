"""A residual step of one token by one call, beside the same step by the memories themselves."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache

from helpers import relative_error, tiny_model, tokens
from mosaics.memories import REGISTRY, Context, Memory
from mosaics.memories.contract import one_token
from mosaics.models import MosaicConfig, MosaicForCausalLM

needs_compiler = pytest.mark.skipif(not one_token.available(), reason="no C++ compiler")
STEPS = 4  # of the two blocks of a tiny model


@pytest.fixture
def calls(monkeypatch):
    """The calls that computed a step."""
    made, done = [], one_token._done
    monkeypatch.setattr(one_token, "_done", lambda *given: made.append(done(*given)) or made[-1])
    return made


def decoded(model, ids, prompt=5, cache=None, monkeypatch=None, **given):
    """Logits of `ids` after a prompt, a token a call; with `monkeypatch` by the memories themselves."""
    cache = cache or DynamicCache(config=model.config)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if monkeypatch:
            patch.setattr(Memory, "step_of_one", None)
        head = model(ids[:, :prompt], past_key_values=cache, **given).logits
        tail = [model(ids[:, t : t + 1], past_key_values=cache, **given).logits for t in range(prompt, ids.shape[1])]
    return torch.cat([head, *tail], dim=1)


@needs_compiler
@pytest.mark.parametrize(
    "dtype, bound, batch, threads, bias, width, time",
    [
        (torch.float64, 1e-9, 1, 1, False, 16, 110),  # beyond where buffers grow and windows let go
        (torch.float64, 1e-9, 3, 2, True, 38, 20),
        (torch.float32, 2e-5, 8, 1, True, 22, 30),
    ],
)
def test_step_of_one_equals_the_memories(dtype, bound, batch, threads, bias, width, time, calls, monkeypatch):
    model, ids = tiny_model(dtype, hidden_size=width, intermediate_size=29, bias=bias), tokens(batch, time)
    with torch.no_grad():
        for memory in model.model.stack.memories():
            if memory.type != "feed_forward":  # beyond the clamps, of one head
                for vector, value in zip(
                    (memory.value_scale, memory.bandwidth_base, memory.bandwidth_slope, memory.bandwidth_exponent),
                    (16.0, 10.5, 11.0, -1.5),
                    strict=True,
                ):
                    vector[0] = value if dtype == torch.float64 else vector[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = decoded(model, ids)
    finally:
        torch.set_num_threads(before)
    assert len(calls) == STEPS * (time - 5)
    expected = decoded(model, ids, monkeypatch=monkeypatch)
    assert len(calls) == STEPS * (time - 5) and relative_error(found, expected) < bound


@needs_compiler
@pytest.mark.parametrize(
    "batch, threads, bias, width, time", [(1, 1, False, 16, 110), (3, 2, True, 38, 40), (8, 1, True, 70, 30)]
)
def test_step_of_one_in_bfloat16_is_nearer_to_the_equations(batch, threads, bias, width, time, calls, monkeypatch):
    model = tiny_model(torch.bfloat16, hidden_size=width, intermediate_size=29, bias=bias)
    exact, ids, before = copy.deepcopy(model).double(), tokens(batch, time), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = decoded(model, ids)
    finally:
        torch.set_num_threads(before)
    assert len(calls) == STEPS * (time - 5) and found.dtype == torch.bfloat16
    expected, by_memories = (decoded(m, ids, monkeypatch=monkeypatch)[:, 5:] for m in (exact, model))
    # Less is rounded on the way: 0.52 to 0.65 of their error.
    assert relative_error(found[:, 5:], expected) < 0.75 * relative_error(by_memories, expected) < 0.02


@needs_compiler
def test_step_of_one_mixes_with_other_cuts(calls):
    model, ids = tiny_model(), tokens(2, 60)
    with torch.no_grad():
        whole, cache, found, begin = model(ids).logits, DynamicCache(config=model.config), [], 0
        for time in (1, 1, 7, 1, 1, 1, 2, 1, 30, *[1] * 15):
            found.append(model(ids[:, begin : begin + time], past_key_values=cache).logits)
            begin += time
    assert relative_error(torch.cat(found, dim=1), whole) < 1e-9
    assert len(calls) == STEPS * 20 + 2  # of the first token only the networks


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def maps(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.lm_head]


def memories(model):
    return list(model.model.stack.memories())


def written(model):
    for parameter in model.model.stack.parameters():
        parameter.data.mul_(1.1)


def replaced(model):
    for parameter in model.model.stack.parameters():
        parameter.data = parameter.data * 1.1


def loaded(model):
    model.load_state_dict({name: 1.1 * x for name, x in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({name: 1.1 * x for name, x in model.state_dict().items()}, assign=True)


def turned(model):
    for linear in maps(model):
        if linear.in_features == linear.out_features:
            linear.weight.data = linear.weight.data.T


def subclassed(model):
    for linear in maps(model):
        linear.__class__ = Doubled


def other_map(model):
    for memory in memories(model):
        (memory.out_proj if hasattr(memory, "out_proj") else memory.down_proj).__class__ = Doubled


def parametrised(model):
    for linear in maps(model):
        nn.utils.parametrize.register_parametrization(linear, "weight", Twice())


def parametrised_memory(model):
    for memory in contextual(model):
        nn.utils.parametrize.register_parametrization(memory, "value_mix", Twice())


def hooked_maps(model):
    for linear in maps(model):
        linear.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_memories(model):
    for memory in memories(model):
        memory.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))


def hooked_norms(model):
    for block in model.model.stack.blocks:
        for step in block.steps:
            step.norm.register_forward_pre_hook(lambda module, args: (-args[0],))


def patched(model):
    for memory in memories(model):
        memory.forward = lambda *given, forward=memory.forward: [2 * (y := forward(*given))[0], y[1]]


def contextual(model):
    return [memory for memory in memories(model) if memory.type != "feed_forward"]


def other_bandwidth(model):
    def widened(own):
        return lambda: (found := own())._replace(base=found.base + 1)

    for memory in contextual(model):
        memory.bandwidth = widened(memory.bandwidth)


def other_class(model):
    for memory in contextual(model):

        class Longer(type(memory)):
            def value_length(self):
                return 2 * super().value_length()

        memory.__class__ = Longer


NETWORKS, ALL = 2, STEPS  # steps of a token
CHANGES = {written: ALL, replaced: ALL, loaded: ALL, assigned: ALL, turned: NETWORKS, parametrised_memory: NETWORKS}
CHANGES |= {other_bandwidth: NETWORKS, other_class: NETWORKS}
CHANGES |= dict.fromkeys(
    (subclassed, other_map, parametrised, hooked_maps, hooked_memories, hooked_norms, patched), 0
)  # how many steps a token are still computed by one call


@needs_compiler
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_step_of_one_knows_of_every_change(change, calls, monkeypatch):
    found, ids = [], tokens(1, 24)
    for twin in (None, monkeypatch):
        model = tiny_model()
        cache = DynamicCache(config=model.config)
        before = decoded(model, ids[:, :12], cache=cache, monkeypatch=twin)
        assert len(calls) == STEPS * 7
        change(model)
        found.append(decoded(model, ids[:, 12:], prompt=1, cache=cache, monkeypatch=twin))
        if twin is None:
            assert len(calls) == STEPS * 7 + CHANGES[change] * 12
            del calls[STEPS * 7 :]
    assert relative_error(*found) < 1e-11
    assert relative_error(decoded(tiny_model(), ids)[:, 12:], found[0]) > 1e-3 and before.isfinite().all()


@needs_compiler
def test_step_of_one_follows_an_adapter_through_merge_and_unmerge(calls, monkeypatch):
    torch.manual_seed(0)
    targets = ["key_proj", "value_proj", "out_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    ids, inner = tokens(1, 16), model.base_model.model
    plain = decoded(inner, ids, monkeypatch=monkeypatch)
    assert relative_error(decoded(inner, ids), plain) < 1e-11 and not calls  # PEFT's maps are of its own classes
    model.merge_adapter()
    assert relative_error(decoded(inner, ids), plain) < 1e-9 and not calls
    model.unmerge_adapter()
    assert relative_error(decoded(inner, ids), plain) < 1e-9 and not calls
    merged = model.merge_and_unload()
    assert relative_error(decoded(merged, ids), plain) < 1e-9 and len(calls) == STEPS * 11


class Gain(Memory):
    """Each channel times a number of its own."""

    @dataclass(frozen=True)
    class Options:
        source: str

    def __init__(self, options, common, layer_index):
        super().__init__(options, common, layer_index)
        self.gain = nn.Parameter(torch.empty(common.hidden_size))

    def reset_parameters(self, layer_index):
        nn.init.normal_(self.gain)

    def forward(self, x, layout, state, context):
        return x * self.gain, state

    def one_token(self, x, layout, state, context):
        stages = one_token.addresses(Path(self.options.source), "gained_double")
        gain = one_token.address(self.gain, (x.shape[2],), x.dtype)
        return one_token.Part(stages, [gain, one_token.bits(1.0)], 0)


@needs_compiler
def test_step_of_one_takes_what_a_new_memory_brings(tmp_path, calls, monkeypatch):
    header = one_token.SOURCE.with_suffix(".h")
    (tmp_path / "gain.cpp").write_text(f"""#include "{header}"
        template <typename T> struct Record {{ const T* gain; double scale; }};
        template <typename T> void gained(const Call<T>& c, const Record<T>& m, T*) {{
            const Share share(c.width, c.thread, c.threads);
            for (int64_t b = 0; b < c.batch; b++)
                for (int64_t i = share.from; i < share.end; i++)
                    c.y[b * c.width + i] += T(m.scale) * m.gain[i] * c.x[b * c.width + i];
        }}
        STAGE(gained)""")
    monkeypatch.setitem(REGISTRY, "gain", Gain)
    monkeypatch.setattr(Gain, "type", "gain", raising=False)
    attention = {"num_attention_heads": 2}
    step = [
        {"type": "gain", "options": {"source": str(tmp_path / "gain.cpp")}},
        {"type": "feed_forward", "options": {"intermediate_size": 9}},
        {"type": "short_term", "options": attention | {"window": 4}},
    ]
    torch.manual_seed(0)
    model = MosaicForCausalLM(MosaicConfig(blocks=[{"repeat": 1, "steps": [step]}], vocab_size=64, hidden_size=12))
    model, ids = model.double().eval(), tokens(3, 12) % 64
    found = decoded(model, ids)
    assert len(calls) == 7 and relative_error(found, decoded(model, ids, monkeypatch=monkeypatch)) < 1e-11
    with torch.no_grad():
        model.model.stack.blocks[0].steps[0].memories["gain"].gain.zero_()
    assert relative_error(found, decoded(model, ids)) > 1e-3


@needs_compiler
def test_step_of_one_leaves_other_passes_to_the_memories(calls, monkeypatch):
    model, ids = tiny_model(torch.float32), tokens(2, 12)
    expected = decoded(model, ids, monkeypatch=monkeypatch)
    padded, mask = DynamicCache(config=model.config), torch.ones(2, 12, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        for begin, end in ((0, 10), (10, 11), (11, 12)):
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=padded)
    static = decoded(model, ids, cache=StaticCache(model.config, 12))
    assert relative_error(static, expected) < 1e-5
    flops = []
    for twin in (None, monkeypatch):
        with FlopCounterMode(display=False) as counted:
            decoded(model, ids, monkeypatch=twin)
        flops.append(counted.get_total_flops())
    assert flops[0] == flops[1]
    with torch.autocast("cpu", torch.bfloat16):
        decoded(model, ids)
    decoded(model.train(), ids)
    decoded(model.eval(), ids, context=Context(without=frozenset({"long_term"})))
    decoded(model, ids.repeat(5, 1))  # ten rows
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache)
    assert model(ids[:, 6:7], past_key_values=cache).logits.requires_grad
    assert not calls
    assert relative_error(decoded(model, ids), expected) < 1e-5 and len(calls) == STEPS * 7


@needs_compiler
@pytest.mark.parametrize("state_dtype", ["bfloat16", "int8"])
def test_step_of_one_leaves_narrow_pairs_to_the_memories(state_dtype, calls, monkeypatch):
    model, ids = tiny_model(torch.float32, state_dtype=state_dtype), tokens(2, 12)
    found, expected = decoded(model, ids), decoded(model, ids, monkeypatch=monkeypatch)
    assert len(calls) == NETWORKS * 7 and relative_error(found, expected) < 1e-4


@needs_compiler
def test_step_of_one_goes_on_between_inference_mode_and_outside(calls, monkeypatch):
    model, ids = tiny_model(), tokens(1, 30)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids[:, :6], past_key_values=cache)
        head = model(ids[:, 6:7], past_key_values=cache).logits
    rest = decoded(model, ids[:, 7:], prompt=1, cache=cache)
    assert len(calls) == STEPS * 24
    expected = decoded(model, ids, monkeypatch=monkeypatch)[:, 6:]
    assert relative_error(torch.cat([head, rest], dim=1), expected) < 1e-11


@needs_compiler
def test_step_of_one_generates_with_beams_as_the_memories_do(calls, monkeypatch):
    model, ids = tiny_model(), tokens(2, 9)
    options = dict(max_new_tokens=20, num_beams=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    options["attention_mask"] = torch.ones_like(ids)
    found = model.generate(ids, **options)
    assert len(calls) >= STEPS * 18
    monkeypatch.setattr(Memory, "step_of_one", None)
    assert found.equal(model.generate(ids, **options))


def test_memories_answer_without_a_compiler(calls, monkeypatch):
    monkeypatch.setattr(one_token, "_function", lambda dtype: None)
    model, ids = tiny_model(), tokens(1, 14)
    with torch.no_grad():
        assert relative_error(decoded(model, ids), model(ids).logits) < 1e-9
    assert not calls
