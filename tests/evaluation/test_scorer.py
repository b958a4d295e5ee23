"""Scores do not depend on the batch, on a shared prefix or on chunks, and are what a plain pass says."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mosaics.evaluation import Example, Scorer

from .conftest import tiny

PROMPTS = ["def bisect", "import heapq\n\nheap = []\nheapq.heappush(heap, ", "class", "for i in range(lo, hi):"]
CHOICES = [" insort(a, x):", " 1)", " pass", "\n    return lo, hi"]
PREFIX = '"""Heap queue."""\n\nfrom itertools import count\n\n'


def llama(tokenizer):
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=[tiny, llama], ids=["mosaic", "llama"])
def model(request, tokenizer):
    return request.param(tokenizer)


@torch.no_grad()
def plain(model, context, continuation) -> list[float]:
    """Log-likelihoods from one uncached pass over one row."""
    logits = model(torch.tensor([[*context, *continuation]]), use_cache=False).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()


def examples(prefix=""):
    return [Example(str(i), prompt, [], choices=CHOICES, prefix=prefix) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("prefix", ["", PREFIX])
@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 5}, {"chunk": 3}, {"batch_tokens": 40}])
def test_scorer_choices_in_any_batch_prefix_and_chunk_equal_a_plain_pass(model, tokenizer, prefix, options):
    scorer = Scorer(model, tokenizer, **options)
    for example, scores in zip(examples(prefix), scorer.choose(examples(prefix)), strict=True):
        for choice, score in zip(CHOICES, scores, strict=True):
            context, whole = (scorer.encode(prefix + example.prompt + text) for text in ("", choice))
            cut = next((i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b), len(context))
            assert score == pytest.approx(sum(plain(model, whole[:cut], whole[cut:])), abs=1e-5 * len(whole))


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_scorer_completions_equal_uncached_greedy_search(model, tokenizer, prefix):
    expected = []
    for example in examples(prefix):
        ids = torch.tensor([Scorer(model, tokenizer).encode(prefix + example.prompt)])
        start = ids.shape[1]
        for _ in range(6):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        new = ids[0, start:].tolist()
        new = new[: new.index(1)] if 1 in new else new
        expected.append(tokenizer.decode(new, skip_special_tokens=True))
    for options in ({"batch_size": 1}, {"batch_size": 4}, {"chunk": 2}):
        asked = examples(prefix) + examples(prefix)[::-1]
        assert Scorer(model, tokenizer, **options).complete(asked, 6) == expected + expected[::-1]


def test_scorer_completion_ends_at_a_stop(scorer):
    whole = scorer.complete(examples(), 8)[0]
    assert len(whole) > 2
    assert scorer.complete(examples(), 8, stop=[whole[2]])[0] == whole[: whole.index(whole[2])]


def test_scorer_passes_a_shared_prefix_once(tokenizer):
    model = tiny(tokenizer)
    scorer = Scorer(model, tokenizer)
    passed = 0

    def count(module, args, kwargs):
        nonlocal passed
        passed += kwargs["input_ids"].shape[1]

    model.register_forward_pre_hook(count, with_kwargs=True)
    scorer.choose(examples(PREFIX))
    first, length = passed, scorer.count(PREFIX)
    scorer.choose(examples(PREFIX))
    again = passed - first
    assert first - again >= length - 1  # the last token of the prefix may change with what follows it
    assert again <= sum(scorer.count(text) for text in PROMPTS) * len(CHOICES)


def test_scorer_token_nats_and_next_logprobs_equal_a_plain_pass(model, tokenizer):
    scorer = Scorer(model, tokenizer, chunk=4, batch_size=2)
    rows = [scorer.encode(text) for text in (PREFIX, *PROMPTS)]
    for row, nats in zip(rows, scorer.token_nats(rows), strict=True):
        assert (-nats).tolist() == pytest.approx(plain(model, row[:1], row[1:]), abs=1e-4)
    found = scorer.next_logprobs(rows[0], [2, 3, 9])
    expected = model(torch.tensor([rows[0]])).logits[0, [2, 3, 9]].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_scorer_asks_a_model_with_a_state_dtype_as_it_keeps_its_pairs(tokenizer):
    model, row = tiny(tokenizer, state_dtype="int8"), tokenizer(PREFIX).input_ids
    logits = model(torch.tensor([row]), use_cache=True).logits[0, :-1]
    expected = -logits.log_softmax(-1).gather(1, torch.tensor(row[1:])[:, None])[:, 0]
    for chunk in (4, 1000):
        (nats,) = Scorer(model, tokenizer, chunk=chunk).token_nats([row])
        torch.testing.assert_close(nats, expected, rtol=1e-4, atol=1e-4)
    assert (expected + torch.tensor(plain(model, row[:1], row[1:]))).abs().max() > 1e-3


def test_scorer_refuses_what_is_longer_than_the_limit_and_never_cuts(model, tokenizer):
    scorer = Scorer(model, tokenizer, limit=20)
    long = Example("too-long", "a = 1\n" * 30, [], choices=[" x"])
    for ask in (lambda: scorer.choose([long]), lambda: scorer.complete([long], 4)):
        with pytest.raises(ValueError, match="too-long needs .* limit is 20"):
            ask()
    assert scorer.complete([Example("short", "a", [])], 4)


def test_scorer_ending_keeps_a_choice_from_winning_as_the_beginning_of_another(tokenizer):
    scorer = Scorer(tiny(tokenizer), tokenizer)
    plain_example = Example("a", "x =", [], choices=[" lo", " lo, hi"])
    ended = Example("b", "x =", [], choices=[" lo", " lo, hi"], ending="\n")
    assert scorer.choose([plain_example])[0][0] > scorer.choose([plain_example])[0][1]
    assert scorer.choose([ended])[0][0] < scorer.choose([plain_example])[0][0]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_scorer_best_after_a_long_prefix_equals_the_best_of_all_choices(model, tokenizer, monkeypatch, ending):
    choices = [" lo", " lo, hi", " low", " hi", " class_01", " class_02", " class_12", " x[lo]", " x[lo:hi]", " a"]
    asked = [
        Example(str(i), f"x{i} = y{i % 5}\n{prompt}", [], choices=choices, prefix=PREFIX * 2, ending=ending)
        for i, prompt in enumerate(PROMPTS * 8)
    ]
    scorer = Scorer(model, tokenizer)
    scores = scorer.choose(asked)
    expected = [choices[max(range(len(one)), key=one.__getitem__)] for one in scores]
    monkeypatch.setattr("mosaics.evaluation.scorer._LONG", 1)
    passes = 0

    def count(*_):
        nonlocal passes
        passes += 1

    hook = model.register_forward_pre_hook(count)
    assert scorer.best(asked) == expected
    hook.remove()
    assert len(set(expected)) > 1
    assert passes < len(asked) * len(choices)


def test_scorer_fingerprint_tells_weights_apart(tokenizer):
    model = tiny(tokenizer)
    before = Scorer(model, tokenizer).fingerprint()
    assert Scorer(tiny(tokenizer), tokenizer).fingerprint() == before
    with torch.no_grad():
        model.lm_head.weight[7, 5] += 1e-6
    assert Scorer(model, tokenizer).fingerprint() != before


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"limit": 0}, {"chunk": 0}])
def test_scorer_refuses_impossible_numbers(tokenizer, options):
    with pytest.raises(ValueError, match="at least 1"):
        Scorer(None, tokenizer, **options)


@pytest.mark.parametrize("bad", [-1, -100, 700, 2**31, -(2**63)])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_scorer_refuses_tokens_that_are_none_of_the_model_wherever_they_stand(model, tokenizer, bad, place):
    scorer, ids = Scorer(model, tokenizer), [5, 6, 7, 8]
    ids[{"first": 0, "middle": 2, "last": -1}[place]] = bad
    asked = Example("odd", ids, ["x"], choices=["a", ""])
    single = Example("odd", [bad], ["x"], choices=[""])  # all of it is asked for, none is passed
    assert len(tokenizer) <= 700
    for ask in (
        lambda: scorer.choose([asked]),
        lambda: scorer.best([asked]),
        lambda: scorer.best([single]),
        lambda: scorer.complete([asked], 2),
        lambda: scorer.token_nats([[5, 6], ids]),
        lambda: scorer.next_logprobs(ids, [1]),
        lambda: scorer.loglikelihoods([(ids, [5])]),
        lambda: scorer.loglikelihoods([([5], ids)]),
    ):
        with pytest.raises(ValueError, match=f"{bad}.*those of this model are 0 to"):
            ask()


def test_scorer_refuses_an_empty_context_and_positions_beyond_the_end(model, tokenizer):
    scorer = Scorer(model, tokenizer)
    for ask in (lambda: scorer.loglikelihoods([([], [5])]), lambda: scorer.token_nats([[5, 6], []])):
        with pytest.raises(ValueError, match="a context is empty"):
            ask()
    for ids, positions in (([5, 6], [2]), ([5, 6], [-1]), ([5, 6], []), ([], [0])):
        with pytest.raises(ValueError, match="the positions are"):
            scorer.next_logprobs(ids, positions)
