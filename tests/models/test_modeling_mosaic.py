import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from helpers import VOCABULARY, relative_error, tiny_config, tiny_model, tokens
from mosaics import MosaicConfig, MosaicForCausalLM, draw
from mosaics.memories import Context, Layout
from mosaics.models import count_targets, laid_out
from mosaics.models import loss as losses

BOUND = 1e-9
VARIANTS = {
    "v2": {},
    "layer norm, biases, tied, scaled": dict(norm="layer", bias=True, tie_word_embeddings=True, logit_scale=0.25),
    "widest reach": dict(window=50, delay=1, train_delay=[1, 60]),
    "narrowest window": dict(window=2, delay=2, train_delay=[2, 2]),
    "v1": dict(preset="memory-mosaics-v1-tiny"),
    "learned positions": dict(preset="gam-tiny", learned_positions=90, dropout=0.0),
    "v1 nano, biases": dict(preset="memory-mosaics-v1-nano", bias=True),
}
V1 = dict(preset="memory-mosaics-v1-tiny")


@pytest.fixture(scope="module", params=sorted(VARIANTS))
def model(request):
    return tiny_model(**VARIANTS[request.param])


def plain(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def cached(model, ids, pieces, attention_mask=None, document_ids=None):
    """Logits of a sequence fed in pieces."""
    cache, begin, logits = None, 0, []
    with torch.no_grad():
        for piece in pieces:
            part = slice(begin, begin + piece)
            output = model(
                ids[:, part],
                attention_mask=None if attention_mask is None else attention_mask[:, : begin + piece],
                document_ids=None if document_ids is None else document_ids[:, part],
                past_key_values=cache,
                use_cache=True,
            )
            cache, begin = output.past_key_values, begin + piece
            logits.append(output.logits)
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(logits, dim=1)


def difference(value, expected):
    return (value - expected).abs().max().item()


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [39, 1], [1, 39], [2, 7, 1, 1, 29]])
def test_forward_any_split_equals_whole(model, pieces):
    ids = tokens(2, 40)
    assert difference(cached(model, ids, pieces), plain(model, ids)) < BOUND


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_forward_padding_documents_and_cuts_change_nothing(data):
    """Rows of random documents with padding anywhere, fed in random pieces: each document as if it were alone."""
    model = tiny_model(**data.draw(st.sampled_from([{}, V1])))
    seed = data.draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    time = data.draw(st.integers(1, 45))
    pieces = []
    while sum(pieces) < time:
        pieces.append(data.draw(st.integers(1, min(20, time - sum(pieces)))))
    ids = tokens(3, time, seed)
    mask = torch.rand(3, time, generator=generator) < 0.7
    mask[1] = torch.arange(time) >= time // 3  # padded on the left
    mask[2] = torch.arange(time) < time - time // 3  # and on the right
    documents = (torch.rand(3, time, generator=generator) < 0.1).cumsum(1) % 3
    logits = {
        "whole": model(ids, mask, documents, use_cache=False).logits,
        "pieces": cached(model, ids, pieces, mask.long(), documents),
    }
    for row in range(3):
        real = mask[row].nonzero()[:, 0]
        borders = [i for i in range(1, len(real)) if documents[row, real[i]] != documents[row, real[i - 1]]]
        for begin, end in zip([0, *borders], [*borders, len(real)], strict=True):
            if begin == end:
                continue
            where = real[begin:end]
            alone = plain(model, ids[row : row + 1, where])[0]
            for name, found in logits.items():
                assert difference(found[row, where], alone) < BOUND, name


@pytest.mark.parametrize("inputs", ["input_ids", "inputs_embeds"])
def test_forward_what_lies_at_padding_reaches_nothing(model, inputs):
    """Not even NaN, nor ids that are no tokens: neither values nor gradients."""
    ids = tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, [0, 1, 5]] = mask[1, [3, 11]] = 0
    found = []
    for filler in (1, torch.nan if inputs == "inputs_embeds" else 10**6):
        given = ids if inputs == "input_ids" else model.model.embed_tokens(ids).detach()
        given = given.masked_fill((mask == 0) if given.dim() == 2 else (mask == 0)[..., None], filler)
        output = model(**{inputs: given}, attention_mask=mask, labels=ids, use_cache=False)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()), allow_unused=True)
        found.append([output.logits[mask == 1], *(g for g in gradients if g is not None)])
        cache, begin = None, 0
        for piece in (4, 8):
            part = slice(begin, begin + piece)
            output = model(**{inputs: given[:, part]}, attention_mask=mask[:, : begin + piece], past_key_values=cache)
            found[-1].append(output.logits[mask[:, part] == 1])
            cache, begin = output.past_key_values, begin + piece
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_forward_refuses_a_cache_of_other_rows(model):
    cache = model(tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 1 rows and the input has 2"):
        model(tokens(2, 3), past_key_values=cache)
    cache.batch_repeat_interleave(3)
    with pytest.raises(ValueError, match="holds 3 rows and the input has 2"):
        model(tokens(2, 3), past_key_values=cache)
    assert model(tokens(3, 3), past_key_values=cache).logits.shape[0] == 3


@torch.no_grad()
@pytest.mark.parametrize("stored, given, said", [(0, 7, "5"), (0, 3, ""), (4, 6, "5, or of all 9"), (4, 12, "all 9")])
def test_forward_refuses_a_mask_of_another_length(stored, given, said):
    model, cache = tiny_model(), None
    if stored:
        cache = model(tokens(1, stored), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"attention_mask.*{said}"):
        model(tokens(1, 5), attention_mask=torch.ones(1, given), past_key_values=cache)
    for right in {5, stored + 5}:
        model(tokens(1, 5), attention_mask=torch.ones(1, right), past_key_values=copy.deepcopy(cache))


def test_count_targets_refuses_masks_and_documents_of_another_shape():
    for name in ("attention_mask", "document_ids"):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            count_targets(tokens(2, 5), **{name: torch.ones(2, 6, dtype=torch.long)})


@pytest.mark.parametrize("time", [1, 2, 3, 6, 7, 63])
def test_forward_is_strictly_causal(model, time):
    ids = tokens(1, time)
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    assert torch.equal(plain(model, ids)[:, :-1], plain(model, changed)[:, :-1])


@pytest.mark.parametrize("variant", [{}, V1], ids=str)
def test_forward_gradient_reaches_no_later_position(variant):
    model = tiny_model(**variant)
    embeddings = model.model.embed_tokens(tokens(1, 20)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    for t in range(20):
        (g,) = torch.autograd.grad(logits[0, t].square().sum(), embeddings, retain_graph=True)
        assert (g[0, t + 1 :] == 0).all() and (g[0, t] != 0).any()
        assert t < 3 or (g[0, 0] != 0).any()


def test_forward_context_beyond_the_window_matters_through_the_long_term_memory_alone():
    model = tiny_model(num_hidden_layers=1, window=3, delay=10, train_delay=[10, 10])
    embeddings = model.model.embed_tokens(tokens(1, 40)).detach().requires_grad_()
    whole = torch.autograd.grad(model(inputs_embeds=embeddings).logits[0, -1].sum(), embeddings)[0][0, 0].norm()
    model.remove_memories("long_term")
    without = torch.autograd.grad(model(inputs_embeds=embeddings).logits[0, -1].sum(), embeddings)[0][0, 0].norm()
    assert without < 1e-4 * whole


def test_forward_a_memory_with_no_pairs_answers_exactly_zero():
    """Before the delay the long-term memory adds nothing: the first logits equal those of the model without it."""
    model = tiny_model(delay=9, train_delay=[9, 9])
    ids = tokens(2, 9)
    whole = plain(model, ids)
    model.remove_memories("long_term")
    assert torch.equal(plain(model, ids), whole)


def test_forward_loss_counts_what_is_predicted_and_nothing_else():
    model = tiny_model()
    ids = tokens(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 12])
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, [0, 1, 6]] = 0  # padding on the left and in the middle
    labels = ids.clone()
    labels[0, 8] = -100
    output = model(ids, mask, documents, labels=labels)
    log_probabilities = output.logits.log_softmax(-1)
    pairs = [(0, t, t + 1) for t in range(11) if t != 4 and t + 1 != 8]
    pairs += [(1, 2, 3), (1, 3, 4), (1, 4, 5), (1, 5, 7), *((1, t, t + 1) for t in range(7, 11))]
    expected = -sum(log_probabilities[r, t, ids[r, u]] for r, t, u in pairs) / len(pairs)
    assert difference(output.loss, expected) < BOUND
    assert count_targets(labels, mask, documents) == len(pairs)
    ready = laid_out(ids, labels, mask, documents)
    assert torch.equal(model(**ready, use_cache=False).loss, output.loss)
    for more in ({"attention_mask": mask}, {"document_ids": documents}, {"use_cache": True}):
        with pytest.raises(ValueError, match="with it"):
            model(**ready, **{"use_cache": False} | more)


def test_forward_loss_of_packed_documents_is_the_mean_over_separate_ones():
    model, ids = tiny_model(), tokens(1, 30)
    documents = torch.tensor([[0] * 11 + [1] * 19])
    packed = model(ids, document_ids=documents, labels=ids).loss
    first, second = (model(part, labels=part).loss for part in (ids[:, :11], ids[:, 11:]))
    assert difference(packed, (10 * first + 18 * second) / 28) < BOUND


def test_forward_loss_without_targets_is_zero():
    model = tiny_model()
    assert model(tokens(1, 1), labels=tokens(1, 1)).loss == 0
    assert model(tokens(1, 1), labels=tokens(1, 1), loss_only=True).loss == 0


@pytest.mark.parametrize("dtype, bound", [(torch.float64, BOUND), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("variant", ["v2", "layer norm, biases, tied, scaled", "v1"])
@pytest.mark.parametrize("most", [True, False], ids=["most targets count", "few targets count"])
def test_forward_loss_only_equals_the_loss_of_the_logits(variant, dtype, bound, most, monkeypatch):
    monkeypatch.setattr(losses, "_PIECE", 7)
    held = []
    entropy = losses.F.linear_cross_entropy
    monkeypatch.setattr(losses.F, "linear_cross_entropy", lambda *a, **b: held.append(len(a[0])) or entropy(*a, **b))
    model, ids = tiny_model(dtype, **VARIANTS[variant]), tokens(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, [0, 1, 6]] = 0
    documents = torch.tensor([[0] * 5 + [1] * 15, [0] * 20])
    labels = ids.masked_fill((ids % 5 == 0) == most, -100)
    found = []
    for loss_only in (False, True):
        output = model(ids, mask, documents, labels=labels, loss_only=loss_only, logits_to_keep=15)
        (3 * output.loss).backward()
        found.append((output.loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
        model.zero_grad()
        assert (output.logits is None) == loss_only
    (loss, gradient), (loss_in_pieces, gradient_in_pieces) = found
    assert held and (held[0] == 30) == most, "positions without a target get logits only where most have one"
    assert relative_error(loss_in_pieces, loss) < bound
    assert relative_error(gradient_in_pieces, gradient) < bound


def test_forward_loss_only_keeps_bfloat16_products_on_a_cpu_and_adapters():
    model, ids = tiny_model(torch.float32), tokens(2, 12)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids, labels=ids, loss_only=True).loss, model(ids, labels=ids).loss)
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    assert torch.equal(model(ids, labels=ids, loss_only=True).loss, model(ids, labels=ids).loss)


def test_forward_logits_to_keep_are_the_last(model):
    ids = tokens(2, 9)
    output = model(ids, labels=ids, logits_to_keep=3)
    assert torch.equal(output.logits, model(ids).logits[:, -3:])
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, -2:].flatten())
    assert difference(output.loss, expected) < BOUND


def test_forward_at_evaluation_and_with_a_cache_uses_the_set_delay():
    model, ids = tiny_model(), tokens(1, 30)
    expected = plain(model, ids)
    assert torch.equal(model(ids, draw=0.99).logits, expected)
    model.train()
    assert difference(model(ids, use_cache=True).logits, expected) < BOUND
    model.config.delay = 4
    assert difference(plain(MosaicForCausalLM(model.config).double().eval(), ids), expected) > 1e-3


def test_forward_dropout_works_in_training_only():
    model, ids = tiny_model(dropout=0.5), tokens(1, 20)
    assert torch.equal(plain(model, ids), plain(model, ids))
    model.train()
    assert difference(model(ids, draw=0.0).logits, model(ids, draw=0.0).logits) > 1e-3


@pytest.mark.parametrize("preset", ["memory-mosaics-v2-tiny", "memory-mosaics-v1-tiny", "transformer-tiny"])
@pytest.mark.parametrize("kind", ["attention_dropout", "embedding_dropout", "dropout"])
def test_forward_each_dropout_works_in_training_only(preset, kind):
    sizes = dict(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    none = dict(dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
    model = MosaicForCausalLM(MosaicConfig.from_preset(preset, **{**sizes, **none, kind: 0.4})).train()
    ids = tokens(1, 20)
    assert not torch.equal(model(ids, draw=0.0).logits, model(ids, draw=0.0).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("variant", [{}, V1], ids=str)
def test_forward_attention_dropout_reaches_every_memory_that_reads(variant):
    model = tiny_model(**variant, attention_dropout=0.4)
    for memory in model.model.stack.memories():
        if memory.type != "feed_forward":
            memory.train()
            x = torch.randn(1, 20, 16, dtype=torch.float64)
            first, second = (memory(x, Layout(1, 20), None, Context(draw=0.0))[0] for _ in range(2))
            assert not torch.equal(first, second), memory.type


@pytest.mark.parametrize("variant", [{}, V1], ids=str)
def test_gradient_checkpointing_changes_nothing(variant):
    model, ids = tiny_model(**{**variant, "dropout": 0.2, "attention_dropout": 0.2}).train(), tokens(2, 25)
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
        model.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_hidden_states_are_those_of_each_block(model):
    ids, mask = tokens(2, 9), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
    output = model(ids, attention_mask=mask, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    positions = model.model.embed_positions
    placed = model.model.embed_tokens(ids[1]) + (0 if positions is None else positions.weight[:9])
    assert difference(output.hidden_states[0][1], placed) == 0
    scale = model.config.logit_scale or 16**-0.5
    assert difference(model.lm_head(output.hidden_states[-1]) * scale, output.logits) < BOUND


def test_read_weights_sum_to_one_over_the_pairs_of_each_memory():
    model = tiny_model(train_delay=[6, 6]).train()
    reads = model.read_weights(tokens(2, 12))  # with the delay of evaluation, whatever the mode
    assert model.training
    assert [(r.memory, r.layer_index) for r in reads] == [(m, i) for i in (0, 1) for m in ("short_term", "long_term")]
    for r in reads:
        assert r.weights.shape == (2, 2, 12, 12)
        first = 1 if r.memory == "short_term" else 3
        assert (r.weights[:, :, :first] == 0).all() and (r.weights[:, :, first:].sum(-1) - 1).abs().max() < 1e-12


def test_read_weights_of_a_split_attention_are_those_that_each_half_may_read():
    """Figure 5: one half reads the window, the other all but the newest, each under its own name."""
    reach = {"short_term.window": 4, "long_term.delay": 2, "long_term.train_delay": [2, 5]}
    model = tiny_model(preset="transformer-long-short-tiny", **reach)
    first = {}
    for read in model.read_weights(tokens(1, 12)):
        first.setdefault(read.memory, []).append((read.weights[0, 0, 9] > 0).nonzero()[:, 0].tolist())
    assert first == {"short_term": [[6, 7, 8, 9]] * 2, "long_term": [[*range(8)]] * 2}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_save_pretrained_and_from_pretrained_keep_the_logits(tmp_path, variant):
    model = tiny_model(torch.float32, **VARIANTS[variant])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MosaicForCausalLM and not list(tmp_path.glob("*.bin"))
    assert torch.equal(plain(loaded, tokens(2, 30)), plain(model, tokens(2, 30)))


def test_from_pretrained_initialises_what_a_file_lacks_and_keeps_the_rest(tmp_path):
    model = tiny_model(torch.float32)
    model.remove_memories("long_term")
    model.save_pretrained(tmp_path)
    whole = MosaicForCausalLM.from_pretrained(tmp_path, config=tiny_config())
    for block, original in zip(whole.model.stack.blocks, model.model.stack.blocks, strict=True):
        added, kept = block.steps[0].memories["long_term"], block.steps[0].memories["short_term"]
        assert torch.equal(kept.key_proj.weight, original.steps[0].memories["short_term"].key_proj.weight)
        assert (added.bandwidth_base == 1.5).all() and 0 < added.key_proj.weight.std() < 1


def test_remove_memories_drops_the_parameters_and_survives_saving(tmp_path):
    model = tiny_model(torch.float32)
    before = model.num_parameters()
    long_term = sum(p.numel() for n, p in model.named_parameters() if "long_term" in n)
    model.remove_memories("long_term")
    assert model.num_parameters() == before - long_term and long_term > 0
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(loaded, tokens(1, 20)), plain(model, tokens(1, 20)))
    assert loaded.generate(tokens(1, 4), max_new_tokens=3).shape == (1, 7)
    with pytest.raises(ValueError, match="no 'long_term' memory"):
        model.remove_memories("long_term")


@pytest.mark.parametrize("variant", [{}, V1], ids=str)
def test_undecayed_parameters_are_scalars_and_norms(variant):
    model = tiny_model(**variant, bias=True)
    undecayed = model.undecayed_parameters()
    for name, parameter in model.named_parameters():
        assert (name in undecayed) == (parameter.dim() < 2), name


def test_describe_gives_the_size_of_v1():
    with torch.device("meta"):
        model = MosaicForCausalLM(MosaicConfig.from_preset("memory-mosaics-v1-babistories"))
    d, figures = 768, model.describe(512)
    layers = 12 * (5 * d**2 + 2 * 2688 * d + 7 * 12)
    assert figures["parameters"]["total"] == layers + 50304 * d + 25 * d == sum(p.numel() for p in model.parameters())
    maps, reads = 5 * d**2, 2 * d * (512 / 2 + 2688)
    assert figures["flops_per_token"] == 2 * (12 * (maps + reads) + 50304 * d)
    pairs, recurrences = 2 * 512 * d + d, 2 * (d + 12)  # keys, values and the open one; two averages
    assert figures["state_bytes"] == 12 * 4 * (pairs + recurrences)


@pytest.mark.parametrize(
    "name, remove, billions, gflops",
    [
        ("small", False, 2.039, None),
        ("small", True, 1.735, None),
        ("large", False, 9.926, 18.94),
        ("large", True, 8.307, 15.63),
    ],
)
def test_describe_gives_the_figures_of_the_paper(name, remove, billions, gflops):
    with torch.device("meta"):
        model = MosaicForCausalLM(MosaicConfig.from_preset(f"memory-mosaics-v2-{name}"))
    if remove:
        model.remove_memories("long_term")
    figures = model.describe(256)
    assert abs(figures["parameters"]["total"] / 1e9 - billions) < 1e-3
    assert sum(figures["parameters"]["by_kind"].values()) == figures["parameters"]["total"]
    assert gflops is None or abs(figures["flops_per_token"] / 1e9 - gflops) < 0.01


def test_training_lowers_the_loss_on_real_text():
    import textwrap  # any source of the standard library is real text

    text = open(textwrap.__file__, encoding="utf-8").read().encode()[:8000]
    ids = torch.tensor([b % VOCABULARY for b in text]).view(-1, 100)[:64]
    torch.manual_seed(0)
    model = MosaicForCausalLM(tiny_config(hidden_size=32)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.9 and losses[-1] < 2.9


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "either input_ids or inputs_embeds"),
        (dict(input_ids=torch.zeros(1, 0, dtype=torch.long)), "no tokens"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), document_ids=torch.zeros(1, 3)), "document_ids"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 4, 4)), "attention_mask"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), output_attentions=True), "read_weights"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), draw=1.0), "draw is 1.0"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), loss_only=True), "without labels"),
        (dict(input_ids=torch.zeros(4, dtype=torch.long)), "(batch, time)"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 3)), "one label a position"),
        (dict(input_ids=torch.zeros(1, 4)), "input_ids as integers"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.bool)), "input_ids as integers"),
        (dict(inputs_embeds=torch.zeros(1, 4, 16, dtype=torch.long)), "embeddings as floats"),
        (dict(inputs_embeds=torch.zeros(1, 4, 15)), "15 wide and the model 16"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4)), "labels is torch.float32"),
        (dict(input_ids=torch.zeros(1, 4, dtype=torch.long), labels=torch.ones(1, 4).bool()), "labels is torch.bool"),
    ],
)
def test_forward_refuses_what_does_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**arguments)


@pytest.mark.parametrize("bad", [-1, -101, VOCABULARY, 2**31])
@pytest.mark.parametrize("loss_only", [False, True])
def test_forward_refuses_labels_that_are_no_tokens(bad, loss_only):
    ids = tokens(1, 5)
    labels = ids.clone()
    labels[0, 3] = bad
    with pytest.raises(ValueError, match=f"labels has tokens from .*{bad}.*from 0 to {VOCABULARY - 1}, or -100"):
        tiny_model()(ids, labels=labels, loss_only=loss_only)
    assert tiny_model()(ids, labels=labels.masked_fill(labels == bad, -100), loss_only=loss_only).loss.isfinite()


def test_importing_mosaics_registers_the_model_with_transformers(tmp_path):
    tiny_model(torch.float32).save_pretrained(tmp_path)
    code = (
        "import mosaics; from transformers import AutoModelForCausalLM as A; "
        "print(type(A.from_pretrained(__import__('sys').argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "MosaicForCausalLM", done.stderr


SHARP_V1 = {f"{name}.max_log_bandwidth": 3.0 for name in ("leaky_contextual", "kernel_persistent")}  # as v2


@pytest.mark.parametrize("variant", [{}, {**V1, **SHARP_V1}], ids=str)
def test_forward_under_autocast_and_in_bfloat16_stays_near_float32(variant):
    ids = tokens(2, 40)
    exact = tiny_model(torch.float32, scale=1.0, **variant)
    expected = plain(exact, ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert difference(plain(exact, ids).float(), expected) < 0.05 * expected.abs().max()
        assert difference(cached(exact, ids, [30, *[1] * 10]).float(), expected) < 0.05 * expected.abs().max()
        loss = exact.train()(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in exact.parameters())
    low = tiny_model(torch.bfloat16, scale=1.0, **variant)
    assert difference(plain(low, ids).float(), expected) < 0.1 * expected.abs().max()
    assert difference(cached(low, ids, [30, *[1] * 10]).float(), expected) < 0.1 * expected.abs().max()


@pytest.mark.parametrize("variant", [{}, V1, dict(preset="memory-mosaics-v1-nano")], ids=str)
def test_training_on_a_zero_embedding_keeps_every_parameter_finite(variant):
    model = tiny_model(torch.float32, scale=1.0, num_hidden_layers=4, **variant).train()
    model.model.embed_tokens.weight.data[7] = 0
    ids = torch.tensor([[7, 7, 3, 4, 5, 6, 7, 8]])
    model(ids, labels=ids, draw=0.0).loss.backward()
    assert all(p.grad is None or p.grad.abs().max() < 1e6 for p in model.parameters())


def test_remove_memories_leaves_other_models_of_the_same_config_alone(tmp_path):
    config = tiny_config()
    first, second = MosaicForCausalLM(config), MosaicForCausalLM(config)
    second.remove_memories("long_term")
    first.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(loaded, tokens(1, 20)), plain(first.eval(), tokens(1, 20)))


def test_remove_memories_drops_blocks_that_are_left_empty(tmp_path):
    long = {"type": "long_term", "options": dict(num_attention_heads=2, delay=3, train_delay=[3, 6])}
    other = {"type": "feed_forward", "options": dict(intermediate_size=8)}
    blocks = [{"repeat": 1, "steps": [[long]]}, {"repeat": 2, "steps": [[other]]}]
    model = MosaicForCausalLM(MosaicConfig(vocab_size=VOCABULARY, hidden_size=16, blocks=blocks)).eval()
    model.remove_memories("long_term")
    assert model.config.num_hidden_layers == len(model.model.stack.blocks) == 2
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain(loaded, tokens(1, 9)), plain(model, tokens(1, 9)))
    assert loaded.generate(tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_cache_of_other_memories_is_refused():
    model, ids = tiny_model(), tokens(1, 9)
    cache = model(ids, use_cache=True).past_key_values
    model.remove_memories("short_term")
    with pytest.raises(ValueError, match="other memories"):
        model(ids, past_key_values=cache)


def test_cache_made_in_inference_mode_can_be_continued_outside():
    model, ids = tiny_model(), tokens(1, 12)
    with torch.inference_mode():
        cache = model(ids[:, :5], use_cache=True).past_key_values
        model(ids[:, 5:6], past_key_values=cache, use_cache=True)
    with torch.no_grad():
        logits = model(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    assert difference(logits, plain(model, ids)[:, 6:]) < BOUND


def test_forward_auxiliary_losses_are_added_to_the_loss_in_training_alone():
    model, ids = tiny_model(), tokens(1, 9)

    def loss(auxiliary=(), **more):
        return model(ids, labels=ids, context=Context(auxiliary_losses=list(auxiliary)), draw=0.0, **more).loss

    assert loss([torch.tensor(2.5)]) == loss()
    model.train()
    assert difference(loss([torch.tensor(2.5), torch.tensor(1.0)]), loss() + 3.5) < BOUND
    found = loss([torch.tensor(2.5)], num_items_in_batch=32)  # of which 8 are counted here
    assert difference(found, loss() * 8 / 32 + 2.5 * 8 / 32) < BOUND


@pytest.mark.parametrize("items", [100, torch.tensor(100)], ids=["int", "tensor"])
@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_forward_divides_by_num_items_in_batch(items, loss_only, mode):
    """As the models of transformers do: parts of a batch, each divided by what the whole has, add up to the whole."""
    model = getattr(tiny_model(num_hidden_layers=1), mode)()
    rows = [tokens(1, time, seed=time) for time in (60, 6, 40, 2)]
    ids = torch.zeros(4, 60, dtype=torch.long)
    mask = torch.zeros(4, 60, dtype=torch.long)
    for line, row in enumerate(rows):
        ids[line, : row.shape[1]], mask[line, : row.shape[1]] = row, 1
    labels = ids.masked_fill(mask == 0, -100)
    whole = model(ids, mask, labels=labels, draw=0.3).loss
    whole.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    assert int(count_targets(labels, mask)) == 104
    parts = [
        model(ids[[i]], mask[[i]], labels=labels[[i]], draw=0.3, num_items_in_batch=items, loss_only=loss_only).loss
        for i in range(4)
    ]
    total = sum(parts)
    total.backward()
    assert difference(total * 100 / 104, whole) < BOUND
    for p, e in zip(model.parameters(), expected, strict=True):
        assert relative_error(p.grad * 100 / 104, e) < BOUND


def test_forward_takes_labels_that_are_shifted_already():
    model, ids = tiny_model(), tokens(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    assert difference(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss) < BOUND
    assert difference(model(ids, shift_labels=shifted, loss_only=True).loss, model(ids, labels=ids).loss) < BOUND


UNUSED = dict(
    token_type_ids=torch.zeros(2, 9, dtype=torch.long),
    cache_position=torch.arange(9),
    max_length_q=9,
    max_length_k=9,
    output_router_logits=False,
    is_causal=True,
    num_items_in_batch=None,
    output_attentions=False,
    cu_seq_lens_q=None,
    position_ids=None,
)


@pytest.mark.parametrize("name", sorted(UNUSED))
def test_forward_takes_what_a_llama_takes_and_does_not_change(name):
    model, ids = tiny_model(), tokens(2, 9)
    given = {name: UNUSED[name]}
    assert torch.equal(model(ids, **given).logits, model(ids).logits)
    assert torch.equal(model.model(ids, **given).last_hidden_state, model.model(ids).last_hidden_state)


def test_forward_names_the_nearest_argument():
    model, ids = tiny_model(), tokens(2, 9)
    for call in (model, model.model):
        with pytest.raises(TypeError, match="no argument 'document_id'; did you mean 'document_ids'"):
            call(ids, document_id=ids)
    with pytest.raises(ValueError, match="read the past alone"):
        model(ids, is_causal=False)


def test_forward_gives_zero_states_at_padding():
    mask = torch.tensor([[0, 0, 1, 1, 0, 1]])
    states = tiny_model().model(tokens(1, 6), attention_mask=mask).last_hidden_state
    assert (states[~mask.bool()] == 0).all() and (states[mask.bool()] != 0).all()


def test_forward_dropout_reaches_the_embeddings():
    model = tiny_model(dropout=0.5).train()
    for block in model.model.stack.blocks:
        for step in block.steps:
            step.dropout = 0.0
    ids = tokens(1, 20)
    assert difference(model(ids, draw=0.0).logits, model(ids, draw=0.0).logits) > 1e-3


def test_from_pretrained_keeps_the_loaded_part_of_a_memory(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model(torch.float32)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.stack.blocks.0.steps.0.memories.short_term.key_gate.weight"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = MosaicForCausalLM.from_pretrained(tmp_path)
    for key, value in weights.items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert 0 < loaded.state_dict()[name].std() < 1


def test_forward_without_return_dict_in_the_config_gives_tuples():
    model, ids = tiny_model(), tokens(1, 5)
    expected = plain(model, ids)
    model.config.return_dict = False
    assert torch.equal(model(ids)[0], expected)


def test_resize_token_embeddings_starts_new_words_as_table_6_says(tmp_path):
    model = tiny_model(torch.float32, scale=1.0, hidden_size=64)
    model.save_pretrained(tmp_path)
    loaded = MosaicForCausalLM.from_pretrained(tmp_path)
    loaded.resize_token_embeddings(VOCABULARY + 200, mean_resizing=False)
    for module, original in ((loaded.lm_head, model.lm_head), (loaded.model.embed_tokens, model.model.embed_tokens)):
        assert torch.equal(module.weight[:VOCABULARY], original.weight)
        assert abs(module.weight[VOCABULARY:].std() * 128**0.5 - 0.9867) < 0.05
    assert loaded(tokens(1, 5)).logits.shape[-1] == loaded.config.vocab_size == VOCABULARY + 200


@pytest.mark.slow
def test_compiled_model_is_not_compiled_anew_for_every_draw():
    model, ids = tiny_model(train_delay=[3, 30]).train(), torch.randint(VOCABULARY, (2, 40))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    try:
        compiled = torch.compile(model, backend="aot_eager")
        for step in range(6):
            losses = []
            for either in (compiled, model):
                with draw((step + 0.5) / 6):
                    losses.append(either(input_ids=ids, labels=ids, use_cache=False).loss)
            assert relative_error(*losses) < 1e-9
            if step == 2:
                made = graphs["unique_graphs"]
        assert 0 < made == graphs["unique_graphs"]
    finally:
        torch._dynamo.reset()
